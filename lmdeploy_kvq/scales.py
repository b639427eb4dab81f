"""Static KV scales: their names in checkpoints, the rules that resolve them, scale files, validation, sharding.

A scale is what codes are multiplied with; a static format (``fp8``) has one for K and one for V per layer, or one per
KV head. The names and rules are vLLM's KV-cache scale loading; the file is safetensors with the keys
``model.layers.N.self_attn.{k,v}_scale``, or the JSON of vLLM's and SGLang's ``kv_cache_scales.json``. The safetensors
file also holds ``k_transform``, the matrices of formats whose K is rotated by a calibrated one.
"""
from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .console import reason, replacing
from .formats import FORMATS, KVFormat
from .transforms import TransformError, digest_of, from_matrix

MISSING = -1.0
"""The value by which a checkpoint says that a scale was never set."""

FILE_NAME = 'kv_scales.safetensors'
"""The scale file that is found by itself beside a model."""

_TAILS = {
    'k': ('k_scale', 'k_proj.output_scale', 'k_cache.scale'),
    'v': ('v_scale', 'v_proj.output_scale', 'v_cache.scale'),
    'kv': ('kv_scale', ),
    'unused': ('q_scale', 'prob_scale', 'prob_output_scale', 'q_proj.output_scale'),
    'zero point': ('k_zero_point', 'v_zero_point', 'kv_zero_point', 'k_proj.output_zero_point',
                   'v_proj.output_zero_point', 'k_cache.zero_point', 'v_cache.zero_point'),
}
_KINDS = {tail: kind for kind, tails in _TAILS.items() for tail in tails}
_FILE_KEY = re.compile(r'model\.layers\.(\d+)\.self_attn\.(k_scale|v_scale|k_transform)')


class ScaleError(ValueError):
    """A scale that cannot be used; the message names layer and value."""


@dataclass(frozen=True)
class ScaleName:
    """A checkpoint's name of a scale, taken apart.

    Attributes:
        owner: dotted name of the module it stands under, e.g. ``model.layers.0.self_attn``.
        kind: ``k``, ``v``, ``kv`` (one for both), ``unused`` (queries and probabilities) or ``zero point``.
    """
    owner: str
    kind: str


def parse_name(name: str) -> ScaleName | None:
    """Take a checkpoint's tensor name apart; None if it is no scale of the KV cache.

    ``*.k_scale`` may stand under the attention module, under its projections (``k_proj.k_scale``,
    ``qkv_proj.k_scale``) or under an ``attn`` below it; weights' own scales (``k_proj.weight_scale``,
    ``k_proj.input_scale``) are not of the cache.
    """
    parts = name.split('.')
    for count in (2, 1):
        kind = _KINDS.get('.'.join(parts[-count:])) if len(parts) > count else None
        if kind is not None:
            return ScaleName('.'.join(parts[:-count]), kind)
    return None


@dataclass(frozen=True)
class LayerScales:
    """What was found for one layer, unchecked: only a policy with static scales minds what is wrong with them.

    Attributes:
        k, v: scale of K and of V; kv: one for both; None where nothing was found. A file's may be one per KV head.
        zero_point: name of a zero point that is not zero; None: there is none.
        source: where they come from: ``file``, ``checkpoint``, ``calibrated`` (a file that calibration wrote, or found
            while serving), or ``pending`` (to be found while serving).
    """
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    kv: torch.Tensor | None = None
    zero_point: str | None = None
    source: str = 'checkpoint'

    def add(self, kind: str, name: str, tensor: torch.Tensor) -> LayerScales:
        """These scales and one more tensor of the checkpoint.

        Args:
            kind: of :class:`ScaleName`.
            name: the tensor's name in the checkpoint.
            tensor: its value, any dtype and device.
        """
        if kind == 'unused':
            return self
        if kind == 'zero point':
            return replace(self, zero_point=name) if torch.count_nonzero(tensor) else self
        scale = tensor.detach().float().cpu()
        found: dict[str, Any] = {kind: scale.reshape(()) if scale.numel() == 1 else scale}
        return replace(self, **found)

    def resolved(self, layer: str) -> tuple[torch.Tensor, torch.Tensor, str]:
        """fp32 K scale, V scale and their source: missing ones take the other's value, none at all means 1.0.

        Raises:
            ScaleError: a value that is zero, negative, NaN or infinite, a zero point, or several values where there
                must be one.
        """
        if self.zero_point is not None:
            raise ScaleError(f'{layer}: {self.zero_point} is not zero; KV caches with zero points are not supported')
        for what, scale in (('k_scale', self.k), ('v_scale', self.v), ('kv_scale', self.kv)):
            if scale is None or _is_missing(scale):
                continue
            if self.source == 'checkpoint' and scale.numel() != 1:
                raise ScaleError(f'{layer}: {what} has {scale.numel()} elements ({tuple(scale.shape)}); per-tensor '
                                 f'scales only. Scales per KV head can come from a scale file ({FILE_NAME}); '
                                 'per-token-head formats need none')
            check_value(layer, what, scale)
        k, v = (found if found is not None else self.kv for found in (self.k, self.v))
        k, v = (None if x is None or _is_missing(x) else x for x in (k, v))
        k, v = (k if k is not None else v), (v if v is not None else k)
        if k is None or v is None:
            one = torch.ones((), dtype=torch.float32)
            return one, one, 'default'
        return k, v, self.source


def _is_missing(scale: torch.Tensor) -> bool:
    return scale.numel() == 1 and float(scale) == MISSING


def check_value(layer: str, what: str, scale: torch.Tensor) -> None:
    """Raise ScaleError unless every value is a positive, finite number."""
    bad = [float(x) for x in scale.flatten().float() if not (math.isfinite(x) and x > 0)]
    if bad:
        raise ScaleError(f'{layer}: {what} is {bad[0]:g}; scales must be positive and finite')


@dataclass
class ScaleFile:
    """The contents of a scale file.

    Attributes:
        layers: layer index to its scales.
        transforms: layer index to K's matrices, fp32 [kv_heads, head_dim, head_dim]; see
            :func:`~lmdeploy_kvq.transforms.from_matrix`.
        metadata: strings: format, model fingerprint, data, date; what the file has.
        path: where it was read from.
    """
    layers: dict[int, LayerScales]
    metadata: dict[str, str] = field(default_factory=dict)
    path: str = ''
    transforms: dict[int, torch.Tensor] = field(default_factory=dict)


def read_file(path: str | Path) -> ScaleFile:
    """Read a safetensors scale file, or the JSON of vLLM and SGLang.

    Raises:
        ScaleError: a file that is missing, damaged, or holds anything else than scales.
    """
    path = Path(path)
    if not path.is_file():
        raise ScaleError(f'scale file {path} does not exist')
    try:
        return _read_json(path) if path.suffix == '.json' else _read_safetensors(path)
    except ScaleError:
        raise
    except Exception as error:  # safetensors and json have their own; what the user needs is the file's name
        raise ScaleError(f'scale file {path} cannot be read: {reason(error)}') from error


def _read_safetensors(path: Path) -> ScaleFile:
    from safetensors import safe_open
    layers: dict[int, LayerScales] = {}
    transforms: dict[int, torch.Tensor] = {}
    with safe_open(path, framework='pt') as file:
        # What a damaged header holds is printed: in messages of one line, and in tables.
        metadata = {key: text if text.isprintable() else ascii(text) for key, text in (file.metadata() or {}).items()}
        empty = LayerScales(source='calibrated' if 'method' in metadata else 'file')
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            match = _FILE_KEY.fullmatch(key)
            if match is None:
                if key.endswith(('k_scale', 'v_scale', 'transform')):
                    raise ScaleError(f'scale file {path}: unknown key {key!r}; scales are named '
                                     'model.layers.N.self_attn.k_scale and v_scale, transforms k_transform')
                continue  # statistics kept beside the scales
            layer, tensor = int(match[1]), file.get_tensor(key).float()
            if match[2] == 'k_transform':
                transforms[layer] = tensor
            else:
                found: dict[str, Any] = {match[2][0]: tensor}
                layers[layer] = replace(layers.get(layer, empty), **found)
    whole = ScaleFile(layers, metadata, str(path), transforms)
    written, here = metadata.get('scale_digest'), digest_of_scales({n: (x.k, x.v) for n, x in layers.items()})
    if written and written != here:
        raise ScaleError(f'scale file {path}: the scales are not those that calibration wrote (digest {here}, written '
                         f'{written}); the file is damaged, or was changed')
    return whole


def _read_json(path: Path) -> ScaleFile:
    """``{"kv_cache": {"dtype": ..., "scaling_factor": {"RANK": {"LAYER": scale}}}}``: one for K and V.

    Several tensor-parallel ranks give one value per rank, i.e. per group of KV heads.
    """
    content = json.loads(path.read_text(encoding='utf-8'))
    layers = {}
    try:
        ranks = content['kv_cache']['scaling_factor']
        tables = [ranks[str(rank)] for rank in range(len(ranks))]
        for layer in tables[0]:
            values = torch.tensor([float(table[layer]) for table in tables], dtype=torch.float32)
            layers[int(layer)] = LayerScales(kv=values[0] if len(values) == 1 else values, source='file')
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ScaleError(f'scale file {path} holds no scales: {{"kv_cache": {{"scaling_factor": {{RANK: {{LAYER: '
                         f'scale}}}}}}}} is needed ({reason(error)})') from error
    return ScaleFile(layers, {'format': 'vllm-json'}, str(path))


def check_format(file: ScaleFile, fmt: KVFormat) -> None:
    """See that a file's scales were not made for a wider format than ``fmt``: nearly all values would saturate.

    Raises:
        ScaleError: they were; says what to do.
    """
    made_for = next((f for f in FORMATS if f.name == file.metadata.get('format')), fmt)
    wider = made_for.key.codec.qmax > fmt.key.codec.qmax or made_for.value.codec.qmax > fmt.value.codec.qmax
    if wider and fmt.needs_scales and made_for.needs_scales:
        raise ScaleError(f'scale file {file.path} is for {made_for.name}, whose codes reach further than those of '
                         f'{fmt.name}; run lmdeploy-kvq calibrate --format {fmt.name}, or serve {made_for.name}')


def write_file(path: str | Path, layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
               metadata: Mapping[str, str],
               statistics: Mapping[int, Mapping[str, torch.Tensor]] | None = None) -> None:
    """Write a safetensors scale file, complete or not at all.

    Args:
        path: where to.
        layers: layer index to (K scale, V scale), each a scalar or [kv_heads]; empty where only transforms are kept.
        metadata: strings to keep with them: format, model, fingerprint, data, date.
        statistics: layer index to further tensors by name: ``k_transform``, and others, which :func:`read_file` skips;
            no name ends like a scale's.

    Raises:
        ScaleError: scales that are not positive and finite.
    """
    from safetensors.torch import save_file
    tensors = {}
    statistics = statistics or {}
    for layer in sorted({*layers, *statistics}):
        named = dict(zip(('k_scale', 'v_scale'), layers.get(layer, ())))
        for what, scale in named.items():
            check_value(f'layer {layer}', what, scale)
        for what, tensor in {**statistics.get(layer, {}), **named}.items():
            tensors[f'model.layers.{layer}.self_attn.{what}'] = tensor.detach().float().cpu().contiguous().clone()
    about = {**metadata, 'scale_digest': digest_of_scales(layers)} if layers else dict(metadata)
    with replacing(Path(path)) as unfinished:
        save_file(tensors, str(unfinished), metadata=about)


def digest_of_scales(layers: Mapping[int, tuple[torch.Tensor | None, torch.Tensor | None]]) -> str:
    """Short hash of layer indices, and of K and V scales with their shapes: a damaged file looks like any other."""
    digest = hashlib.sha256()
    for layer, pair in sorted(layers.items()):
        for scale in pair:
            digest.update(f'{layer} {None if scale is None else tuple(scale.shape)} '.encode())
            if scale is not None:
                digest.update(scale.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def provenance(folder: str | Path, fmt: KVFormat, tokens: int, **about: str) -> dict[str, str]:
    """Metadata of a scale file that calibration writes.

    Args:
        folder: the model.
        fmt: what the file is for.
        tokens: seen.
        about: method and granularity where there are scales, data, engine, partial, and what else there is to say.
    """
    return {'format': fmt.name, 'model': Path(folder).name, 'fingerprint': fingerprint(folder), 'tokens': str(tokens),
            'date': time.strftime('%Y-%m-%d', time.gmtime()), **about}


def fingerprint(folder: str | Path) -> str:
    """Short hash of what a model is: its config.json and the index or headers of its safetensors, no weights.

    Models of one architecture and shape whose weights alone differ (fine-tunings) have the same.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for path in (folder / 'config.json', folder / 'model.safetensors.index.json'):
        if path.is_file():
            digest.update(path.read_bytes())
    for path in sorted(folder.glob('model*.safetensors')):
        with path.open('rb') as file:  # the format: 8 bytes of length, little endian, then a JSON header
            digest.update(file.read(int.from_bytes(file.read(8), 'little')))
    return digest.hexdigest()[:16]


def _check_layers(file: ScaleFile, one: str, many: str, found: Mapping[int, Any], layers: Iterable[int]) -> None:
    """Raise ScaleError unless ``found`` has the model's layers and no others; one, many: what it has for them."""
    expected = set(layers)
    for what, wrong in ((f'has no {one} for', expected - found.keys()),
                        (f'has {many} for unknown', found.keys() - expected)):
        if wrong:
            raise ScaleError(f'scale file {file.path} {what} layer{"s" if len(wrong) > 1 else ""} '
                             f'{", ".join(map(str, sorted(wrong)))}; the model has {len(expected)} attention layers')


def validate(file: ScaleFile, layers: Iterable[int], num_kv_heads: int) -> None:
    """Check a scale file against a model, before the model is loaded.

    Args:
        file: the file.
        layers: indices of the model's attention layers.
        num_kv_heads: KV heads of the whole model.

    Raises:
        ScaleError: missing or extra layers, wrong shapes, values that are not positive and finite.
    """
    _check_layers(file, 'scales', 'scales', file.layers, layers)
    for layer, scales in sorted(file.layers.items()):
        for what, scale in (('k_scale', scales.k), ('v_scale', scales.v), ('kv_scale', scales.kv)):
            if scale is None:
                continue
            count = scale.numel()
            if scale.dim() > 1 or (count != 1 and count != num_kv_heads
                                   and not (what == 'kv_scale' and num_kv_heads % count == 0)):
                raise ScaleError(f'scale file {file.path}: layer {layer}: {what} has shape {tuple(scale.shape)}; a '
                                 f'scalar or one value per KV head ([{num_kv_heads}]) is needed')
            check_value(f'scale file {file.path}: layer {layer}', what, scale)
        scales.resolved(f'layer {layer}')


def validate_transforms(file: ScaleFile, layers: Iterable[int], num_kv_heads: int, head_dim: int) -> None:
    """Check a file's transforms of K against a model, before the model is loaded.

    Raises:
        ScaleError: missing or extra layers, wrong shapes, matrices that cannot be used, or others than were written.
    """
    _check_layers(file, 'transform', 'transforms', file.transforms, layers)
    shape = (num_kv_heads, head_dim, head_dim)
    for layer, matrix in sorted(file.transforms.items()):
        what = f'scale file {file.path}: layer {layer}: k_transform'
        if tuple(matrix.shape) != shape:
            raise ScaleError(f'{what} has shape {tuple(matrix.shape)}; the model needs {shape}: KV heads, head_dim, '
                             'head_dim')
        try:
            from_matrix(matrix, what)
        except TransformError as error:
            raise ScaleError(str(error)) from error
    written = file.metadata.get('transform_digest')
    if written and written != digest_of(file.transforms):
        raise ScaleError(f'scale file {file.path}: the transforms are not those that calibration wrote (digest '
                         f'{digest_of(file.transforms)}, written {written})')


def shard(scale: torch.Tensor, num_kv_heads: int, rank: int, world_size: int) -> torch.Tensor:
    """One tensor-parallel rank's part of a scale: scalars as they are, what is per head split like the heads.

    With fewer KV heads than ranks, heads are replicated: rank r serves head ``r * num_kv_heads // world_size``.

    Args:
        scale: scalar, [num_kv_heads, ...], or one value per equal group of KV heads.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    heads = scale.repeat_interleave(num_kv_heads // scale.size(0), 0)
    if num_kv_heads < world_size:
        first = rank * num_kv_heads // world_size
        return heads[first:first + 1]
    size = num_kv_heads // world_size
    return heads[rank * size:(rank + 1) * size]
