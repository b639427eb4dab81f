"""KV caches of other systems, emulated in plain PyTorch: what a row of K or V becomes when it is stored and read.

Written from LMDeploy 0.18.0's kernels (``pytorch/kernels/cuda/fill_kv_cache.py``, ``flatten_kv_cache.py`` and
``turbo_quant.py``) and from the published descriptions of vLLM's formats. LMDeploy keeps scales, zero points and norms
in the model's dtype, bf16 for most and for the one that is measured: so do the emulations. What int8 would be with
fp32 ones is a row of its own.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Rows = Callable[[torch.Tensor], torch.Tensor]
"""fp32 [..., dim] to what reading it back gives."""

# Lloyd-Max codebooks of N(0, 1) by ten iterations on [-3, 3], as LMDeploy's turbo_quant.py has them
LLOYD_MAX = {2: ([0.4527808, 1.5104176], [0.0, 0.9815992]),
             3: ([0.2450942, 0.7560052, 1.3439093, 2.1519456], [0.0, 0.5005497, 1.0499573, 1.7479274])}


def hadamard(dim: int) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard matrix; ``dim`` is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.size(0) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / dim**0.5


def asymmetric(bits: int, kept: torch.dtype = torch.bfloat16) -> Rows:
    """LMDeploy's int8 and int4: from the row's smallest to its largest value, with a zero point that is no integer.

    Codes follow from the exact scale and zero point, and are read with those that were ``kept``.
    """

    def rows(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        zero = -low / scale
        codes = (x / scale + zero + 0.5).trunc()
        return (codes - zero.to(kept).float()) * scale.to(kept).float()

    return rows


def symmetric_int8(x: torch.Tensor) -> torch.Tensor:
    """vLLM's int8 per-token-head: absmax / 127, at least 1e-6."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (x / scale).round().clamp(-128, 127) * scale


def rotated_int4(x: torch.Tensor) -> torch.Tensor:
    """vLLM's int4 per-token-head: random signs, Hadamard, and an integer zero point of 4 bits."""
    dim = x.size(-1)
    signs = torch.randint(0, 2, (dim, ), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    y = x * signs @ hadamard(dim)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = (-low / scale).round().clamp(0, 15)
    return ((y / scale + zero).round().clamp(0, 15) - zero) * scale @ hadamard(dim).T * signs


def lloyd_max(bits: int, residual_sign: bool = False, kept: torch.dtype = torch.bfloat16) -> Rows:
    """Hadamard, division by the norm, and a Lloyd-Max codebook; one more bit may keep the sign of what is left.

    LMDeploy's turbo_quant has 3 bits and the sign for K, 2 bits for V.
    """
    positive, borders = (torch.tensor(x) for x in LLOYD_MAX[bits])
    centroids = torch.cat([-positive.flip(0), positive])
    boundaries = torch.cat([-borders[1:].flip(0), borders])

    def rows(x: torch.Tensor) -> torch.Tensor:
        dim = x.size(-1)
        y = x @ hadamard(dim).T
        norm = (y.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        unit = y / norm * dim**0.5
        near = centroids[torch.bucketize(unit, boundaries)]  # codes count the boundaries below a value
        if residual_sign:
            left = unit - near
            size = left.square().mean(-1, keepdim=True).sqrt().to(kept).float()
            near = near + torch.where(left >= 0, size, -size)
        return near * norm.to(kept).float() / dim**0.5 @ hadamard(dim)

    return rows


@dataclass(frozen=True)
class Emulation:
    """Another system's format.

    Attributes:
        owner, name: whose it is, and what it is called there.
        key, value: what storing does to rows.
        bits: of a K element and of a V element; extra: bits beside the codes of a K row and of a V row.
    """
    owner: str
    name: str
    key: Rows
    value: Rows
    bits: tuple[int, int]
    extra: tuple[int, int]

    def bits_per_element(self, head_dim: int) -> float:
        """Mean stored bits of an element, what is kept per row included."""
        return sum(self.bits) / 2 + sum(self.extra) / 2 / head_dim


EMULATIONS = (
    Emulation('LMDeploy', 'int8', asymmetric(8), asymmetric(8), (8, 8), (32, 32)),
    Emulation('LMDeploy', 'int8, fp32 scales', asymmetric(8, torch.float32), asymmetric(8, torch.float32), (8, 8),
              (64, 64)),
    Emulation('LMDeploy', 'int4', asymmetric(4), asymmetric(4), (4, 4), (32, 32)),
    Emulation('LMDeploy', 'turbo_quant', lloyd_max(3, residual_sign=True), lloyd_max(2), (4, 2), (32, 16)),
    Emulation('vLLM', 'int8_per_token_head', symmetric_int8, symmetric_int8, (8, 8), (32, 32)),
    Emulation('vLLM', 'int4_per_token_head', rotated_int4, rotated_int4, (4, 4), (32, 32)),
    Emulation('Lloyd-Max', 'int2', lloyd_max(2, kept=torch.float32), lloyd_max(2, kept=torch.float32), (2, 2),
              (32, 32)),
)


class EmulatedCache(Cache):
    """A transformers cache that stores and reads like an emulation: every query sees what reading gives."""

    def __init__(self, emulation: Emulation):
        self.emulation = emulation
        super().__init__(layer_class_to_replicate=self._layer)

    def _layer(self) -> DynamicLayer:
        emulation = self.emulation

        class Layer(DynamicLayer):
            def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return super().update(emulation.key(key_states.float()).to(key_states.dtype),
                                      emulation.value(value_states.float()).to(value_states.dtype), *args, **kwargs)

        return Layer()
