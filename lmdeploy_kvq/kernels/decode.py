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

from .codecs import decode_gain, device_codec
from .launch import check_device, compute_capability, dependent_launch, multiprocessors
from .reduce import LOG2E, STATISTICS, combine
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

MAX_QUERY_LEN = 16
MAX_GROUP = 64
MAX_BATCH = 1024


@triton.jit
def _normalize_query(q):
    """fp16 query rows [dim, rows] and the power of two (fp32) each was divided by."""
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 0)
    power = (largest.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(largest > 0.0, power, 1.0)
    return (q * (1.0 / power)[None, :]).to(tl.float16), power


@triton.jit
def _prefetch(ptrs, mask):
    """Ask for the lines of pointers to be brought into the L2 cache."""
    tl.inline_asm_elementwise("""{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        @wanted prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }""", '=r,l,r', [ptrs.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _prefetch_tile(table_ptr, tile, kv_len, k_ptr, v_ptr, stride_kb, stride_vb, STORED: tl.constexpr,
                   STORED_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
                   BLOCK_N: tl.constexpr, CAP: tl.constexpr):
    """Bring the codes of a tile into the L2 cache, 128 bytes per lane; they may still be being written."""
    if CAP > 0:
        group = tl.arange(0, BLOCK_N // 16) * 16
        block = tile_block(table_ptr, tile, kv_len, group, PAGE, BLOCK_N)
        offset = tile_offset(tile, group, PAGE, BLOCK_N)
        line = (tl.arange(0, BLOCK_D // 8) * 128)[None, :]
        _prefetch(k_ptr + (block * stride_kb + offset * STORED)[:, None] + line, line < 16 * STORED)
        line = (tl.arange(0, BLOCK_DV // 8) * 128)[None, :]
        _prefetch(v_ptr + (block * stride_vb + offset * STORED_V)[:, None] + line, line < 16 * STORED_V)


@triton.jit
def _softcap(score, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(score / SOFTCAP), scores in units of log2."""
    scale: tl.constexpr = 2.0 / SOFTCAP
    return (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(score * scale) + 1.0))


@triton.jit
def _attend(queries, row_scales, q_poss, slopes, ms, ls, accs, tile, oldest, kv_len, table_ptr, k_ptr, v_ptr, ks_ptr,
            vs_ptr, stride_kb, stride_vb, stride_ksb, stride_vsb, STORED: tl.constexpr, STORED_V: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
            DECODE_K: tl.constexpr, DECODE_V: tl.constexpr, FINITE_V: tl.constexpr, K_PER_TOKEN: tl.constexpr,
            V_PER_TOKEN: tl.constexpr, QMAX_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
            ALIBI: tl.constexpr, CAP: tl.constexpr):
    """One online-softmax step over one tile, for each chunk of query rows.

    Scores are [tokens, rows], outputs [dim, rows].

    K and V are left operands, so that a product's narrow side (8 columns suffice) holds the query rows, of which there
    are few, and codes become fp16 in the lanes that multiply them, once for all chunks.

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

    live = position < kv_len  # slots that no row sees may hold any bytes, scales that are NaN included
    if WINDOW >= 0:
        live = live & (position >= oldest)
    if K_PER_TOKEN:
        k_scale = tl.load(ks_ptr + block * stride_ksb + offset, mask=live, other=0.0)
    if V_PER_TOKEN:
        # scale x qmax is the row's absmax, of order one where scale alone could leave fp16's normal range.
        v_scale = tl.load(vs_ptr + block * stride_vsb + offset, mask=live, other=0.0) * QMAX_V

    k = key_rows(DECODE_K(k_codes, CAP))
    new_ms, new_ls, scaled, ps = (), (), (), ()
    for chunk in tl.static_range(len(queries)):
        m, q_pos = ms[chunk], q_poss[chunk]
        score = tl.dot(k, queries[chunk]) * row_scales[chunk][None, :]
        if K_PER_TOKEN:
            score = score * k_scale[:, None]
        if SOFTCAP > 0.0:
            score = _softcap(score, SOFTCAP)
        if ALIBI:
            score += slopes[chunk][None, :] * (position[:, None] - q_pos[None, :]).to(tl.float32)
        seen = position[:, None] <= q_pos[None, :]
        if WINDOW >= 0:
            seen = seen & (position[:, None] >= q_pos[None, :] - WINDOW)
        score = tl.where(seen, score, float('-inf'))
        m_new = tl.maximum(m, tl.max(score, 0))
        shift = tl.where(m_new == float('-inf'), 0.0, m_new)  # a row that has seen nothing yet: -inf - -inf is NaN
        p = tl.exp2(score - shift[None, :])
        alpha = tl.exp2(m - shift)
        new_ms += (m_new, )
        new_ls += (ls[chunk] * alpha + tl.sum(p, 0), )
        scaled += (accs[chunk] * alpha[None, :], )
        if V_PER_TOKEN:
            p = p * v_scale[:, None]
        ps += (p.to(tl.float16), )
    # A NaN or inf code in a slot that no row sees would survive its probability of zero.
    v = value_columns(FINITE_V(DECODE_V(v_codes, CAP)))
    new_accs = ()
    for chunk in tl.static_range(len(queries)):
        new_accs += (tl.dot(v, ps[chunk], scaled[chunk]), )
    return new_ms, new_ls, new_accs


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
        STORED_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, BATCH: tl.constexpr, DECODE_K: tl.constexpr,
        DECODE_V: tl.constexpr, FINITE_V: tl.constexpr, GAIN_K: tl.constexpr, GAIN_V: tl.constexpr,
        QMAX_V: tl.constexpr, K_PER_TOKEN: tl.constexpr, V_PER_TOKEN: tl.constexpr,
        WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
        BY_SEQUENCE: tl.constexpr, PDL: tl.constexpr, WAIT_LATE: tl.constexpr, CAP: tl.constexpr):
    """One program: an equal share of the batch's tiles, for one KV head and BLOCK_M of its GROUP x QUERY_LEN rows.

    The share may begin and end inside sequences and pass through whole ones; each sequence it touches is a segment.
    A sequence that is one segment is finished here, the others leave partial results for the reduction.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    if PDL and not WAIT_LATE:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0) // ROW_TILES
    pid = tl.program_id(1)
    seq, tile, remaining, total, programs = program_share(pid, kv_lens_ptr, batch, target, QUERY_LEN, WINDOW, BLOCK_N,
                                                          BATCH)
    CHUNKS: tl.constexpr = BLOCK_M // CHUNK
    first_row = (tl.program_id(0) % ROW_TILES) * BLOCK_M + tl.arange(0, CHUNK)
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
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    if K_PER_TOKEN:
        ks_ptr += kv_head * stride_ksh
    if V_PER_TOKEN:
        vs_ptr += kv_head * stride_vsh

    pieces = 0
    while remaining > 0:
        kv_len = tl.load(kv_lens_ptr + seq).to(tl.int32)
        first, last = visible_tiles(kv_len, QUERY_LEN, WINDOW, BLOCK_N)
        tile = tl.maximum(tile, first)
        stop = tl.minimum(last, tile + remaining)
        raw = ()
        for chunk in tl.static_range(CHUNKS):
            row = first_row + chunk * CHUNK
            head = kv_head * GROUP + row % GROUP
            token = seq.to(tl.int64) * QUERY_LEN + row // GROUP
            raw += (tl.load(q_ptr + (token * stride_qt + head * stride_qh)[None, :] + dim[:, None],
                            mask=(row < ROWS)[None, :] & (dim < D)[:, None], other=0.0), )
        # While queries are on their way (nothing waits for a read before its first use), so is the first tile.
        _prefetch_tile(table_ptr + seq.to(tl.int64) * stride_table, tile, kv_len, k_ptr, v_ptr, stride_kb, stride_vb,
                       STORED, STORED_V, BLOCK_D, BLOCK_DV, PAGE, BLOCK_N, CAP)
        queries, row_scales, q_poss, slopes, ms, ls, accs = (), (), (), (), (), (), ()
        for chunk in tl.static_range(CHUNKS):
            row = first_row + chunk * CHUNK
            head = kv_head * GROUP + row % GROUP
            q, row_scale = _normalize_query(raw[chunk])
            queries += (q, )
            row_scales += (row_scale * score_scale, )
            q_poss += (kv_len - QUERY_LEN + row // GROUP, )
            slope = tl.zeros([CHUNK], tl.float32)
            if ALIBI:
                slope = tl.load(slopes_ptr + head, mask=row < ROWS, other=0.0).to(tl.float32) * LOG2E
            slopes += (slope, )
            ms += (tl.full([CHUNK], float('-inf'), tl.float32), )
            ls += (tl.zeros([CHUNK], tl.float32), )
            accs += (tl.zeros([BLOCK_DV, CHUNK], tl.float32), )
        if PDL and WAIT_LATE:
            tl.extra.cuda.gdc_wait()
        oldest = kv_len - QUERY_LEN - WINDOW  # position of the oldest token that a row sees through the window
        for step in range(tile, stop):
            ms, ls, accs = _attend(queries, row_scales, q_poss, slopes, ms, ls, accs, step, oldest, kv_len,
                                   table_ptr + seq.to(tl.int64) * stride_table, k_ptr, v_ptr, ks_ptr, vs_ptr,
                                   stride_kb, stride_vb, stride_ksb, stride_vsb, STORED, STORED_V, BLOCK_D, BLOCK_DV,
                                   PAGE, BLOCK_N, DECODE_K, DECODE_V, FINITE_V, K_PER_TOKEN, V_PER_TOKEN, QMAX_V,
                                   WINDOW, SOFTCAP, ALIBI, CAP)
        for chunk in tl.static_range(CHUNKS):
            row = first_row + chunk * CHUNK
            head = kv_head * GROUP + row % GROUP
            mask = (row < ROWS)[None, :] & (dim_v < DV)[:, None]
            if (tile == first) & (stop == last):
                token = seq.to(tl.int64) * QUERY_LEN + row // GROUP
                out = _normalize(accs[chunk], ms[chunk], ls[chunk], sinks_ptr, head, row < ROWS, out_scale, HAS_SINKS)
                tl.store(out_ptr + (token * stride_ot + head * stride_oh)[None, :] + dim_v[:, None],
                         out.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                # Each segment is the next of its sequence or of its program, so that their sum is a slot of its own.
                part = ((pid + seq).to(tl.int64) * (tl.num_programs(0) // ROW_TILES) + kv_head) * ROWS + row
                part_ptrs = partial_ptr + part * (DV + STATISTICS)
                tl.store(part_ptrs[None, :] + dim_v[:, None], accs[chunk] * out_scale, mask=mask)
                tl.store(part_ptrs + DV, ms[chunk], mask=row < ROWS)
                tl.store(part_ptrs + DV + 1, ls[chunk], mask=row < ROWS)
        # The tile after this program's last is the first one of the next program.
        end = (pid.to(tl.int64) + 1) * total // programs - remaining + last - tile - 1
        pieces = tl.where((tile == first) & (stop < last), first_program(end, total, programs) - pid + 1, 0)
        if BY_SEQUENCE:
            tl.store(plan_ptr + seq * 2, pid, mask=tile == first)
            tl.store(plan_ptr + seq * 2 + 1, pieces, mask=tile == first)
        remaining -= stop - tile
        seq += 1
        tile = first * 0
    if PDL and WAIT_LATE:
        tl.extra.cuda.gdc_wait()  # a program without work has not waited yet; the memory may still be another's
    if not BY_SEQUENCE:
        # Only its last segment can be the first of several of its sequence: one reduction at most per program.
        tl.store(plan_ptr + pid * 2, seq - 1)
        tl.store(plan_ptr + pid * 2 + 1, pieces)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters of the decode kernel; they change speed, never results beyond rounding.

    Attributes:
        block_n: tokens per step.
        occupancy: programs that a multiprocessor is given, i.e. holds at once with these registers and this shared
            memory (tests/test_aot.py checks it): all run at once, each with an equal share of the work.
        maxnreg: register limit per thread, None for the compiler's choice.
        chunk: query rows per product, 8 at least. With four warps, Triton turns products of 16 and more into Hopper's
            warp-group instructions, whose operands pass through shared memory.
        programs: programs per KV head; None for as many as run at once.
    """
    block_n: int
    occupancy: int
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    chunk: int = 8
    programs: int | None = None


def default_config(dim: int, block_m: int) -> DecodeConfig:
    """Launch parameters for a head size (the larger of K's and V's) and a number of query rows per program."""
    block_n = 128 if dim <= 128 else 64
    if block_m == 8:
        return DecodeConfig(block_n, occupancy=4, maxnreg=128)
    return DecodeConfig(block_n, occupancy=4, num_warps=2, chunk=block_m)


def decode(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor,
           *, query_len: int, sm_scale: float, window: int | None = None, softcap: float | None = None,
           sinks: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None, inputs_ready: bool = False,
           config: DecodeConfig | None = None) -> torch.Tensor:
    """Launch paged attention; arguments as in :func:`lmdeploy_kvq.paged_attention`, ``out`` [tokens, heads, v_dim].

    Reads lengths on the device only, so a launch can be captured in a CUDA graph. Allocates split-K workspace from
    PyTorch's caching allocator.

    Args:
        inputs_ready: query, lengths and block table were ready before the kernel before this one in the stream began
            (e.g. :func:`~lmdeploy_kvq.kernels.fill.fill`, which waits for all before it); the work is then divided
            while that kernel runs, and only its writes to the pages are waited for.

    Raises:
        ValueError: shapes, strides or limits (query_len 1..16, group 1..64, batch 1..1024) violated.
    """
    check_device(query)
    _check(query, cache, block_table, kv_lens, out, query_len)
    heads, dim, batch, kv_heads, dim_v = query.size(1), cache.head_dim, kv_lens.size(0), cache.num_kv_heads, out.size(2)
    fmt, device = cache.format, query.device
    cap = compute_capability(device)
    rows = heads // kv_heads * query_len
    block_m = min(max(8, triton.next_power_of_2(rows)), 32)
    config = config or default_config(max(dim, dim_v), block_m)
    grid_heads = kv_heads * triton.cdiv(rows, block_m)
    target = config.programs or max(1, config.occupancy * multiprocessors(device) // grid_heads)
    # Partial results: each segment's rows with their two softmax statistics, padded to 16 bytes; then the plan.
    partial_size = (target + batch) * kv_heads * rows * (dim_v + STATISTICS.value)
    workspace = torch.empty(partial_size + 2 * min(batch, target), dtype=torch.float32, device=device)
    plan = workspace[partial_size:].view(torch.int32)
    _decode_kernel[(grid_heads, target)](
        query, *cache.tensors(), out, workspace, plan, sinks, alibi_slopes, kv_lens, block_table, batch, target,
        sm_scale, *query.stride()[:2], *out.stride()[:2], block_table.stride(0), *cache.strides(), **cache.sizes(),
        GROUP=heads // kv_heads, QUERY_LEN=query_len, BLOCK_M=block_m, CHUNK=min(config.chunk, block_m),
        BLOCK_N=config.block_n, BATCH=triton.next_power_of_2(batch), DECODE_K=device_codec(fmt.key.codec).decode,
        DECODE_V=device_codec(fmt.value.codec).decode, FINITE_V=device_codec(fmt.value.codec).finite,
        GAIN_K=decode_gain(fmt.key.codec, cap), GAIN_V=decode_gain(fmt.value.codec, cap), QMAX_V=fmt.value.codec.qmax,
        K_PER_TOKEN=fmt.key.per_token_head, V_PER_TOKEN=fmt.value.per_token_head,
        WINDOW=-1 if window is None else window, SOFTCAP=0.0 if softcap is None else softcap,
        ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None, BY_SEQUENCE=batch <= target,
        WAIT_LATE=inputs_ready, CAP=cap, num_warps=config.num_warps, num_stages=config.num_stages,
        **dependent_launch(cap), **({'maxnreg': config.maxnreg} if cap and config.maxnreg else {}))
    combine(workspace, plan, out, sinks, target, batch, kv_heads, query_len, cap)
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
