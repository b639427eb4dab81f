"""The audit of scales without weights: LMDeploy's own model on the meta device, and the engine's rules."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from ..console import reason
from ..formats import FORMATS, KVFormat
from .cache import check_model
from .loading import check_file, collect_checkpoint, settle


def read_config(folder: str) -> Any:
    """LMDeploy's configuration of a model; needs no GPU. Raises what LMDeploy raises of models it does not know."""
    from lmdeploy.pytorch.config import ModelConfig
    if torch.cuda.is_available():
        return ModelConfig.from_pretrained(folder, device_type='cuda')
    with _no_flash_mla():  # 'cuda' would ask the GPU whether it has bf16
        return ModelConfig.from_pretrained(folder, device_type='ascend')


@contextlib.contextmanager
def _no_flash_mla() -> Iterator[None]:
    """Without a GPU: answer the configurations of MLA models, which ask for its generation, that it is an old one."""
    original = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(major=0)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.get_device_properties = original


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
        ValueError: LMDeploy cannot build the model here, e.g. without libraries that only GPUs need.
    """
    try:
        model, config = build_empty(folder)
    except Exception as error:  # LMDeploy's model of it, which may ask for anything
        raise ValueError(f'the layers cannot be listed here, because LMDeploy cannot build this model: {reason(error)}'
                         '. Run the check where the model is served.') from error
    check_file(config, quant_policy)
    collect_checkpoint(model, folder)
    return settle(model, quant_policy, folder, config.num_key_value_heads, quiet=True)
