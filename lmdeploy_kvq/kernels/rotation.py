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
def rotate_columns(x_ptr, offset, valid, matrix_ptr, D: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr,
                   PARTS: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr):
    """Rows [D] at ``x_ptr + offset``, clamped to LIMIT, as columns that a matrix is multiplied with.

    Args:
        offset, valid: [columns].
        matrix_ptr: fp16 [D, D], contiguous.

    Returns:
        The product's parts, fp32 [BLOCK_P, columns] each, zero beyond PART and D.
    """
    byte = tl.arange(0, BLOCK_P)
    dim = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + offset[None, :] + dim[:, None], mask=valid[None, :] & (dim < D)[:, None], other=0.0)
    if BLOCK_P * PARTS * BLOCK_D <= 16384:
        # Matrices that fit into registers are on their way while the largest elements are looked for.
        matrices = ()
        for part in tl.static_range(PARTS):
            there = (byte < PART) & (part * PART + byte < D)
            matrices += (tl.load(matrix_ptr + ((part * PART + byte) * D)[:, None] + dim[None, :],
                                 mask=there[:, None] & (dim < D)[None, :], other=0.0), )
    x = tl.minimum(tl.maximum(x.to(tl.float32), -LIMIT), LIMIT)
    power = power_below(tl.max(tl.abs(x), 0))
    inverse = 1.0 / power
    parts = ()
    if BLOCK_P * PARTS * BLOCK_D <= 16384:
        x = (x * inverse[None, :]).to(tl.float16)
        for part in tl.static_range(PARTS):
            parts += (tl.dot(matrices[part], x) * power[None, :], )
    else:
        for part in tl.static_range(PARTS):
            there = (byte < PART) & (part * PART + byte < D)
            out = tl.zeros([BLOCK_P, offset.shape[0]], tl.float32)
            for start in tl.static_range(0, D, 64):
                piece = start + tl.arange(0, 64)
                some = tl.load(x_ptr + offset[None, :] + piece[:, None], mask=valid[None, :] & (piece < D)[:, None],
                               other=0.0).to(tl.float32)
                some = tl.minimum(tl.maximum(some, -LIMIT), LIMIT) * inverse[None, :]
                matrix = tl.load(matrix_ptr + ((part * PART + byte) * D)[:, None] + piece[None, :],
                                 mask=there[:, None] & (piece < D)[None, :], other=0.0)
                out = tl.dot(matrix, some.to(tl.float16), out)
            parts += (out * power[None, :], )
    return parts


@triton.jit
def rotate_back(parts, matrix_ptr, first, D: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr,
                PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Elements first .. first + BLOCK_OUT of rows whose stored parts are ``parts``, fp16 [BLOCK_P, columns] each.

    Args:
        matrix_ptr: the inverse, fp16 [D, D], contiguous.

    Returns:
        fp32 [BLOCK_OUT, columns].
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
