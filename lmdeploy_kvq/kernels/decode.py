"""Paged decode attention over a quantized cache: split-K with fp16 tensor-core operands, then a reduction.

K's scale multiplies the scores and V's scale the probabilities, so that no tile is ever dequantized; K's and V's codes
only become fp16, which is exact for every codec. Query rows are divided by a power of two near their largest element
before they become fp16, so that any bf16 query fits.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..formats import stored_dim
from .codecs import decode_gain, device_codec
from .launch import check_device, compute_capability, interpreted, multiprocessors
from .tiles import (
    first_program,
    key_rows,
    program_share,
    tile_block,
    tile_offset,
    value_columns,
    visible_tiles,
)

if TYPE_CHECKING:
    from ..paged import PagedCache

LOG2E = tl.constexpr(1.4426950408889634)
MAX_QUERY_LEN = 16
MAX_GROUP = 64
MAX_BATCH = 1024


@triton.jit
def _load_query(q_ptrs, mask):
    """fp16 query rows [dim, rows] and the power of two (fp32) each was divided by."""
    q = tl.load(q_ptrs, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(q), 0)
    power = (largest.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(largest > 0.0, power, 1.0)
    return (q * (1.0 / power)[None, :]).to(tl.float16), power


@triton.jit
def _prefetch(ptrs, mask, CAP: tl.constexpr):
    """Ask for the lines of pointers to be brought into the L2 cache."""
    if CAP > 0:
        tl.inline_asm_elementwise("""{
            .reg .pred wanted;
            setp.ne.s32 wanted, $2, 0;
            @wanted prefetch.global.L2 [$1];
            mov.u32 $0, 0;
            }""", '=r,l,r', [ptrs.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _softcap(score, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(score / SOFTCAP), scores in units of log2."""
    scale: tl.constexpr = 2.0 / SOFTCAP
    return (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(score * scale) + 1.0))


@triton.jit
def _attend(q, row_scale, q_pos, slope, m, l, acc, tile, oldest, kv_len, table_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr,
            stride_kb, stride_vb, stride_ksb, stride_vsb, STORED: tl.constexpr, STORED_V: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
            DECODE_K: tl.constexpr, DECODE_V: tl.constexpr, FINITE_V: tl.constexpr, K_PER_TOKEN: tl.constexpr,
            V_PER_TOKEN: tl.constexpr, QMAX_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
            ALIBI: tl.constexpr, CAP: tl.constexpr):
    """One online-softmax step over one tile: scores are [tokens, rows], outputs [dim, rows].

    K and V are left operands, so that a product's narrow side (8 columns suffice) holds the query rows, of which there
    are few, and codes become fp16 in the lanes that multiply them.

    Every tile is masked, although only those at the window's edge and at the newest tokens need it: a second, masked
    copy of this body costs more (registers, hence programs per multiprocessor) than the masks do.
    """
    lane = tl.arange(0, BLOCK_N)
    group = tl.arange(0, BLOCK_N // 16) * 16
    position = tile * BLOCK_N + lane
    block = tile_block(table_ptr, tile, kv_len, lane, PAGE, BLOCK_N)
    offset = tile_offset(tile, lane, PAGE, BLOCK_N)
    group_block = tile_block(table_ptr, tile, kv_len, group, PAGE, BLOCK_N)
    group_offset = tile_offset(tile, group, PAGE, BLOCK_N)
    packed = tl.arange(0, 16 * BLOCK_D)[None, :]
    k_ptrs = k_ptr + (group_block * stride_kb + group_offset * STORED)[:, None] + packed
    k_codes = tl.load(k_ptrs) if BLOCK_D == STORED else tl.load(k_ptrs, mask=packed < 16 * STORED, other=0)
    packed_v = tl.arange(0, 16 * BLOCK_DV)[None, :]
    v_ptrs = v_ptr + (group_block * stride_vb + group_offset * STORED_V)[:, None] + packed_v
    v_codes = tl.load(v_ptrs) if BLOCK_DV == STORED_V else tl.load(v_ptrs, mask=packed_v < 16 * STORED_V, other=0)

    score = tl.dot(key_rows(DECODE_K(k_codes, CAP)), q) * row_scale[None, :]
    live = position < kv_len  # slots that no row sees may hold any bytes, scales that are NaN included
    if WINDOW >= 0:
        live = live & (position >= oldest)
    if K_PER_TOKEN:
        score = score * tl.load(ks_ptr + block * stride_ksb + offset, mask=live, other=0.0)[:, None]
    if SOFTCAP > 0.0:
        score = _softcap(score, SOFTCAP)
    if ALIBI:
        score += slope[None, :] * (position[:, None] - q_pos[None, :]).to(tl.float32)
    seen = position[:, None] <= q_pos[None, :]
    if WINDOW >= 0:
        seen = seen & (position[:, None] >= q_pos[None, :] - WINDOW)
    score = tl.where(seen, score, float('-inf'))
    m_new = tl.maximum(m, tl.max(score, 0))
    shift = tl.where(m_new == float('-inf'), 0.0, m_new)  # a row that has seen nothing yet: -inf - -inf is NaN
    p = tl.exp2(score - shift[None, :])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 0)
    if V_PER_TOKEN:
        v_scale = tl.load(vs_ptr + block * stride_vsb + offset, mask=live, other=0.0)
        # scale x qmax is the row's absmax, of order one where scale alone could leave fp16's normal range.
        p = p * (v_scale * QMAX_V)[:, None]
    # A NaN or inf code in a slot that no row sees would survive its probability of zero.
    v = value_columns(FINITE_V(DECODE_V(v_codes, CAP)))
    acc = tl.dot(v, p.to(tl.float16), acc * alpha[None, :])
    return m_new, l, acc


@triton.jit
def _normalize(acc, m, l, sinks_ptr, head, mask, out_scale, HAS_SINKS: tl.constexpr):
    """Final outputs [dim, rows]: a sink joins the denominator; rows that saw nothing become zeros."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=mask, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        l = l * tl.exp2(m - top) + tl.exp2(sink - top)
        acc = acc * tl.exp2(m - top)[None, :]
    return acc * (out_scale / tl.where(l > 0.0, l, 1.0))[None, :]


# Sizes of a batch differ from step to step; specializing on them would only compile the same code again.
@triton.jit(do_not_specialize=['batch', 'target'])
def _decode_kernel(
        q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, k_static_ptr, v_static_ptr, out_ptr, partial_ptr, plan_ptr, sinks_ptr,
        slopes_ptr, kv_lens_ptr, table_ptr, batch, target, sm_scale,  #
        stride_qt, stride_qh, stride_ot, stride_oh, stride_table,  # query and output: token, head
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, STORED: tl.constexpr,
        STORED_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, BATCH: tl.constexpr,
        DECODE_K: tl.constexpr, DECODE_V: tl.constexpr, FINITE_V: tl.constexpr, GAIN_K: tl.constexpr,
        GAIN_V: tl.constexpr, QMAX_V: tl.constexpr, K_PER_TOKEN: tl.constexpr, V_PER_TOKEN: tl.constexpr,
        WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
        WAIT_LATE: tl.constexpr, CAP: tl.constexpr):
    """One program: an equal share of the batch's tiles, for one KV head and BLOCK_M of its GROUP x QUERY_LEN rows.

    The share may begin and end inside sequences and pass through whole ones; each sequence it touches is a segment.
    A sequence that is one segment is finished here, the others leave partial results for the reduction.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    if PDL:
        if not WAIT_LATE:
            tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0) // ROW_TILES
    pid = tl.program_id(1)
    seq, tile, remaining, total, programs = program_share(pid, kv_lens_ptr, batch, target, QUERY_LEN, WINDOW, BLOCK_N,
                                                          BATCH)
    row = (tl.program_id(0) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < ROWS
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    score_scale = sm_scale * GAIN_K * LOG2E
    out_scale = GAIN_V
    if not K_PER_TOKEN:
        score_scale = score_scale * tl.load(k_static_ptr + kv_head * stride_k_static)
    if V_PER_TOKEN:
        out_scale = out_scale / QMAX_V
    else:
        out_scale = out_scale * tl.load(v_static_ptr + kv_head * stride_v_static)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    if K_PER_TOKEN:
        ks_ptr += kv_head * stride_ksh
    if V_PER_TOKEN:
        vs_ptr += kv_head * stride_vsh
    if PDL and WAIT_LATE:
        tl.extra.cuda.gdc_wait()

    pieces = 0
    open_seq = seq
    while remaining > 0:
        kv_len = tl.load(kv_lens_ptr + seq).to(tl.int32)
        first, last = visible_tiles(kv_len, QUERY_LEN, WINDOW, BLOCK_N)
        tile = tl.maximum(tile, first)
        stop = tl.minimum(last, tile + remaining)
        token = seq.to(tl.int64) * QUERY_LEN + row // GROUP
        q_pos = kv_len - QUERY_LEN + row // GROUP
        q, row_scale = _load_query(q_ptr + (token * stride_qt + head * stride_qh)[None, :] + dim[:, None],
                                   row_mask[None, :] & (dim < D)[:, None])
        row_scale = row_scale * score_scale
        m = tl.full([BLOCK_M], float('-inf'), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
        oldest = kv_len - QUERY_LEN - WINDOW  # position of the oldest token that a row sees through the window
        for step in range(tile, stop):
            m, l, acc = _attend(q, row_scale, q_pos, slope, m, l, acc, step, oldest, kv_len,
                                table_ptr + seq.to(tl.int64) * stride_table, k_ptr, v_ptr, ks_ptr, vs_ptr, stride_kb,
                                stride_vb, stride_ksb, stride_vsb, STORED, STORED_V, BLOCK_D, BLOCK_DV, PAGE,
                                BLOCK_N, DECODE_K, DECODE_V, FINITE_V, K_PER_TOKEN, V_PER_TOKEN, QMAX_V, WINDOW,
                                SOFTCAP, ALIBI, CAP)
        mask = row_mask[None, :] & (dim_v < DV)[:, None]
        if (tile == first) & (stop == last):
            out = _normalize(acc, m, l, sinks_ptr, head, row_mask, out_scale, HAS_SINKS)
            tl.store(out_ptr + (token * stride_ot + head * stride_oh)[None, :] + dim_v[:, None],
                     out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            # Each segment is the next of its sequence or of its program, so that their sum is a slot of its own.
            part = ((pid + seq).to(tl.int64) * (tl.num_programs(0) // ROW_TILES) + kv_head) * ROWS + row
            tl.store(partial_ptr + (part * (DV + 4))[None, :] + dim_v[:, None], acc * out_scale, mask=mask)
            tl.store(partial_ptr + part * (DV + 4) + DV, m, mask=row_mask)
            tl.store(partial_ptr + part * (DV + 4) + DV + 1, l, mask=row_mask)
        # The tile after this program's last is the first one of the next program.
        end = (pid.to(tl.int64) + 1) * total // programs - remaining + last - tile - 1
        pieces = tl.where((tile == first) & (stop < last), first_program(end, total, programs) - pid + 1, 0)
        remaining -= stop - tile
        open_seq = seq
        seq += 1
        tile = first * 0
    # Only the last segment can be the first of several of its sequence: that is one reduction at most per program.
    tl.store(plan_ptr + pid * 2, open_seq)
    tl.store(plan_ptr + pid * 2 + 1, pieces)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _reduce_kernel(partial_ptr, plan_ptr, out_ptr, sinks_ptr, stride_ot, stride_oh, kv_heads, GROUP: tl.constexpr,
                   QUERY_LEN: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                   SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr):
    """One program combines the segments of the sequence that decode program ``program_id(0)`` left unfinished.

    It does so for BLOCK_M query rows of one KV head, SPLITS segments at a time.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    seq = tl.load(plan_ptr + pid * 2)
    pieces = tl.load(plan_ptr + pid * 2 + 1)
    if pieces == 0:
        return
    kv_head = tl.program_id(1) // ROW_TILES
    row = (tl.program_id(1) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < ROWS
    dim = tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, SPLITS)
    m = tl.full([SPLITS, BLOCK_M], float('-inf'), tl.float32)
    l = tl.zeros([SPLITS, BLOCK_M], tl.float32)
    acc = tl.zeros([SPLITS, BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, pieces, SPLITS):
        mask = (start + lane < pieces)[:, None] & row_mask[None, :]
        slot = (pid + seq + start + lane).to(tl.int64)[:, None] * kv_heads + kv_head
        part_ptrs = partial_ptr + (slot * ROWS + row[None, :]) * (DV + 4)
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


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters of the decode kernel; they change speed, never results beyond rounding.

    Attributes:
        block_n: tokens per step.
        occupancy: programs that a multiprocessor is given, i.e. holds at once with these registers and this shared
            memory (tests/test_aot.py checks it): all run at once, each with an equal share of the work.
        maxnreg: register limit per thread, None for the compiler's choice.
        programs: programs per KV head; None for as many as run at once.
    """
    block_n: int
    occupancy: int
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    programs: int | None = None


def default_config(dim: int, block_m: int) -> DecodeConfig:
    """Launch parameters for a head size (the larger of K's and V's) and a number of query rows per program."""
    if block_m == 8:
        return DecodeConfig(block_n=128, occupancy=4, maxnreg=128) if dim <= 128 else DecodeConfig(64, 4, maxnreg=128)
    # Two warps: with four, Triton would choose Hopper's warp-group products, whose operands come from shared memory.
    return DecodeConfig(block_n=64 if dim <= 128 else 32, occupancy=8 if block_m == 16 else 4, num_warps=2)


def decode(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor,
           *, query_len: int, sm_scale: float, window: int | None = None, softcap: float | None = None,
           sinks: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None, follows_fill: bool = False,
           config: DecodeConfig | None = None) -> torch.Tensor:
    """Launch paged attention; arguments as in :func:`lmdeploy_kvq.paged_attention`, ``out`` [tokens, heads, v_dim].

    Reads lengths on the device only, so a launch can be captured in a CUDA graph. Allocates split-K workspace from
    PyTorch's caching allocator.

    Args:
        follows_fill: the kernel before this one in the stream is :func:`~lmdeploy_kvq.kernels.fill.fill`, and
            ``kv_lens`` was ready before it: the division of the work then overlaps with it.

    Raises:
        ValueError: shapes, strides or limits (query_len 1..16, group 1..64, batch 1..1024) violated.
    """
    check_device(query)
    _check(query, cache, block_table, kv_lens, out, query_len)
    heads, dim, batch, kv_heads, dim_v = query.size(1), cache.head_dim, kv_lens.size(0), cache.num_kv_heads, out.size(2)
    fmt, device = cache.format, query.device
    cap = compute_capability(device)
    pdl = cap >= 90 and not interpreted()
    rows = heads // kv_heads * query_len
    block_m = min(max(8, triton.next_power_of_2(rows)), 32)
    config = config or default_config(max(dim, dim_v), block_m)
    grid_heads = kv_heads * triton.cdiv(rows, block_m)
    target = config.programs or max(1, config.occupancy * multiprocessors(device) // grid_heads)
    # Partial results: each segment's rows with their two softmax statistics, padded to 16 bytes; then the plan.
    partial_size = (target + batch) * kv_heads * rows * (dim_v + 4)
    workspace = torch.empty(partial_size + 2 * target, dtype=torch.float32, device=device)
    plan = workspace[partial_size:].view(torch.int32)
    shared = dict(GROUP=heads // kv_heads, QUERY_LEN=query_len, DV=dim_v, BLOCK_DV=triton.next_power_of_2(dim_v),
                  HAS_SINKS=sinks is not None, PDL=pdl, **({'launch_pdl': True} if pdl else {}))
    _decode_kernel[(grid_heads, target)](
        query, *cache.tensors(), out, workspace, plan, sinks, alibi_slopes, kv_lens, block_table, batch, target,
        sm_scale, *query.stride()[:2], *out.stride()[:2], block_table.stride(0),
        *cache.strides(), D=dim, STORED=stored_dim(dim), STORED_V=stored_dim(dim_v), BLOCK_D=triton.next_power_of_2(dim), BLOCK_M=block_m, BLOCK_N=config.block_n,
        PAGE=cache.block_size, BATCH=triton.next_power_of_2(batch),
        DECODE_K=device_codec(fmt.key.codec).decode, DECODE_V=device_codec(fmt.value.codec).decode,
        FINITE_V=device_codec(fmt.value.codec).finite,
        GAIN_K=decode_gain(fmt.key.codec, cap), GAIN_V=decode_gain(fmt.value.codec, cap), QMAX_V=fmt.value.codec.qmax,
        K_PER_TOKEN=fmt.key.per_token_head, V_PER_TOKEN=fmt.value.per_token_head,
        WINDOW=-1 if window is None else window, SOFTCAP=0.0 if softcap is None else softcap,
        ALIBI=alibi_slopes is not None, WAIT_LATE=follows_fill, CAP=cap, num_warps=config.num_warps,
        num_stages=config.num_stages, **shared,
        **({'maxnreg': config.maxnreg} if cap and config.maxnreg else {}))
    # Few long sequences leave many segments each: then a program takes few rows and many segments.
    reduce_m, splits, warps = (1, 64, 8) if target >= 16 * batch else (min(block_m, 4), 4, 4)
    _reduce_kernel[(target, kv_heads * triton.cdiv(rows, reduce_m))](
        workspace, plan, out, sinks, *out.stride()[:2], kv_heads, BLOCK_M=reduce_m, SPLITS=splits, num_warps=warps,
        **shared)
    return out


def _check(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor,
           query_len: int) -> None:
    """Raise ValueError unless :func:`decode` can run."""
    tokens, heads, dim = query.shape
    batch, kv_heads = kv_lens.size(0), cache.num_kv_heads
    if tokens != batch * query_len or dim != cache.head_dim or heads % kv_heads:
        raise ValueError(f'query {tuple(query.shape)} does not fit batch {batch} x query_len {query_len}, '
                         f'{kv_heads} KV heads and head_dim {cache.head_dim}')
    for what, given, limit in (('query_len', query_len, MAX_QUERY_LEN),
                               ('query heads per KV head', heads // kv_heads, MAX_GROUP), ('batch', batch, MAX_BATCH)):
        if not 1 <= given <= limit:
            raise ValueError(f'{what} is {given}; supported are 1 to {limit}')
    if query.stride(-1) != 1 or out.stride(-1) != 1 or block_table.stride(-1) != 1:
        raise ValueError('query, out and block_table must be contiguous in their last axis')
