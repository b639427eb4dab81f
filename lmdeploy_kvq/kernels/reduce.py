"""The second half of split-K decoding: combine the partial results of sequences that several programs shared."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import dependent_launch

LOG2E = tl.constexpr(1.4426950408889634)

STATISTICS = tl.constexpr(4)
"""fp32 words behind each partial row: its largest score (in units of log2), its sum of probabilities, and padding."""


@triton.jit
def _reduce_kernel(partial_ptr, plan_ptr, out_ptr, sinks_ptr, stride_ot, stride_oh, kv_heads, GROUP: tl.constexpr,
                   QUERY_LEN: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                   SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr, BY_SEQUENCE: tl.constexpr,
                   PDL: tl.constexpr):
    """One program combines a sequence's segments for BLOCK_M query rows of one KV head and BLOCK_DV of their elements.

    It takes SPLITS segments at a time. ``program_id(0)`` is the sequence (BY_SEQUENCE), or the decode program that left
    it unfinished: whichever are fewer.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # whoever starts early waits for this kernel before it touches anything
        tl.extra.cuda.gdc_wait()
    here = tl.program_id(0)
    there = tl.load(plan_ptr + here * 2)
    first_slot = here + there  # of the sequence and of the program that has its first tile
    seq = here if BY_SEQUENCE else there
    pieces = tl.load(plan_ptr + here * 2 + 1)
    if pieces == 0:
        return
    kv_head = tl.program_id(1) // ROW_TILES
    row = (tl.program_id(1) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < ROWS
    dim = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, SPLITS)
    m = tl.full([SPLITS, BLOCK_M], float('-inf'), tl.float32)
    l = tl.zeros([SPLITS, BLOCK_M], tl.float32)
    acc = tl.zeros([SPLITS, BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, pieces, SPLITS):
        mask = (start + lane < pieces)[:, None] & row_mask[None, :]
        slot = (first_slot + start + lane).to(tl.int64)[:, None] * kv_heads + kv_head
        part_ptrs = partial_ptr + (slot * ROWS + row[None, :]) * (DV + STATISTICS)
        m_new = tl.load(part_ptrs + DV, mask=mask, other=float('-inf'))
        l_new = tl.load(part_ptrs + DV + 1, mask=mask, other=0.0)
        new = tl.load(part_ptrs[:, :, None] + dim[None, None, :], mask=mask[:, :, None] & (dim < DV)[None, None, :],
                      other=0.0)
        top = tl.maximum(m, m_new)
        shift = tl.where(top == float('-inf'), 0.0, top)
        old_factor, new_factor = tl.exp2(m - shift), tl.exp2(m_new - shift)
        l = l * old_factor + l_new * new_factor
        acc = acc * old_factor[:, :, None] + new * new_factor[:, :, None]
        m = top
    head = kv_head * GROUP + row % GROUP
    top = tl.max(m, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float('-inf'), 0.0, top)
    factor = tl.exp2(m - shift[None, :])
    total = tl.sum(l * factor, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - shift)
    out = tl.sum(acc * factor[:, :, None], 0) / tl.where(total > 0.0, total, 1.0)[:, None]
    token = seq.to(tl.int64) * QUERY_LEN + row // GROUP
    tl.store(out_ptr + (token * stride_ot + head * stride_oh)[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty),
             mask=row_mask[:, None] & (dim < DV)[None, :])


def combine(partial: torch.Tensor, plan: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None, programs: int,
            batch: int, kv_heads: int, query_len: int, cap: int) -> None:
    """Launch the reduction behind the decode kernel.

    Args:
        partial: fp32 rows of [slot, kv_heads, rows, dim + 4], a slot per (program + sequence); see the decode kernel.
        plan: int32 [min(batch, programs), 2]: for each sequence the program of its first tile, or else for each program
            the sequence it left unfinished; and the number of segments, or 0 where there is nothing to combine.
        out: [tokens, heads, dim], rows of split sequences are written.
        sinks: [heads], or None.
        programs: decode programs per KV head; batch: sequences; query_len: new tokens per sequence.
        cap: compute capability; from 9.0 on it is launched before the decode kernel has ended.
    """
    heads, dim = out.shape[1:]
    rows = heads // kv_heads * query_len
    # 16 elements per thread: many segments of few elements, or the other way round.
    splits = min(max(4, triton.next_power_of_2(2 * programs // batch)), 256)
    warps = min(max(1, splits // 8), 8)
    width = min(triton.next_power_of_2(dim), warps * 512 // splits)
    block_m = max(1, min(triton.next_power_of_2(rows), warps * 512 // splits // width))
    _reduce_kernel[(min(batch, programs), kv_heads * triton.cdiv(rows, block_m), triton.cdiv(dim, width))](
        partial, plan, out, sinks, *out.stride()[:2], kv_heads, GROUP=heads // kv_heads, QUERY_LEN=query_len, DV=dim,
        BLOCK_DV=width, BLOCK_M=block_m, SPLITS=splits, HAS_SINKS=sinks is not None,
        BY_SEQUENCE=batch <= programs, num_warps=warps, **dependent_launch(cap))
