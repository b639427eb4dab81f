"""Paged decode attention over a quantized cache: split-K with fp16 tensor-core operands, in one launch.

Query rows are divided by a power of two near their largest element before they become fp16, so that any bf16 query
fits.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .attend import (
    LOG2E,
    attend,
    behind,
    interleave,
    load_queries,
    prefetch_tile,
    query_operands,
)
from .codecs import decoding
from .combine import FAN, STATISTICS, combine_partials, finish, repeat_columns, store_partial
from .launch import batch_block, check_device, compute_capability, dependent_launch
from .rotation import join_parts, normalize_columns, operand, split_parts
from .tiles import first_tile, program_of, program_share, tile_pages, tokens_of, visible_tiles
from .workspace import DecodeConfig, Workspace

if TYPE_CHECKING:
    from ..paged import PagedCache

MAX_QUERY_LEN = 16
MAX_GROUP = 64
MAX_BATCH = 1024

WAIT_FIRST, WAIT_QUERIES, WAIT_PAGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""When a program waits for the kernel before it: at once, before it reads queries, or before it reads pages."""


@triton.jit
def _reduce_tree(ptr, rows, counters_ptr, pid, first_pid, pieces, slot_step, counter_step, level_step,
                 PARTV: tl.constexpr, BLOCK_PV: tl.constexpr, PARTSV: tl.constexpr, COLUMNS: tl.constexpr,
                 AT_ONCE: tl.constexpr):
    """Combine this program's result, which it has left, with the others' where it was the last to come.

    Args:
        ptr: the first row of the sequence's first result, of ``rows`` rows; slot_step: elements from one result to the
            next.
        counters_ptr: the counter of the sequence's first result; counter_step, level_step: from one result's to the
            next one's, and from one level of the tree to the next.
        first_pid, pieces: the programs that share the sequence are ``first_pid .. first_pid + pieces``.

    Returns:
        (count, m, l, acc): count is 1 in the last program of all, and the rest is the whole sequence's then, in
        COLUMNS columns.
    """
    index = pid - first_pid
    count = pieces
    span = 1  # results of the level below that are one of this level
    m = tl.full([COLUMNS], float('-inf'), tl.float32)
    l = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([PARTSV * BLOCK_PV, COLUMNS], tl.float32)
    while count > 1:
        node = index // FAN
        children = tl.minimum(count - node * FAN, FAN)
        start = node * FAN * span
        tl.debug_barrier()  # all lanes have left their part before one of them says so
        arrived = tl.atomic_add(counters_ptr + start * counter_step, 1, sem='acq_rel', scope='gpu') + 1
        if arrived == children:
            tl.store(counters_ptr + start * counter_step, 0)  # as it was
            first_ptr = ptr + start.to(tl.int64) * slot_step
            m, l, acc = combine_partials(first_ptr, slot_step * span, children, PARTV, BLOCK_PV, PARTSV, COLUMNS,
                                         AT_ONCE)
            if count > FAN:
                tl.debug_barrier()  # its own place may still be being read
                column = tl.arange(0, COLUMNS)
                store_partial(first_ptr + column * (PARTSV * PARTV + STATISTICS), column < rows, m, l, acc, PARTV,
                              BLOCK_PV, PARTSV)
            index = node
            span = span * FAN
            count = tl.cdiv(count, FAN)
            counters_ptr += level_step
        else:
            count = 0
    return count, m, l, acc


# Sizes of a batch differ from step to step; specializing on them would only compile the same code again.
@triton.jit(do_not_specialize=['batch', 'target', 'each', 'most', 'lead', 'stride_table'])
def _decode_kernel(
        q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, k_static_ptr, v_static_ptr, v_matrix_ptr, out_ptr, partial_ptr,
        counters_ptr, sinks_ptr, slopes_ptr, kv_lens_ptr, table_ptr, batch, target, each, most, lead, sm_scale,  #
        stride_qt, stride_qh, stride_ot, stride_oh, stride_table, stride_v_matrix,  # query and output: token, head
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr,
        PARTV: tl.constexpr, PARTS: tl.constexpr, PARTSV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, PAGE: tl.constexpr, BATCH: tl.constexpr, PADDED: tl.constexpr, DECODE: tl.constexpr,
        PAIRSV: tl.constexpr, FINITEV: tl.constexpr, BITS: tl.constexpr, BITSV: tl.constexpr, GAIN: tl.constexpr,
        GAINV: tl.constexpr, OFFSET: tl.constexpr, OFFSETV: tl.constexpr, QMAXV: tl.constexpr, PER_TOKEN: tl.constexpr,
        PER_TOKENV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PDL: tl.constexpr,
        WAIT: tl.constexpr, PREPARED: tl.constexpr, HADAMARDV: tl.constexpr, WARPS: tl.constexpr,
        COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, PIECES: tl.constexpr, CAP: tl.constexpr):
    """One program: an equal share of the batch's tiles, for one KV head and BLOCK_M of its GROUP x QUERY_LEN rows.

    The share may begin and end inside sequences and pass through whole ones; each sequence it touches is a segment.
    A sequence that is one segment is finished at once, the others by the last program that comes to their end.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    if PDL and WAIT == WAIT_FIRST:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0) // ROW_TILES
    pid = tl.program_id(1) - lead
    pid = tl.where(pid < 0, pid + target, pid)  # the first to start are the last to get work
    seq, skip, remaining, total, programs, shift = program_share(
        pid, kv_lens_ptr, table_ptr, stride_table, batch, target, each, most, QUERY_LEN, WINDOW, BLOCK_N, BATCH, PADDED,
        PIECES)
    row = (tl.program_id(0) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < ROWS
    head = kv_head * GROUP + row % GROUP
    if BATCH > 1:
        # Rows of sequences without a tile are zeros. The last programs, which have least to do, write them.
        for empty in range(target - 1 - pid, batch, target):
            if tokens_of(empty, kv_lens_ptr, table_ptr, stride_table, empty < batch, QUERY_LEN, PADDED) == 0:
                if PDL:
                    tl.extra.cuda.gdc_wait()
                dim = tl.arange(0, BLOCK_DV)
                token = (empty * QUERY_LEN + row // GROUP).to(tl.int64)
                ptrs = out_ptr + token * stride_ot + head * stride_oh
                tl.store(ptrs[None, :] + dim[:, None], 0.0, mask=row_mask[None, :] & (dim < DV)[:, None])
    score_scale = sm_scale * GAIN * LOG2E
    out_scale = 1.0
    if not PER_TOKEN:
        score_scale = score_scale * tl.load(k_static_ptr + kv_head * stride_k_static)
    if PER_TOKENV:
        out_scale = out_scale / QMAXV
    else:
        out_scale = out_scale * tl.load(v_static_ptr + kv_head * stride_v_static)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    v_pairs_ptr = v_ptr.to(tl.pointer_type(tl.uint16))
    if PER_TOKEN:
        ks_ptr += kv_head * stride_ksh
    if PER_TOKENV:
        vs_ptr += kv_head * stride_vsh
    if v_matrix_ptr is not None:
        v_matrix_ptr += kv_head * stride_v_matrix
    sinks_ptrs = None
    if sinks_ptr is not None:
        sinks_ptrs = sinks_ptr + head
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
    # Results and counters: [slot, KV head and tile of rows]. Each segment is the next of its sequence or of its
    # program, so that their sum is a slot of its own.
    PARTIAL: tl.constexpr = PARTSV * PARTV + STATISTICS
    kv_heads = tl.num_programs(0) // ROW_TILES
    slot_step = kv_heads * (ROWS * PARTIAL)
    level_step = (target + batch) * tl.num_programs(0)

    while remaining > 0:
        kv_len = tl.load(kv_lens_ptr + seq).to(tl.int32)
        first, last = visible_tiles(kv_len, QUERY_LEN, WINDOW, BLOCK_N, BATCH)
        tile = first + (skip << shift)
        stop = tl.minimum(last, tile + (remaining << shift))
        row_table_ptr = table_ptr + seq.to(tl.int64) * stride_table
        token = seq.to(tl.int64) * QUERY_LEN + row // GROUP
        # Page ids are read a tile ahead: the compiler starts a tile's loads num_stages - 1 tiles early only if their
        # addresses are there by then, and takes a read of an address as a stage of its own. The first tile's are on
        # their way while queries are (nothing waits for a read before its first use).
        pages = tile_pages(row_table_ptr, tile, kv_len, PAGE, BLOCK_N)
        if PDL and WAIT == WAIT_QUERIES:
            tl.extra.cuda.gdc_wait()
        q_ptrs = q_ptr + token * stride_qt + head * stride_qh
        raw = load_queries(q_ptrs, row_mask, D, PART, BLOCK_P, PARTS)
        prefetch_tile(pages, tile, k_ptr, v_ptr, stride_kb, stride_vb, PART, PARTV, BLOCK_P, BLOCK_PV, PAGE, BLOCK_N,
                      CAP)
        if PREPARED:
            normalized = split_parts(behind(raw, CAP), PARTS)
            power = tl.load((q_ptrs + D).to(tl.pointer_type(tl.float32)), mask=row_mask, other=1.0)
        else:
            normalized, power = normalize_columns(split_parts(raw, PARTS), PARTS)
        queries, correction = query_operands(normalized, OFFSET, GAIN, BITS, PARTS, WARPS)
        row_scale = power * score_scale
        q_pos = kv_len - QUERY_LEN + row // GROUP
        m = tl.full([BLOCK_M], float('-inf'), tl.float32)
        l = tl.zeros([WARPS * 8, BLOCK_M], tl.float32)
        weight = tl.zeros([WARPS * 8, BLOCK_M], tl.float32)
        accs = ()
        for _ in tl.static_range(2 * PARTSV):
            accs += (tl.zeros([PAIRS, BLOCK_M], tl.float32), )
        if PDL and WAIT == WAIT_PAGES:
            tl.extra.cuda.gdc_wait()
        oldest = kv_len - QUERY_LEN - WINDOW
        for step in range(tile, stop):
            following = tile_pages(row_table_ptr, step + 1, kv_len, PAGE, BLOCK_N)
            m, l, weight, accs = attend(
                queries, row_scale, correction, q_pos, slope, m, l, weight, accs, step, oldest, kv_len, pages, k_ptr,
                v_pairs_ptr, ks_ptr, vs_ptr, stride_kb, stride_vb // 2, stride_ksb, stride_vsb, PART, PARTV, BLOCK_P,
                PAIRS, PARTS, PARTSV, PAGE, BLOCK_N, DECODE, PAIRSV, FINITEV, OFFSET, OFFSETV, PER_TOKEN, PER_TOKENV,
                QMAXV, WINDOW, SOFTCAP, ALIBI, WARPS, CAP)
            pages = following
        total_l = tl.sum(l, 0)
        too_much = tl.sum(weight, 0) * OFFSETV
        parts = interleave(accs, PARTSV, BLOCK_PV)
        values = ()
        for part in tl.static_range(PARTSV):
            values += (parts[part] * (GAINV / (1 << (BITSV * part))) - too_much[None, :], )
        acc = join_parts(values, PARTSV)
        # Numbers of the sequence's first and last unit in the batch, and the programs that have them.
        begin = first_tile(pid + 1, total, programs) - remaining - skip
        first_pid = program_of(begin, total, programs)
        pieces = program_of(begin + ((last - first - 1) >> shift), total, programs) - first_pid + 1
        out_ptrs = out_ptr + token * stride_ot + head * stride_oh
        if pieces > 1:
            slot = first_pid + seq
            first_row = (tl.program_id(0) % ROW_TILES) * BLOCK_M
            first_ptr = partial_ptr + ((slot.to(tl.int64) * kv_heads + kv_head) * ROWS + first_row) * PARTIAL
            store_partial(first_ptr + (pid - first_pid).to(tl.int64) * slot_step + (row - first_row) * PARTIAL,
                          row_mask, m, total_l, acc, PARTV, BLOCK_PV, PARTSV)
            pieces, some_m, some_l, some = _reduce_tree(
                first_ptr, ROWS - first_row, counters_ptr + slot * tl.num_programs(0) + tl.program_id(0), pid,
                first_pid, pieces, slot_step, tl.num_programs(0), level_step, PARTV, BLOCK_PV, PARTSV, COLUMNS,
                AT_ONCE)
            m = tl.reshape(repeat_columns(some_m[None, :], BLOCK_M), (BLOCK_M, ))
            total_l = tl.reshape(repeat_columns(some_l[None, :], BLOCK_M), (BLOCK_M, ))
            acc = repeat_columns(some, BLOCK_M)
        if pieces == 1:  # nobody else has any of it, or nobody has any more
            finish(out_ptrs, row_mask, m, total_l, acc, sinks_ptrs, v_matrix_ptr, out_scale, tl.minimum(kv_len, 0), DV,
                   PARTV, BLOCK_PV, PARTSV, BLOCK_DV, HADAMARDV, WARPS, CAP)
        remaining -= (stop - tile + shift) >> shift
        seq += 1
        skip = first * 0


def decode(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor,
           *, query_len: int, sm_scale: float, window: int | None = None, softcap: float | None = None,
           sinks: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None,
           workspace: Workspace | None = None, filled: bool = False, padded: bool = False,
           config: DecodeConfig | None = None) -> torch.Tensor:
    """Launch paged attention; arguments as in :func:`lmdeploy_kvq.paged_attention`, ``out`` [tokens, heads, v_dim].

    Reads lengths on the device only, so a launch can be captured in a CUDA graph.

    Args:
        workspace: what :func:`~lmdeploy_kvq.kernels.fill.fill` has prepared; None: it is allocated and prepared here.
        filled: ``fill`` is the kernel before this one in the stream, and query, lengths and block table were ready
            before it began (``fill`` waits for all before it): the work is divided while what that one writes arrives.
        padded: sequences of ``query_len`` tokens in page 0, the last of the batch, only pad it, as LMDeploy's do in a
            CUDA graph: their rows become zeros, and all others have the bits that they have without them.

    Raises:
        ValueError: shapes, strides or limits (query_len 1..16, group 1..64, batch 1..1024) violated, or a workspace of
            another batch.
    """
    check_device(query)
    _check(query, cache, block_table, kv_lens, out, query_len)
    heads, batch, kv_heads, fmt = query.size(1), kv_lens.size(0), cache.num_kv_heads, cache.format
    if workspace is None:
        workspace = Workspace.allocate(query, cache, batch, query_len, config).prepare(query, cache)
    elif workspace.made_for != (batch, *query.shape[:2]):
        raise ValueError(f'the workspace was made for {workspace.made_for} sequences, query tokens and query heads, '
                         f'not {(batch, *query.shape[:2])}')
    if workspace.rotated is not None:
        query = workspace.rotated
    config, cap, rows = workspace.config, compute_capability(query.device), heads // kv_heads * query_len
    wait = WAIT_FIRST if not filled else WAIT_QUERIES if workspace.rotated is not None else WAIT_PAGES
    v_matrix, v_stride, v_factor = operand(cache.v_transform, inverse=True)
    _decode_kernel[(kv_heads * triton.cdiv(rows, workspace.block_m), workspace.target)](
        query, *cache.tensors(), v_matrix, out, workspace.partial, workspace.counters, sinks,
        alibi_slopes, kv_lens, block_table, batch, workspace.target, *workspace.division, sm_scale, *query.stride()[:2],
        *out.stride()[:2], block_table.stride(0), v_stride, *cache.strides(), **cache.sizes(),
        PAIRS=max(cache.sizes()['BLOCK_PV'] // 2, 16), GROUP=heads // kv_heads, QUERY_LEN=query_len,
        BLOCK_M=workspace.block_m, BLOCK_N=config.block_n, BATCH=batch_block(batch), PADDED=padded and batch > 1,
        **decoding(fmt, cap, pairs=True), QMAXV=fmt.value.codec.qmax,
        WINDOW=-1 if window is None else window, SOFTCAP=0.0 if softcap is None else softcap,
        ALIBI=alibi_slopes is not None, WAIT=wait.value, PREPARED=workspace.rotated is not None,
        WARPS=config.warps,
        HADAMARDV=v_factor, **workspace.combining(cache, rows), CAP=cap, num_warps=config.num_warps,
        num_stages=config.num_stages, **dependent_launch(cap),
        **({'maxnreg': config.maxnreg} if cap and config.maxnreg else {}))
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
