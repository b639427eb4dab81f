"""Queries of a decode step, rotated once per token as K is, for the fill's programs that K and V leave over."""
from __future__ import annotations

import triton
import triton.language as tl

from .rotation import hadamard_signs, normalize_columns, rotate_columns
from .rows import by_lanes, load_rows, mix_rows, mixed_columns, store_mixed, store_of_rows

QUERY_TAIL = tl.constexpr(16)
"""fp16 words behind a rotated query: an fp32 number, and padding, for Triton reads 16 bytes at once only if it knows
strides to be multiples of 16."""


@triton.jit
def _query_rows(column, num_rows, kv_head, stride_t, stride_h, HEADS_PER_KV: tl.constexpr):
    """Token, head, offset and validity of query rows ``column`` of a KV head."""
    head = kv_head * HEADS_PER_KV + column % HEADS_PER_KV
    token = (column // HEADS_PER_KV).to(tl.int64)
    return token, head, token * stride_t + head * stride_h, column < num_rows


@triton.jit
def rotate_queries(query_ptr, rotated_ptr, matrix_ptr, kv_head, first, num_rows, stride_t, stride_h, num_heads,
                   HADAMARD: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   ROWS: tl.constexpr, WARPS: tl.constexpr, CAP: tl.constexpr):
    """Write queries times the inverse of K's matrix, transposed, or by butterflies, as decode multiplies with them.

    Rows of [tokens, heads, D + QUERY_TAIL]: D fp16 numbers, the row divided by a power of two near its largest element,
    so that any fits; then, in fp32, the power.
    """
    token, head, offset, valid = _query_rows(first + tl.arange(0, ROWS), num_rows, kv_head, stride_t, stride_h,
                                             HEADS_PER_KV)
    if HADAMARD != 0:
        signs = hadamard_signs(HADAMARD, query_ptr.dtype.element_ty if CAP > 0 else tl.float32, 0)
        raw = load_rows(query_ptr, offset, valid, D, WARPS)
        token, head, offset, valid = _query_rows(first + mixed_columns(ROWS, WARPS), num_rows, kv_head, stride_t,
                                                 stride_h, HEADS_PER_KV)
        rotated = mix_rows(raw, signs, WARPS, CAP)
    else:
        rotated = rotate_columns(query_ptr, offset, valid, matrix_ptr, D, D, BLOCK_D, 1, BLOCK_D, float('inf'))[0]
    stored, power = normalize_columns((rotated, ), 1)
    row = token * num_heads + head
    if HADAMARD != 0:
        row, valid = by_lanes(row, WARPS), by_lanes(valid, WARPS)
    row_ptrs = rotated_ptr + row * (D + QUERY_TAIL)
    power_ptrs = (row_ptrs + D).to(tl.pointer_type(tl.float32))
    if HADAMARD != 0:
        store_mixed(row_ptrs, stored[0], valid)
        store_of_rows(power_ptrs, power, valid, WARPS)
    else:
        dim = tl.arange(0, BLOCK_D)
        tl.store(row_ptrs[None, :] + dim[:, None], stored[0], mask=valid[None, :] & (dim < D)[:, None])
        tl.store(power_ptrs, power, mask=valid)
