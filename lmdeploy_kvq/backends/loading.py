"""Scales of checkpoints and scale files into LMDeploy's attention layers."""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lmdeploy.utils import get_logger

from .._autoload import SCALES
from ..console import reason
from ..formats import KVFormat, find_format
from ..reference import MAX_INPUT
from ..scales import (
    FILE_NAME,
    LayerScales,
    ScaleError,
    ScaleFile,
    check_format,
    fingerprint,
    parse_name,
    read_file,
    shard,
    validate,
    validate_transforms,
)
from . import observer, rotations
from .asked import requested
from .calibrating import Calibration
from .checkpoints import advise, declares_fp8_cache
from .drafts import draft_file, draft_folder

logger = get_logger('lmdeploy')

PENDING = 'pending'
"""Source of scales that will be found while serving."""


@dataclass
class ModelScales:
    """Scales met while a model's weights were read; kept with the model.

    Attributes:
        layers: attention module's name to what its checkpoint says.
        heads: KV heads of the whole model, and this rank and the number of ranks among which they are split.
        settled: the policy is known. What arrives then (live weight updates) is applied at once, or ignored.
        format: the format served if it has static scales.
        transforms: what identifies the transforms that K and V are stored with; empty without any.
        calibration: finds the scales while serving; None: it does not, or has.
    """
    layers: dict[str, LayerScales] = field(default_factory=dict)
    heads: tuple[int, int, int] = (1, 0, 1)
    settled: bool = False
    format: KVFormat | None = None
    transforms: str = ''
    calibration: Calibration | None = None


def attention_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name to module of every paged attention of a model, in order."""
    from lmdeploy.pytorch.nn.attention import Attention
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def rename_weights(original: Callable[..., Any], iterator: Any, model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """LMDeploy's renamed stream of weights without the KV cache's scales, which its models do not know.

    It serves the loading of checkpoints and live weight updates.
    """
    names = list(attention_layers(model))
    for name, weight in original(iterator, model):
        found = parse_name(name)
        # EAGLE's checkpoints leave 'model.' out, and its loader adds it later
        layer = None if found is None else _owner(found.owner, names) or _owner(f'model.{found.owner}', names)
        if found is None or layer is None:
            yield name, weight
        else:
            _collect(model, layer, found.kind, name, weight)


def _owner(owner: str, names: Sequence[str]) -> str | None:
    """The attention module that a scale under ``owner`` belongs to: the one below its nearest ancestor that has one."""
    while owner:
        below = [name for name in names if name.startswith(owner + '.') or name == owner]
        if below:
            return below[0] if len(below) == 1 else None
        owner = owner.rpartition('.')[0]
    return None


def _collect(model: torch.nn.Module, layer: str, kind: str, name: str, weight: torch.Tensor) -> None:
    """Keep a checkpoint's tensor. It is checked when the policy is known: most policies ignore it."""
    store = model_scales(model)
    if store.settled and store.format is None:
        return  # scales are computed as tokens are written, or the cache is not quantized by us
    before = store.layers.get(layer, LayerScales())
    if before.source != 'checkpoint':
        return  # a file overrides the checkpoint
    found = before.add(kind, name, weight)
    if store.settled and found is not before:
        k, v, _ = found.resolved(layer)
        apply(attention_layers(model)[layer], k, v, store)
    store.layers[layer] = found


def model_scales(model: torch.nn.Module) -> ModelScales:
    """The scales kept with a model."""
    if '_kvq_scales' not in vars(model):
        object.__setattr__(model, '_kvq_scales', ModelScales())  # no module, parameter or buffer of it
    return model._kvq_scales  # type: ignore[return-value]


def build_model(original: Callable[[Any], None], agent: Any) -> None:
    """``BaseModelAgent._build_model``: after the weights, settle the scales.

    A level-2 wake-up builds the model again and reads no weights: the new one takes over what the old one knew, live
    updates included. An engine that starts without weights reads the checkpoint's scales by themselves.
    """
    from . import freezing  # which builds upon this module
    before = agent.patched_model
    if before is not None:
        freezing.end(bare_model(before))
    original(agent)
    from lmdeploy.pytorch.distributed import get_tp_world_rank
    model, policy = bare_model(agent.patched_model), agent.cache_config.quant_policy
    fmt = find_format(policy)
    if agent.misc_config.empty_init:
        # Loading weights moves what a model made elsewhere; here nothing has, and a transform goes where buffers are.
        device = next(model.parameters()).device
        for module in attention_layers(model).values():
            module.to(device)
        if before is not None:
            model_scales(model).layers.update(model_scales(bare_model(before)).layers)
        elif fmt is not None and fmt.needs_scales:
            collect_checkpoint(model, agent.model_path)
    if model_scales(model).layers and int(policy) == 0 and agent.rank == 0 \
            and not declares_fp8_cache(agent.model_config.hf_config):  # what is declared was said before loading
        advise('the checkpoint carries scales of an FP8 KV cache')
    world_size, rank = get_tp_world_rank('attn')
    audit = settle(model, policy, agent.model_path, kv_heads(agent.model_config), rank, world_size,
                   quiet=agent.rank != 0)
    if any(row[3] == PENDING for row in audit):
        freezing.begin(model, agent)
    if observer.ACTIVE is not None:
        observer.ACTIVE.attach({layer_index(name): module for name, module in attention_layers(model).items()})


def bare_model(patched: Any) -> torch.nn.Module:
    """The model of an agent, which is wrapped for CUDA graphs some time after it is built."""
    return patched if isinstance(patched, torch.nn.Module) else patched.get_model()


def collect_checkpoint(model: torch.nn.Module, model_path: str) -> None:
    """Read a checkpoint's scales, and nothing else of it, as loading its weights would.

    Args:
        model: LMDeploy's model, on any device (``meta`` will do).
        model_path: folder with safetensors; other checkpoints have no scales that can be read alone.

    Raises:
        ScaleError: weights that are not there, or damaged.
    """
    from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader
    from safetensors import safe_open

    def tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, framework='pt') as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                if parse_name(name) is not None:
                    yield name, file.get_tensor(name)

    try:
        loader = ModelWeightLoader(model_path)
        for path in loader._shard_paths if loader._weight_type == 'safetensors' else ():
            list(loader._rename_weights_iterator(tensors(path), model))
    except ScaleError:
        raise
    except Exception as error:  # files that are missing or cut short, a damaged index: safetensors', json's, LMDeploy's
        raise ScaleError(f'the checkpoint\'s scales cannot be read: the weights in {model_path} are missing or '
                         f'damaged ({reason(error)})') from error


def settle(model: torch.nn.Module, quant_policy: int, model_path: str, num_kv_heads: int, rank: int = 0,
           world_size: int = 1, quiet: bool = False,
           source: tuple[str | None, bool] | None = None) -> list[tuple[str, str, str, str]]:
    """Decide every layer's scales, fill the buffers, and say where they came from.

    File, then checkpoint, then 1.0; where calibration while serving is asked for, file, then pending.

    Args:
        model: LMDeploy's model, weights loaded.
        quant_policy: the engine's policy.
        model_path: folder in which a scale file is looked for.
        num_kv_heads: KV heads of the whole model; rank, world_size: of the tensor-parallel group.
        quiet: log nothing (ranks other than 0).
        source: a draft model's scale file and strictness; None: those of :func:`scale_file`, or calibration.

    Returns:
        The audit: (layer, K scale, V scale, source) per attention layer, or K's and V's transform where those can come
        from a file; empty for policies that need neither.

    Raises:
        ScaleError: values or a file that cannot be used, or ``strict`` and a layer without a scale.
    """
    fmt, store = find_format(quant_policy), model_scales(model)
    if fmt is None or not fmt.needs_scales:
        store.settled = True
        store.layers.clear()
        heads = (num_kv_heads, rank, world_size)
        return [] if fmt is None else _settle_transforms(fmt, model, source or scale_file(model_path), heads, quiet)
    store.settled, store.format, store.heads = True, fmt, (num_kv_heads, rank, world_size)
    (path, strict), request = (scale_file(model_path), requested()) if source is None else (source, None)
    layers = attention_layers(model)
    file = rotations.usable(None if path is None else read_file(path), fmt)
    if file is not None:
        validate(file, map(layer_index, layers), num_kv_heads)
        store.layers = {name: file.layers[layer_index(name)] for name in layers}
    elif request is not None and any(name not in store.layers or store.layers[name].source != 'calibrated'
                                     for name in layers):
        one = torch.ones(num_kv_heads if request.granularity == 'head' else ())  # as CUDA graphs will find them
        store.layers = dict.fromkeys(layers, LayerScales(one, one, source=PENDING))
    audit = []
    for name, module in layers.items():
        found = store.layers.get(name, LayerScales())
        k, v, _ = found.resolved(name)
        apply(module, k, v, store)
        audit.append((name, *shown(found, name)))
    defaults = [row[0] for row in audit if row[3] == 'default']
    if strict and defaults:
        raise ScaleError(f'--kv-scales strict: no scales for {len(defaults)} of {len(audit)} layers, the first is '
                         f'{defaults[0]}; run lmdeploy-kvq calibrate MODEL -o MODEL/{FILE_NAME}, or serve a '
                         'per-token-head format')
    if not quiet:
        report(fmt, audit, path)
    return audit


def _settle_transforms(fmt: KVFormat, model: torch.nn.Module, source: tuple[str | None, bool],
                       heads: tuple[int, int, int], quiet: bool) -> list[tuple[str, str, str, str]]:
    """:func:`settle` for formats whose scales follow the values: only transforms may come from a file."""
    path, strict = source if fmt.takes_transform else (None, False)
    file = rotations.usable(None if path is None else read_file(path), fmt)
    layers = {name: (0 if file is None else layer_index(name), module)  # EAGLE3's one layer has no number
              for name, module in attention_layers(model).items()}
    audit, model_scales(model).transforms = rotations.attach(fmt, layers, heads, file, strict)
    if audit and not quiet:
        rotations.report(fmt, audit, model_scales(model).transforms, None if file is None else file.path)
    return audit


def scale_file(model_path: str) -> tuple[str | None, bool]:
    """Path of the scale file to use, or None, and whether layers without a scale are refused.

    ``--kv-scales`` sets the environment variable: a path, or ``strict``.
    """
    path, given = scale_path(model_path), os.environ.get(SCALES, '').strip()
    named = given not in ('', 'strict') and requested() is None  # to be read, and an error if it is not there
    return (str(path) if named or path.is_file() else None), given == 'strict'


def scale_path(model_path: str) -> Path:
    """Where the scale file is, or will be once scales are calibrated while serving."""
    given = os.environ.get(SCALES, '').strip()
    return Path(given) if given not in ('', 'strict') else Path(model_path or '.') / FILE_NAME


def kv_heads(model_config: Any) -> int:
    """KV heads of a model; LMDeploy counts those that it replicates for tensor parallelism several times."""
    return model_config.num_key_value_heads // model_config.num_replicate_key_value_heads


def layer_index(name: str) -> int:
    """Index of a layer from its module's name: the last number in it."""
    numbers = re.findall(r'(?:^|\.)(\d+)(?=\.)', name)
    if not numbers:
        raise ScaleError(f'{name}: the layer has no number, so a scale file cannot name it')
    return int(numbers[-1])


def check_file(model_config: Any, quant_policy: int) -> None:
    """Before anything is loaded: a scale file that is there must fit the model's configuration."""
    fmt = find_format(quant_policy)
    model_path = getattr(model_config.hf_config, 'name_or_path', '')
    folder = draft_folder(model_config)
    path, _ = scale_file(model_path) if folder is None else draft_file(folder)
    if fmt is None or path is None or not (fmt.needs_scales or fmt.takes_transform):
        return
    file = rotations.usable(read_file(path), fmt)
    if file is None:
        return
    check_origin(file, fmt, model_path)
    hybrid = getattr(model_config.llm_config or model_config.hf_config, 'layer_types', None) is not None
    held = file.layers if fmt.needs_scales else file.transforms
    layers = range(model_config.num_layers)
    expected = [n for n in held if n in layers] if hybrid else layers  # which layers attend is known once built
    if fmt.needs_scales:
        validate(file, expected, kv_heads(model_config))
    else:
        head_dim = model_config.k_head_dim or model_config.head_dim
        validate_transforms(file, expected, kv_heads(model_config), head_dim)


def check_origin(file: ScaleFile, fmt: KVFormat, model_path: str) -> None:
    """Compare a file's metadata with what is served: another model gets a warning.

    Raises:
        ScaleError: scales made for a wider format: nearly all values would saturate.
    """
    check_format(file, fmt)
    theirs = file.metadata.get('fingerprint')
    if theirs and Path(model_path, 'config.json').is_file() and theirs != fingerprint(model_path):
        logger.warning(f'lmdeploy_kvq: scale file {file.path} was made for another model '
                       f'({file.metadata.get("model", theirs)}); it is used all the same')


@torch.inference_mode()  # LMDeploy makes its buffers inference tensors
def apply(module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor, store: ModelScales) -> None:
    """Fill a layer's buffers in place: CUDA graphs keep their addresses. A first per-head scale makes a new buffer."""
    for name, scale in (('k_scale', k), ('v_scale', v)):
        buffer, part = getattr(module, name), shard(scale, *store.heads)
        if buffer.shape != part.shape and part.dim() == 0:
            part = part.expand(buffer.shape)
        if buffer.shape == part.shape:
            buffer.copy_(part)
        else:
            setattr(module, name, part.to(buffer.device))


def shown(scales: LayerScales, name: str) -> tuple[str, str, str]:
    """A row of the audit behind its name: K scale, V scale, source."""
    k, v, source = scales.resolved(name)
    return _text(k), _text(v), source


def _text(scale: torch.Tensor) -> str:
    return f'{float(scale):.6g}' if scale.numel() == 1 else f'{float(scale.min()):.6g}..{float(scale.max()):.6g}'


def report(fmt: KVFormat, audit: list[tuple[str, str, str, str]], path: str | None) -> None:
    """Log the audit."""
    width = max((len(row[0]) for row in audit), default=0)
    lines = [f'{name:<{width}}  k_scale {k:<12}  v_scale {v:<12}  {source}' for name, k, v, source in audit]
    logger.info('lmdeploy_kvq: scales of %s%s\n%s', fmt.name, f' from {path}' if path else '', '\n'.join(lines))
    warning = default_warning(fmt, audit)
    if warning:
        logger.warning(f'lmdeploy_kvq: {warning}')


def default_warning(fmt: KVFormat, audit: list[tuple[str, str, str, str]]) -> str | None:
    """What to say of layers that fall back to 1.0; None where there are none, or the format has range to spare."""
    defaults = sum(row[3] == 'default' for row in audit)
    if not defaults or not fmt.needs_scales or fmt.key.codec.qmax >= MAX_INPUT / 2:
        return None
    return (f'{defaults} of {len(audit)} layers have no {fmt.name} scale and use 1.0; values beyond '
            f'{fmt.key.codec.qmax:g} saturate. Run lmdeploy-kvq calibrate MODEL -o MODEL/{FILE_NAME}, pass --kv-scales '
            'PATH, or use fp8_per_token_head, which needs no scales.')
