"""Transforms of K out of scale files into LMDeploy's attention layers, and the Hadamard ones of all rotated formats."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lmdeploy.utils import get_logger

from .._autoload import SCALES
from ..formats import KVFormat
from ..scales import FILE_NAME, ScaleError, ScaleFile, shard
from ..transforms import digest_of, from_matrix, hadamard
from .asked import requested
from .attention import TRANSFORM

logger = get_logger('lmdeploy')

HADAMARD = 'hadamard'
"""What the audit calls the transform that is there without calibration."""


def usable(file: ScaleFile | None, fmt: KVFormat) -> ScaleFile | None:
    """The file if it holds what the format takes; None for a file beside the model that was made for other formats.

    Raises:
        ScaleError: a file that the user named, without it; or one that calibration while serving would replace.
    """
    if file is None or (file.layers if fmt.needs_scales else file.transforms):
        return file
    if os.environ.get(SCALES, '').strip() == file.path:
        what, how = ('scales', '') if fmt.needs_scales else ('transforms (k_transform)', ' --transform balanced')
        raise ScaleError(f'scale file {file.path} has no {what}, which {fmt.name} would take from it; run lmdeploy-kvq '
                         f'calibrate MODEL --format {fmt.name}{how}, or leave --kv-scales out')
    if fmt.needs_scales and requested() is not None:
        raise ScaleError(f'--kv-calibrate: scale file {file.path} holds transforms and no scales, and would be '
                         'replaced; name another file to write with --kv-scales PATH')
    return None


def attach(fmt: KVFormat, layers: Mapping[str, tuple[int, torch.nn.Module]], heads: tuple[int, int, int],
           file: ScaleFile | None, strict: bool) -> tuple[list[tuple[str, str, str, str]], str]:
    """Give every attention layer the transforms that its pages are written and read with.

    All matrices are on the layer's device when this returns: nothing is copied from the host while CUDA graphs are
    captured.

    Args:
        fmt: the format that is served; one without rotation needs nothing.
        layers: attention module's name to its index and the module.
        heads: KV heads of the whole model, this rank, and the number of ranks.
        file: a checked scale file with transforms, or None for Hadamard.
        strict: refuse Hadamard where a calibrated transform can be used.

    Returns:
        The audit, (layer, K's transform, V's, source) for formats that take a calibrated one; and what identifies the
        transforms, the same on all ranks.

    Raises:
        ScaleError: ``strict`` and no file; TransformError: a matrix that cannot be used.
    """
    if strict and fmt.takes_transform and file is None:
        raise ScaleError(f'--kv-scales strict: no transforms for {fmt.name}; run lmdeploy-kvq calibrate MODEL --format '
                         f'{fmt.name} -o MODEL/{FILE_NAME}, or leave strict out to use Hadamard')
    audit = []
    for name, (index, module) in layers.items():
        impl: Any = module.impl
        device = next(module.buffers()).device  # k_scale's, which every layer has
        for encoding, dim in ((fmt.key, impl.head_size), (fmt.value, impl.v_head_size)):
            if encoding.rotation is not None:
                hadamard(dim, device)
        if file is None or not fmt.takes_transform:
            vars(impl).pop(TRANSFORM, None)
            audit.append((name, HADAMARD, HADAMARD, 'default'))
            continue
        matrix = shard(file.transforms[index], *heads)
        setattr(impl, TRANSFORM, from_matrix(matrix, f'{name}: k_transform').to(device))
        audit.append((name, file.metadata.get('transform', 'given'), HADAMARD,
                      'calibrated' if 'transform' in file.metadata else 'file'))
    identity = HADAMARD if file is None or not fmt.takes_transform else digest_of(file.transforms)
    return audit if fmt.takes_transform else [], identity


def report(fmt: KVFormat, audit: list[tuple[str, str, str, str]], identity: str, path: str | None) -> None:
    """Say where the transforms come from."""
    width = max((len(row[0]) for row in audit), default=0)
    lines = [f'{name:<{width}}  k_transform {k:<10}  {source}' for name, k, _, source in audit]
    logger.info('lmdeploy_kvq: transforms of %s%s, digest %s\n%s', fmt.name, f' from {path}' if path else '', identity,
                '\n'.join(lines))
    if audit and path is None:
        logger.info(f'lmdeploy_kvq: {fmt.name} rotates keys by Hadamard; calibrated transforms lose less: run '
                    f'lmdeploy-kvq calibrate MODEL --format {fmt.name} -o MODEL/{FILE_NAME}')
