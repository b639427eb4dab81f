"""Combining the partial results of a sequence that several decode programs share, without another launch.

Whoever finishes last of up to FAN programs combines what they left, and goes on to the next level of a tree whose
leaves are the programs. Nobody waits for anybody. A counter per node says who is last.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .attend import LOG2E
from .rotation import hadamard_columns, join_parts, power_below, rotate_back

FAN = tl.constexpr(16)
"""Results that one program combines."""

STATISTICS = tl.constexpr(4)
"""fp32 words behind each partial row: its largest score (in units of log2), its sum of probabilities, and padding."""


@triton.jit
def store_partial(row_ptrs, mask, m, l, accs, PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr):
    """Leave rows [rows] of a result: parts of the output [BLOCK_PV, rows] and their statistics [rows]."""
    byte = tl.arange(0, BLOCK_PV)
    for part in tl.static_range(PARTSV):
        tl.store(row_ptrs[None, :] + (part * PARTV + byte)[:, None], accs[part],
                 mask=mask[None, :] & (byte < PARTV)[:, None])
    tl.store(row_ptrs + PARTSV * PARTV, m, mask=mask)
    tl.store(row_ptrs + PARTSV * PARTV + 1, l, mask=mask)


@triton.jit
def combine_partials(row_ptrs, mask, step, children, PARTV: tl.constexpr, BLOCK_PV: tl.constexpr,
                     PARTSV: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """(m, l, accs) of ``children`` (at most FAN) results that lie ``step`` elements apart, AT_ONCE at a time.

    Reads pass by the first-level cache: other multiprocessors wrote what is read.
    """
    byte = tl.arange(0, BLOCK_PV)
    child = tl.arange(0, FAN)
    there = (child < children)[:, None] & mask[None, :]
    statistics = row_ptrs[None, :] + (child.to(tl.int64) * step)[:, None] + PARTSV * PARTV
    ms = tl.load(statistics, mask=there, other=float('-inf'), cache_modifier='.cg')
    ls = tl.load(statistics + 1, mask=there, other=0.0, cache_modifier='.cg')
    m = tl.max(ms, 0)
    shift = tl.where(m == float('-inf'), 0.0, m)
    l = tl.sum(ls * tl.exp2(ms - shift[None, :]), 0)
    wide = step.to(tl.int64)
    accs = ()
    for _ in tl.static_range(PARTSV):
        accs += (tl.zeros([BLOCK_PV, ROWS], tl.float32), )
    for start in tl.range(0, children, AT_ONCE, num_stages=1):
        factors, loaded = (), ()
        for some in tl.static_range(AT_ONCE):
            some_mask = mask & (start + some < children)
            ptrs = row_ptrs + (start + some) * wide
            factors += (tl.load(ptrs + PARTSV * PARTV, mask=some_mask, other=float('-inf'), cache_modifier='.cg'), )
            for part in tl.static_range(PARTSV):
                loaded += (tl.load(ptrs[None, :] + (part * PARTV + byte)[:, None],
                                   mask=some_mask[None, :] & (byte < PARTV)[:, None], other=0.0,
                                   cache_modifier='.cg'), )
        for some in tl.static_range(AT_ONCE):
            factor = tl.exp2(factors[some] - shift)[None, :]
            new_accs = ()
            for part in tl.static_range(PARTSV):
                new_accs += (accs[part] + factor * loaded[some * PARTSV + part], )
            accs = new_accs
    return m, l, accs


@triton.jit
def finish(out_ptrs, mask, m, l, accs, sinks_ptrs, matrix_ptr, out_scale, zero, DV: tl.constexpr,
           PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr, BLOCK_DV: tl.constexpr,
           HADAMARDV: tl.constexpr):
    """Write final rows: a sink joins the denominator, the rotation of V is undone; rows that saw nothing are zeros.

    Args:
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
    byte = tl.arange(0, BLOCK_PV)
    if matrix_ptr is None and HADAMARDV == 0:
        for part in tl.static_range(PARTSV):
            there = (byte < PARTV) & (part * PARTV + byte < DV)
            tl.store(out_ptrs[None, :] + (part * PARTV + byte)[:, None],
                     (accs[part] * factor[None, :]).to(out_ptrs.dtype.element_ty),
                     mask=mask[None, :] & there[:, None])
    else:
        largest = tl.max(tl.abs(accs[0]), 0)
        for part in tl.static_range(1, PARTSV):
            largest = tl.maximum(largest, tl.max(tl.abs(accs[part]), 0))
        power = power_below(largest)
        stored = ()
        for part in tl.static_range(PARTSV):
            stored += ((accs[part] / power[None, :]).to(tl.float16), )
        factor = power * factor
        if HADAMARDV != 0:
            dim = tl.arange(0, DV)
            out = hadamard_columns(join_parts(stored, PARTSV), HADAMARDV, 'tf32', zero) * factor[None, :]
            tl.store(out_ptrs[None, :] + dim[:, None], out.to(out_ptrs.dtype.element_ty),
                     mask=mask[None, :] & (dim < DV)[:, None])
        else:
            # A few rows of the matrix at a time: registers that spill here cost more than waiting.
            BLOCK_OUT: tl.constexpr = 32 if BLOCK_PV >= 64 else (64 if BLOCK_DV > 64 else BLOCK_DV)
            for first in range(0, DV, BLOCK_OUT):
                dim = first + tl.arange(0, BLOCK_OUT)
                out = rotate_back(stored, matrix_ptr, first, DV, PARTV, BLOCK_PV, PARTSV, BLOCK_OUT)
                tl.store(out_ptrs[None, :] + dim[:, None], (out * factor[None, :]).to(out_ptrs.dtype.element_ty),
                         mask=mask[None, :] & (dim < DV)[:, None])
