"""The life of pending scales: from the model that is built to the file that is written."""
from __future__ import annotations

from typing import Any

import torch
from lmdeploy.utils import get_logger

from ..formats import KVFormat
from ..scales import LayerScales, ScaleError, provenance, write_file
from .asked import requested
from .calibrating import METHOD, Calibration, Found
from .loading import apply, attention_layers, bare_model, layer_index, model_scales, report, scale_path, shown

logger = get_logger('lmdeploy')


def begin(model: torch.nn.Module, agent: Any) -> None:
    """Watch a model from now on; its scales are written by rank 0."""
    from lmdeploy.pytorch.distributed import get_tp_group
    store, request = model_scales(model), requested()
    assert request is not None and store.format is not None
    fmt = store.format

    def finish(found: dict[str, Found]) -> None:
        end(model)
        _take(model, fmt, found, agent.model_path, request.granularity, quiet=agent.rank != 0)

    store.calibration = Calibration(
        attention_layers(model), fmt, request, agent.model_config.dtype,
        lambda module, k, v: apply(module, k, v, store), finish, get_tp_group() if store.heads[2] > 1 else None,
        agent.model_config.num_replicate_key_value_heads)
    if agent.rank == 0:
        logger.info(f'lmdeploy_kvq: the scales of {fmt.name} are found on the first {request.tokens} tokens served, '
                    f'which are kept in 16 bits until then: {store.calibration.nbytes / 2**20:.0f} MiB per GPU, and no '
                    f'CUDA graphs. They will be written to {scale_path(agent.model_path)}')


def end(model: torch.nn.Module) -> None:
    """Watch a model no longer, whether its scales were found or not."""
    store = model_scales(model)
    if store.calibration is not None:
        store.calibration.drop()
        store.calibration = None


def pending_scales(model: Any) -> Calibration | None:
    """What watches an engine's model, or None: its scales are known."""
    return model_scales(bare_model(model)).calibration


def _take(model: torch.nn.Module, fmt: KVFormat, found: dict[str, Found], model_path: str, granularity: str,
          quiet: bool) -> None:
    """Keep calibrated scales with the model, which serves them already; write and audit them."""
    from safetensors import SafetensorError
    store, path = model_scales(model), scale_path(model_path)
    missing = [name for name in store.layers if name not in found]
    store.layers = {name: LayerScales(layer.key, layer.value, source='calibrated') for name, layer in found.items()}
    if quiet:
        return
    report(fmt, [(name, *shown(store.layers.get(name, LayerScales()), name)) for name in attention_layers(model)], None)
    if missing:
        logger.error(f'lmdeploy_kvq: {path} is not written: {len(missing)} layers attended to nothing, the first is '
                     f'{missing[0]}, and use 1.0. Run lmdeploy-kvq calibrate MODEL -o {path}, and start again')
        return
    try:
        metadata = provenance(model_path, fmt, min(layer.tokens for layer in found.values()), method=METHOD,
                              granularity=granularity, data='served', engine='lmdeploy', partial='false')
        write_file(path, {layer_index(name): (layer.key, layer.value) for name, layer in found.items()}, metadata,
                   {layer_index(name): layer.statistics for name, layer in found.items()})
    except (ScaleError, SafetensorError, OSError) as error:  # the engine serves, and what it serves is right
        logger.error(f'lmdeploy_kvq: {path} is not written: {error}. Serving goes on, but the next start has no '
                     'scales: name a file that can be written with --kv-scales PATH')
    else:
        logger.info(f'lmdeploy_kvq: wrote {path}; the next start uses it')
