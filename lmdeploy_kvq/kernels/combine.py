"""Combining the partial results of a sequence that several decode programs share, without another launch.

Whoever finishes last of up to FAN programs combines what they left, and goes on to the next level of a tree whose
leaves are the programs. Nobody waits for anybody. A counter per node says who is last.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .attend import LOG2E
from .rotation import hadamard_columns, normalize_columns, rotate_back, split_parts

FAN = tl.constexpr(16)
"""Results that one program combines."""

STATISTICS = tl.constexpr(4)
"""fp32 words behind each partial row: its largest score (in units of log2), its sum of probabilities, and padding."""


@triton.jit
def place(element, PARTV: tl.constexpr, BLOCK_PV: tl.constexpr):
    """(offset, whether it is there) of elements of an output whose parts, PARTV long, begin at steps of BLOCK_PV."""
    if PARTV == BLOCK_PV:
        offset, there = element, element >= 0
    else:
        byte = element % BLOCK_PV
        offset, there = element // BLOCK_PV * PARTV + byte, byte < PARTV
    return offset, there


@triton.jit
def store_partial(row_ptrs, mask, m, l, acc, PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr):
    """Leave rows [rows] of a result: the output [PARTSV * BLOCK_PV, rows] and its statistics [rows]."""
    offset, there = place(tl.arange(0, PARTSV * BLOCK_PV), PARTV, BLOCK_PV)
    tl.store(row_ptrs[None, :] + offset[:, None], acc, mask=mask[None, :] & there[:, None])
    tl.store(row_ptrs + PARTSV * PARTV, m, mask=mask)
    tl.store(row_ptrs + PARTSV * PARTV + 1, l, mask=mask)


@triton.jit
def combine_partials(ptr, step, children, PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr,
                     COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """(m, l, acc) of ``children`` results that lie ``step`` elements apart: acc is [PARTSV * BLOCK_PV, COLUMNS].

    AT_ONCE results are read together, statistics and all, for reading is what takes the time: the largest score so far
    is carried as in attention. Reads pass by the first-level cache: other multiprocessors wrote what is read. Columns
    after the last row hold whatever lies behind it.

    Args:
        ptr: the first row of the first result, of COLUMNS rows or fewer.
    """
    # [columns, elements, results]: the compiler gives warps columns, and lanes all results of their elements.
    offset, inside = place(tl.arange(0, PARTSV * BLOCK_PV)[None, :, None], PARTV, BLOCK_PV)
    column = tl.arange(0, COLUMNS)[:, None]
    child = tl.arange(0, AT_ONCE)[None, :]
    m = tl.full([COLUMNS], float('-inf'), tl.float32)
    l = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([COLUMNS, PARTSV * BLOCK_PV], tl.float32)
    for start in tl.range(0, children, AT_ONCE, num_stages=1):
        there = start + child + column * 0 < children
        index = tl.minimum(start + child, children - 1)
        ptrs = ptr + index.to(tl.int64) * step + column * (PARTSV * PARTV + STATISTICS)
        wanted = tl.broadcast_to(there[:, None, :], (COLUMNS, PARTSV * BLOCK_PV, AT_ONCE))
        if PARTV != BLOCK_PV:
            wanted = wanted & inside
        results = tl.load(ptrs[:, None, :] + offset, mask=wanted, other=0.0, cache_modifier='.cg')
        # With its padding, for the compiler reads few numbers anew, one read after the other, in every layout it wants.
        words = tl.load(ptrs[:, :, None] + (PARTSV * PARTV + tl.arange(0, STATISTICS)), cache_modifier='.cg')
        even, odd = tl.split(tl.reshape(words, (COLUMNS, AT_ONCE, STATISTICS // 2, 2)))
        ms, _ = tl.split(even)
        ls, _ = tl.split(odd)
        ms = tl.where(there, ms, float('-inf'))
        largest = tl.maximum(m, tl.max(ms, 1))
        shift = tl.where(largest == float('-inf'), 0.0, largest)
        alpha = tl.exp2(m - shift)
        factor = tl.exp2(ms - shift[:, None])
        # Rounded before lanes add them up: a product fused with an addition would differ from lane to lane.
        l = l * alpha + tl.sum(tl.fma(ls, factor, 0.0), 1)
        acc = acc * alpha[:, None] + tl.sum(results * factor[:, None, :], 2)
        m = largest
    return m, l, tl.permute(acc, (1, 0))


@triton.jit
def repeat_columns(x, COLUMNS: tl.constexpr):
    """Columns of x [n, columns], over and over until there are COLUMNS."""
    N: tl.constexpr = x.shape[0]
    FEWER: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, None, :], (N, COLUMNS // FEWER, FEWER)), (N, COLUMNS))


@triton.jit
def finish(out_ptrs, mask, m, l, acc, sinks_ptrs, matrix_ptr, out_scale, zero, DV: tl.constexpr,
           PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr, BLOCK_DV: tl.constexpr,
           HADAMARDV: tl.constexpr, WARPS: tl.constexpr, CAP: tl.constexpr):
    """Write final rows: a sink joins the denominator, the rotation of V is undone; rows that saw nothing are zeros.

    Args:
        acc: [PARTSV * BLOCK_PV, rows].
        out_ptrs: [rows] where rows go.
        sinks_ptrs: [rows] pointers, or None.
        matrix_ptr: the inverse of V's matrix, or None; HADAMARDV: the factor of butterflies in its place, or 0.
        out_scale: scalar that outputs are multiplied with.
    """
    factor = out_scale
    if sinks_ptrs is not None:
        sink = tl.load(sinks_ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        l = l * tl.exp2(m - top) + tl.exp2(sink - top)
        factor = out_scale * tl.exp2(m - top)
    factor = factor / tl.where(l > 0.0, l, 1.0)
    if matrix_ptr is None:
        dim, there = place(tl.arange(0, PARTSV * BLOCK_PV), PARTV, BLOCK_PV)
        # Where codes shared bytes, the compiler would move outputs once more to multiply them first.
        at_first: tl.constexpr = PARTSV == 1
        out = acc * factor[None, :] if at_first else acc
        if HADAMARDV != 0:
            out = hadamard_columns(out, HADAMARDV, zero, WARPS, CAP)
        if not at_first:
            out = out * factor[None, :]
        tl.store(out_ptrs[None, :] + dim[:, None], out.to(out_ptrs.dtype.element_ty),
                 mask=mask[None, :] & (there & (dim < DV))[:, None])
    else:
        normalized, power = normalize_columns((acc, ), 1)
        factor = power * factor
        # A few rows of the matrix at a time: registers that spill here cost more than waiting.
        BLOCK_OUT: tl.constexpr = 32 if BLOCK_PV >= 64 else (64 if BLOCK_DV > 64 else BLOCK_DV)
        parts = split_parts(normalized[0], PARTSV)
        for first in range(0, DV, BLOCK_OUT):
            dim = first + tl.arange(0, BLOCK_OUT)
            out = rotate_back(parts, matrix_ptr, first, DV, PARTV, BLOCK_PV, PARTSV, BLOCK_OUT)
            tl.store(out_ptrs[None, :] + dim[:, None], (out * factor[None, :]).to(out_ptrs.dtype.element_ty),
                     mask=mask[None, :] & (dim < DV)[:, None])
