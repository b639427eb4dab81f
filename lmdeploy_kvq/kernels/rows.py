"""Rows that pass a Hadamard matrix on their way from memory to memory without changing lanes.

A Hadamard matrix is the same when the bits of its indices change places. So the 16 elements that meet in a tensor-core
product are chosen so that lanes hold its operand as they read it, 16 bytes side by side, and its result as they write
it, four elements side by side, in whole sectors of 32 bytes or more. Nothing passes through shared memory but the 16 x
16 signs. Columns of the result, one per row, come in an order of their own: :func:`mixed_columns`.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .rotation import butterflies


@triton.jit
def mixed_columns(COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Which row a column of :func:`mix_rows` is, int32 [COLUMNS]."""
    GROUPS: tl.constexpr = max(WARPS, COLUMNS // 8)
    PAIR: tl.constexpr = COLUMNS // (4 * GROUPS)
    column = tl.arange(0, COLUMNS)
    return column // PAIR % GROUPS * (4 * PAIR) + column // (PAIR * GROUPS) * PAIR + column % PAIR


@triton.jit
def load_rows(x_ptr, offset, valid, D: tl.constexpr, WARPS: tl.constexpr):
    """Rows [D] at ``x_ptr + offset`` [rows] in the shape that :func:`mix_rows` takes, D a power of two, 64 or more.

    Eight elements side by side are a lane's, four of those the lanes' that share a row; then come the rows of a warp,
    and other warps' rows. What is left of a row is in the same lanes, but for rows of which a warp has less than eight.
    """
    ROWS: tl.constexpr = offset.shape[0]
    SPREAD: tl.constexpr = max(8 * WARPS // ROWS, 1)
    HIGH: tl.constexpr = D // 32 // SPREAD
    lane = tl.arange(0, 4)[:, None, None, None, None] * 8
    spread = tl.arange(0, SPREAD)[None, :, None, None, None] * 32
    element = tl.arange(0, 8)[None, None, None, :, None]
    high = tl.arange(0, HIGH)[None, None, None, None, :] * (32 * SPREAD)
    ptrs = x_ptr + offset[None, None, :, None, None] + (lane + spread + element + high)
    there = tl.broadcast_to(valid[None, None, :, None, None], (4, SPREAD, ROWS, 8, HIGH))
    return tl.load(ptrs, mask=there, other=0.0)


@triton.jit
def mix_rows(x, signs, WARPS: tl.constexpr, CAP: tl.constexpr):
    """Rows from :func:`load_rows` times the Hadamard matrix, as fp32 [D, rows]; column c is row mixed_columns[c].

    Four elements side by side are in a lane, and eight lanes have 32 of a row. With eight or four rows per warp nothing
    changes lanes.

    Args:
        signs: :func:`hadamard_signs` of 16 in the dtype of ``x``, or in fp32 where CAP is 0.
    """
    SPREAD: tl.constexpr = x.shape[1]
    ROWS: tl.constexpr = x.shape[2]
    HIGH: tl.constexpr = x.shape[4]
    GROUPS: tl.constexpr = max(WARPS, ROWS // 8)
    PAIR: tl.constexpr = ROWS // (4 * GROUPS)
    PRECISION: tl.constexpr = 'ieee' if x.dtype == tl.float32 else 'tf32'
    tl.static_assert(PAIR * SPREAD == 2)  # eight rows per warp, or four
    if CAP == 0:
        x = x.to(tl.float32)  # the interpreter multiplies the bits of bf16
    bits = tl.reshape(x, (4, SPREAD, ROWS, 2, 2, 2, HIGH))
    low = tl.reshape(tl.permute(bits, (5, 0, 3, 6, 4, 2, 1)), (16, 2 * HIGH * ROWS * SPREAD))
    y = tl.dot(signs, low, input_precision=PRECISION)
    # From the lowest bit of an element's number to the highest however rows are held: what is rounded is the same.
    y = butterflies(y, SPREAD * ROWS, 2)
    y = butterflies(y, 1, SPREAD)
    y = butterflies(y, 2 * SPREAD * ROWS, HIGH)
    bits = tl.reshape(y, (2, 4, 2, HIGH, 2, GROUPS, 4, PAIR, SPREAD))
    return tl.reshape(tl.permute(bits, (3, 8, 1, 2, 4, 0, 6, 5, 7)), (32 * SPREAD * HIGH, ROWS))


@triton.jit
def by_lanes(x, WARPS: tl.constexpr):
    """Numbers of rows, [rows] as :func:`mixed_columns` orders them, in a shape for :func:`store_mixed` to broadcast.

    What the compiler knows of multiples ends here: addresses are to be multiplied from what comes out, not to go in.
    """
    GROUPS: tl.constexpr = max(WARPS, x.shape[0] // 8)
    return tl.reshape(x, (4, 1, 1, GROUPS, x.shape[0] // (4 * GROUPS), 1))


@triton.jit
def store_mixed(row_ptrs, x, mask):
    """Store columns x [n, rows] of :func:`mix_rows`, n a multiple of 4: in a shape for which lanes have theirs.

    Args:
        row_ptrs, mask: of the rows, :func:`by_lanes`.
    """
    LANES: tl.constexpr = min(8, x.shape[0] // 4)
    HIGH: tl.constexpr = x.shape[0] // (4 * LANES)
    GROUPS: tl.constexpr = row_ptrs.shape[3]
    PAIR: tl.constexpr = row_ptrs.shape[4]
    lane = tl.arange(0, 8)[None, :, None, None, None, None]
    element = tl.arange(0, 4)[None, None, :, None, None, None]
    high = tl.arange(0, HIGH)[None, None, None, None, None, :] * (4 * LANES)
    values = tl.reshape(x, (HIGH, LANES, 4, 4, GROUPS, PAIR))
    if LANES < 8:  # eight lanes have them, twice or more
        values = tl.broadcast_to(values[:, None], (HIGH, 8 // LANES, LANES, 4, 4, GROUPS, PAIR))
        values = tl.reshape(values, (HIGH, 8, 4, 4, GROUPS, PAIR))
        mask = mask & (lane < LANES)
    values = tl.permute(values, (3, 1, 2, 4, 5, 0))
    tl.store(row_ptrs + (lane * 4 + element + high), values, mask=tl.broadcast_to(mask, values.shape))


@triton.jit
def store_of_rows(ptrs, x, mask, WARPS: tl.constexpr):
    """Store a number of each row, x [rows], like :func:`store_mixed`: each by one of the lanes that have it."""
    lane = tl.arange(0, 8)[None, :, None, None, None, None]
    values = tl.broadcast_to(by_lanes(x, WARPS), (4, 8, 1, ptrs.shape[3], ptrs.shape[4], 1))
    tl.store(ptrs + lane * 0, values, mask=mask & (lane == 0))
