"""Linear maps of rows in kernels, of a few columns [dim, columns]: by butterflies, or a matrix on tensor cores.

The Hadamard matrix of a power of two is a product of small ones: 16 elements meet in one tensor-core product with signs
that are made in registers, and sums and differences within a lane do the rest. Any other matrix is read, [dim, dim] in
fp16; columns then become fp16 as multiples of a power of two near their largest element, so that any bf16 row fits.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

    from ..transforms import Transform


def operand(transform: Transform | None, inverse: bool = False) -> tuple[torch.Tensor | None, int, float]:
    """What kernels multiply with: a matrix (transposed unless ``inverse``) and its stride, or a factor of butterflies.

    Returns:
        (matrix, elements from head to head, factor): None and 0 where there is no matrix, 0.0 no butterflies.
    """
    if transform is None or transform.factors[inverse]:
        return None, 0, transform.factors[inverse] if transform else 0.0
    return transform.inverse if inverse else transform.forward_t, transform.stride_h, 0.0


@triton.jit
def butterflies(y, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Sums and differences of columns of y [16, n], where they were: those STEP apart, then twice as far, and so on.

    COUNT: columns that meet by all these steps, a power of two up to 32; 1: none, and no step.
    """
    ROWS: tl.constexpr = y.shape[0]
    COLUMNS: tl.constexpr = y.shape[1]
    tl.static_assert(COUNT <= 32)
    for level in tl.static_range(5):
        if 2**level < COUNT:
            pairs = tl.reshape(y, (ROWS, COLUMNS // (STEP * 2**(level + 1)), 2, STEP * 2**level))
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            y = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (ROWS, COLUMNS))
    return y


@triton.jit
def hadamard_signs(FACTOR: tl.constexpr, DTYPE: tl.constexpr, zero, SIZE: tl.constexpr = 16):
    """The Hadamard matrix of 16 or 32, entries +-FACTOR. ``zero``: 0, see :func:`hadamard_columns`."""
    row = tl.arange(0, SIZE) + zero
    both = row[:, None] & row[None, :]
    if SIZE > 16:
        both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    negative = ((both ^ (both >> 1)) & 1) != 0  # by the parity of the bits that row and column share
    return tl.where(negative, -FACTOR, FACTOR).to(DTYPE)


@triton.jit
def rounded(x, CAP: tl.constexpr):
    """fp32 rounded to what tf32 holds, 11 bits of it. The interpreter multiplies all bits."""
    if CAP > 0:
        x = tl.inline_asm_elementwise('cvt.rna.tf32.f32 $0, $1;', '=r,r', [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def hadamard_columns(x, FACTOR: tl.constexpr, zero, WARPS: tl.constexpr, CAP: tl.constexpr):
    """Columns x, fp32 [D, columns], D a power of two, times the Hadamard matrix of entries +-FACTOR, a power of two.

    Columns are rounded to tf32, which holds as much of any number as fp16 would, without a power of two to be found
    first; then products are exact, and sums fp32. Nothing but the operand changes lanes: two warps have eight columns
    each, or each half of them and a pair of elements in a lane; two more have other elements of the product.

    Args:
        zero: 0. In a loop, a scalar of which the compiler does not know it: else it makes the signs before the loop,
            and keeps them in registers that the loop has no use for.
    """
    COLUMNS: tl.constexpr = x.shape[1]
    LOW: tl.constexpr = 32 if WARPS > 2 else 16
    PAIR: tl.constexpr = 2 if WARPS > 1 and COLUMNS == 8 else 1
    HIGH: tl.constexpr = x.shape[0] // (LOW * PAIR)
    apart = tl.reshape(rounded(x, CAP), (HIGH, PAIR, LOW, COLUMNS))
    low = tl.reshape(tl.permute(apart, (2, 0, 3, 1)), (LOW, HIGH * COLUMNS * PAIR))
    y = tl.dot(hadamard_signs(FACTOR, x.dtype, zero, LOW), low, input_precision='tf32')
    y = butterflies(y, 1, PAIR)
    y = butterflies(y, COLUMNS * PAIR, HIGH)
    return tl.reshape(tl.permute(tl.reshape(y, (LOW, HIGH, COLUMNS, PAIR)), (1, 3, 0, 2)), x.shape)


@triton.jit
def load_columns(x_ptr, offset, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [D] at ``x_ptr + offset`` [columns] as they are, [BLOCK_D, columns]."""
    dim = tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + offset[None, :] + dim[:, None], mask=valid[None, :] & (dim < D)[:, None], other=0.0)


@triton.jit
def saturate(x, LIMIT: tl.constexpr, CAP: tl.constexpr):
    """Numbers clamped to +-LIMIT, which their dtype holds; NaN becomes -LIMIT. Two 16-bit numbers at a time."""
    if CAP == 0 or x.dtype == tl.float32:
        return tl.minimum(tl.maximum(x, -LIMIT), LIMIT).to(x.dtype)
    elif x.dtype == tl.float16:
        return tl.inline_asm_elementwise('max.f16x2 $0, $1, $2; min.f16x2 $0, $0, $3;', '=&r,r,r,r',
                                         [x, tl.full([1, 1], -LIMIT, tl.float16), tl.full([1, 1], LIMIT, tl.float16)],
                                         dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise('max.bf16x2 $0, $1, $2; min.bf16x2 $0, $0, $3;', '=&r,r,r,r',
                                         [x, tl.full([1, 1], -LIMIT, tl.bfloat16),
                                          tl.full([1, 1], LIMIT, tl.bfloat16)],
                                         dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def split_parts(x, PARTS: tl.constexpr):
    """Parts of columns x [D, columns], D / PARTS elements each, as a tuple."""
    PART: tl.constexpr = x.shape[0] // PARTS
    COLUMNS: tl.constexpr = x.shape[1]
    if PARTS == 1:
        parts = (x, )
    elif PARTS == 2:
        parts = tl.split(tl.permute(tl.reshape(x, (2, PART, COLUMNS)), (1, 2, 0)))
    else:
        tl.static_assert(PARTS == 4)
        even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, PART, COLUMNS)), (2, 3, 0, 1)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def join_parts(parts, PARTS: tl.constexpr):
    """The inverse of :func:`split_parts`."""
    PART: tl.constexpr = parts[0].shape[0]
    COLUMNS: tl.constexpr = parts[0].shape[1]
    if PARTS == 1:
        x = parts[0]
    elif PARTS == 2:
        x = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (2, 0, 1)), (2 * PART, COLUMNS))
    else:
        tl.static_assert(PARTS == 4)
        even, odd = tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])
        x = tl.reshape(tl.permute(tl.join(even, odd), (2, 3, 0, 1)), (4 * PART, COLUMNS))
    return x


@triton.jit
def power_below(largest):
    """The power of two at or below positive fp32 numbers; at least 2^-126."""
    power = (largest.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 1.1754943508222875e-38)


@triton.jit
def normalize_columns(parts, PARTS: tl.constexpr):
    """Columns, of any float type and in parts, as fp16: divided by a power of two near their largest element.

    Returns:
        (parts, power): the latter fp32 [columns].
    """
    largest = tl.max(tl.abs(parts[0].to(tl.float32)), 0)
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.max(tl.abs(parts[part].to(tl.float32)), 0))
    power = power_below(largest)
    inverse = 1.0 / power
    normalized = ()
    for part in tl.static_range(PARTS):
        normalized += ((parts[part].to(tl.float32) * inverse[None, :]).to(tl.float16), )
    return normalized, power


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
    x = load_columns(x_ptr, offset, valid, D, BLOCK_D)
    if BLOCK_P * PARTS * BLOCK_D <= 16384:
        # Matrices that fit into registers are on their way while the largest elements are looked for.
        matrices = ()
        for part in tl.static_range(PARTS):
            there = (byte < PART) & (part * PART + byte < D)
            matrices += (tl.load(matrix_ptr + ((part * PART + byte) * D)[:, None] + dim[None, :],
                                 mask=there[:, None] & (dim < D)[None, :], other=0.0), )
    x = tl.minimum(tl.maximum(x.to(tl.float32), -LIMIT), LIMIT)
    normalized, power = normalize_columns((x, ), 1)
    parts = ()
    if BLOCK_P * PARTS * BLOCK_D <= 16384:
        for part in tl.static_range(PARTS):
            parts += (tl.dot(matrices[part], normalized[0]) * power[None, :], )
    else:
        inverse = 1.0 / power
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
