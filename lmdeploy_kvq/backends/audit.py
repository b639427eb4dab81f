"""The audit of scales without weights: LMDeploy's own model on the meta device, and the engine's rules."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ..formats import FORMATS, KVFormat
from .cache import check_model
from .loading import check_file, collect_checkpoint, settle


def read_config(folder: str) -> Any:
    """LMDeploy's configuration of a model; needs no GPU. Raises what LMDeploy raises of models it does not know."""
    from lmdeploy.pytorch.config import ModelConfig
    # the device is only asked whether it has bf16, by looking at the GPU for 'cuda'
    return ModelConfig.from_pretrained(folder, device_type='cuda' if torch.cuda.is_available() else 'ascend')


def refusals(config: Any) -> list[tuple[KVFormat, str]]:
    """Every format, and why the engine would refuse it for this model; empty where it would not.

    Args:
        config: from :func:`read_config`.
    """
    found = []
    for fmt in FORMATS:
        try:
            check_model(fmt, config, SimpleNamespace(max_batches=1))  # batch sizes are the server's, not the model's
            found.append((fmt, ''))
        except ValueError as error:
            found.append((fmt, str(error)))
    return found


def build_empty(folder: str) -> tuple[torch.nn.Module, Any]:
    """LMDeploy's model without memory for its weights, and its configuration; needs no GPU."""
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.models.patch import BuildModelContext, build_patched_model
    config = read_config(folder)
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        context = BuildModelContext(quant_config=config.quant_config)
        return build_patched_model(config, device='meta', build_model_ctx=context), config


def audit(folder: str, quant_policy: int) -> list[tuple[str, str, str, str]]:
    """What the engine would settle on: (layer, K scale, V scale, source) per attention layer.

    The scale file is found as when serving (``LMDEPLOY_KVQ_SCALES``); of the checkpoint, only scales are read.

    Raises:
        ScaleError: what the engine would refuse.
    """
    model, config = build_empty(folder)
    check_file(config, quant_policy)
    collect_checkpoint(model, folder)
    return settle(model, quant_policy, folder, config.num_key_value_heads, quiet=True)
