"""Linear maps of rows in kernels: a square fp16 matrix times a few columns [dim, columns], on tensor cores.

The columns become fp16 as multiples of a power of two near their largest element, so that any bf16 row fits.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_below(largest):
    """The power of two at or below positive fp32 numbers; at least 2^-126."""
    power = (largest.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 1.1754943508222875e-38)


@triton.jit
def column_power(x_ptr, offset, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr):
    """[columns] powers of two that rows [D] at ``x_ptr + offset``, clamped to LIMIT, are to be divided by."""
    dim = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + offset[None, :] + dim[:, None], mask=valid[None, :] & (dim < D)[:, None], other=0.0)
    return power_below(tl.minimum(tl.max(tl.abs(x.to(tl.float32)), 0), LIMIT))


@triton.jit
def rotated_part(x_ptr, offset, valid, power, matrix_ptr, FIRST: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
                 BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr):
    """Elements FIRST .. FIRST + PART of ``matrix @ column``, fp32 [BLOCK_P, columns], zero beyond PART and D.

    Args:
        x_ptr, offset, valid, power, LIMIT: as for :func:`column_power`.
        matrix_ptr: fp16 [D, D], contiguous.
    """
    STEP: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D
    byte = tl.arange(0, BLOCK_P)
    there = (byte < PART) & (FIRST + byte < D)
    out = tl.zeros([BLOCK_P, offset.shape[0]], tl.float32)
    inverse = 1.0 / power
    for start in tl.static_range(0, D, STEP):
        dim = start + tl.arange(0, STEP)
        x = tl.load(x_ptr + offset[None, :] + dim[:, None], mask=valid[None, :] & (dim < D)[:, None],
                    other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT) * inverse[None, :]
        matrix = tl.load(matrix_ptr + ((FIRST + byte) * D)[:, None] + dim[None, :],
                         mask=there[:, None] & (dim < D)[None, :], other=0.0)
        out = tl.dot(matrix, x.to(tl.float16), out)
    return out * power[None, :]


@triton.jit
def rotate_back(parts, matrix_ptr, first, D: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr,
                PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Elements first .. first + BLOCK_OUT of ``inverse.T @ column``, fp32 [BLOCK_OUT, columns].

    Args:
        parts: fp16 [BLOCK_P, columns] each: the column's parts.
        matrix_ptr: the inverse, fp16 [D, D], contiguous.
    """
    dim = first + tl.arange(0, BLOCK_OUT)
    byte = tl.arange(0, BLOCK_P)
    out = tl.zeros([BLOCK_OUT, parts[0].shape[1]], tl.float32)
    for part in tl.static_range(PARTS):
        stored = part * PART + byte
        there = (byte < PART) & (stored < D)
        matrix = tl.load(matrix_ptr + (stored * D)[None, :] + dim[:, None], mask=there[None, :] & (dim < D)[:, None],
                         other=0.0)
        out = tl.dot(matrix, parts[part], out)
    return out
