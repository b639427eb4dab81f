"""Addresses of paged tokens: where a tile of a sequence lies, which part of a batch a program handles.

No arithmetic on values here.

Pages: K and V are [block, head, token / 16, 16 x bytes of a row]. Within a group of 16 tokens, each 16 x 16 block of
bytes stands in the order in which the lanes of a warp take it as the left operand of a tensor-core product
(docs/formats.md): loads are wide and contiguous whatever the page size is, and no code changes lanes. Scales are
[block, head, token]. Block and head strides are arbitrary: LMDeploy packs all tensors of a block into one pool. Offsets
are int64.
"""
from __future__ import annotations

import triton
import triton.language as tl

SMALL_SHARE = tl.constexpr(16)
"""Tiles of a program up to which there may be fewer programs than fit the GPU: beyond, bandwidth is what counts."""

FEWEST = tl.constexpr(0.625)
"""The part of the programs that fit, that there are at least then."""

FEW_TILES = tl.constexpr(4)
"""Tiles that a program takes rather than leaving more results than are combined at once."""


@triton.jit
def key_offset(offset, dim, PART: tl.constexpr):
    """Where byte ``dim`` of the K row of the page's token ``offset`` lies, from the start of page and head."""
    return ((offset // 16) * (16 * PART) + (dim // 16) * 256 + (offset % 8) * 32 + (dim // 4 % 4) * 8
            + (offset // 8 % 2) * 4 + dim % 4)


@triton.jit
def value_offset(offset, dim, PART: tl.constexpr):
    """Where byte ``dim`` of the V row of the page's token ``offset`` lies, from the start of page and head."""
    return ((offset // 16) * (16 * PART) + (dim // 16) * 256 + (dim // 4 % 2) * 128 + (offset // 4 % 4) * 32
            + (dim % 4) * 8 + (dim // 8 % 2) * 4 + offset % 4)


@triton.jit
def key_rows(groups):
    """K's groups as they lie in memory, [n, 16 * dim], as a matrix [16 * n tokens, dim]. Moves no data by itself."""
    N: tl.constexpr = groups.shape[0]
    DIM: tl.constexpr = groups.shape[1] // 16
    parts = tl.reshape(groups, (N, DIM // 16, 8, 4, 2, 4))
    return tl.reshape(tl.permute(parts, (0, 4, 2, 1, 3, 5)), (N * 16, DIM))


@triton.jit
def value_columns(groups):
    """V's groups as they lie in memory, [n, 16 * dim], as a matrix [dim, 16 * n tokens]. Moves no data by itself."""
    N: tl.constexpr = groups.shape[0]
    DIM: tl.constexpr = groups.shape[1] // 16
    parts = tl.reshape(groups, (N, DIM // 16, 2, 4, 4, 2, 4))
    return tl.reshape(tl.permute(parts, (1, 5, 2, 4, 0, 3, 6)), (DIM, N * 16))


@triton.jit
def visible_tiles(kv_len, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Range [first, last) of BLOCK_N-token tiles that any of a sequence's last QUERY_LEN rows sees.

    An empty sequence has one tile, of which nothing is visible, so that somebody writes its rows.
    """
    if WINDOW >= 0:
        first = tl.maximum(kv_len - QUERY_LEN - WINDOW, 0) // BLOCK_N
    else:
        first = kv_len * 0
    return first, tl.maximum(tl.cdiv(kv_len, BLOCK_N), first + 1)


@triton.jit
def first_program(tile, total, programs):
    """The program that :func:`program_share` gives tile ``tile`` of ``total`` to."""
    return (((tile.to(tl.int64) + 1) * programs - 1) // total).to(tl.int32)


@triton.jit
def _fewer_programs(programs, longest, batch, total, target, PIECES: tl.constexpr):
    """``programs``, or fewer where shares are small, for ``batch`` sequences; see :func:`program_share`."""
    share = tl.cdiv(total, target)
    short = longest <= FEW_TILES * PIECES
    if (share <= SMALL_SHARE) & ((share > 1) | (short & (longest > PIECES))):
        pieces = tl.maximum(longest // share, 1)
        few = (pieces > PIECES) & short
        pieces = tl.where(few, PIECES, pieces)
        pieces = tl.cdiv(longest, tl.cdiv(longest, pieces))  # as long as the longest of them with fewer
        whole = tl.cdiv(share, longest)  # sequences of a program, if it has any whole
        aligned = tl.cdiv(total * pieces, longest * whole)
        alike = 4 * total >= 3 * batch * longest  # else what suits the longest sequence suits no other
        programs = tl.where(few | (alike & (aligned >= programs * FEWEST)), aligned, programs)
    return programs


@triton.jit
def program_share(pid, kv_lens_ptr, batch, target, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr,
                  BLOCK_N: tl.constexpr, BATCH: tl.constexpr, PIECES: tl.constexpr):
    """An equal share of a ragged batch's tiles for each of ``target`` programs or fewer, wherever sequences begin.

    Every program derives the same plan from the lengths on the device (CUDA graphs freeze the grid, not the lengths).
    This is the partition of stream-K matrix products (Osama et al., 2023, arXiv:2301.03598), with fewer programs where
    shares are small: as many as leave few results of a sequence, or divide sequences of about one length evenly, or
    take them whole. docs/performance.md has the measurements behind the limits.

    Args:
        pid: index of this program among ``target``.
        kv_lens_ptr: [batch] lengths.
        batch: sequences; ``BATCH`` is a power of two, as many or more.
        PIECES: results of a sequence that are combined at once, nearly.

    Returns:
        (seq, tile, count, total, programs): the sequence and the tile inside it to begin with, how many tiles to take
        from there on through the following sequences (0 for programs too many), all tiles, and how many programs share
        them.
    """
    index = tl.arange(0, BATCH)
    lens = tl.load(kv_lens_ptr + index, mask=index < batch, other=0).to(tl.int32)
    first, last = visible_tiles(lens, QUERY_LEN, WINDOW, BLOCK_N)
    tiles = tl.where(index < batch, last - first, 0)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    programs = tl.minimum(target, total)
    if total > PIECES:  # else there is nothing to gain, and every division takes time at the start of a short launch
        programs = _fewer_programs(programs, tl.max(tiles, 0), batch, total, target, PIECES)
    begin = (pid.to(tl.int64) * total // tl.maximum(programs, 1)).to(tl.int32)
    end = ((pid.to(tl.int64) + 1) * total // tl.maximum(programs, 1)).to(tl.int32)
    seq = tl.sum((ends <= begin).to(tl.int32), 0)
    before = tl.sum(tl.where(index < seq, tiles, 0), 0)
    tile = begin - before + tl.sum(tl.where(index == seq, first, 0), 0)
    return seq, tile, tl.where(pid < programs, end - begin, 0), total, programs


@triton.jit
def locate_tile(pid, first_ptr, last_ptr, batch, BLOCK_N: tl.constexpr, BATCH: tl.constexpr):
    """Which tile of a ragged batch of token ranges [first, last) the ``pid``-th program takes.

    Tiles are BLOCK_N tokens from a multiple of BLOCK_N on, as in the pages, so a range's first and last may be partial.

    Args:
        pid: index of this program.
        first_ptr, last_ptr: [batch] the ranges; without ``first_ptr`` (None) they begin at 0. last >= first.
        batch: sequences; ``BATCH`` is a power of two, as many or more.

    Returns:
        (seq, tile, first, last, start): the sequence, the tile's number in it, its range, and the dense row of
        ``first`` when ranges lie one after another. With ``seq == batch`` there is no tile left; ``tile`` then counts
        those that follow ``start``, the row behind the last range.
    """
    index = tl.arange(0, BATCH)
    lasts = tl.load(last_ptr + index, mask=index < batch, other=0).to(tl.int32)
    firsts = lasts * 0
    if first_ptr is not None:
        firsts = tl.load(first_ptr + index, mask=index < batch, other=0).to(tl.int32)
    tiles = tl.where(lasts > firsts, tl.cdiv(lasts, BLOCK_N) - firsts // BLOCK_N, 0)
    ends = tl.cumsum(tiles, 0)
    seq = tl.minimum(tl.sum((ends <= pid).to(tl.int32), 0), batch)
    before, mine = index < seq, index == seq
    first = tl.sum(tl.where(mine, firsts, 0), 0)
    tile = pid - tl.sum(tl.where(before, tiles, 0), 0) + first // BLOCK_N
    start = tl.sum(tl.where(before, lasts - firsts, 0).to(tl.int64), 0)
    return seq, tile, first, tl.sum(tl.where(mine, lasts, 0), 0), start


@triton.jit
def tile_block(table_ptr, tile, kv_len, lane, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids (int64) of a tile: a scalar where the tile lies in one page, else one for each token in ``lane``.

    Args:
        table_ptr: the sequence's row of the block table. It is not read beyond kv_len.
        tile: index of the tile in the sequence.
        kv_len: tokens of the sequence.
        lane: token offsets inside the tile.
    """
    if BLOCK_N <= PAGE:
        return tl.load(table_ptr + tile * BLOCK_N // PAGE, mask=tile * BLOCK_N < kv_len, other=0).to(tl.int64)
    else:
        # One scalar read per page: a read per token would cost an instruction and a register for each.
        PAGES: tl.constexpr = BLOCK_N // PAGE
        block = tl.zeros_like(lane).to(tl.int64)
        for page in tl.static_range(0, PAGES):
            there = (tile * PAGES + page) * PAGE < kv_len
            other = tl.load(table_ptr + tile * PAGES + page, mask=there, other=0).to(tl.int64)
            block = tl.where(lane // PAGE >= page, other, block)
        return block


@triton.jit
def tile_offset(tile, lane, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets inside their page of tokens ``lane`` of a tile."""
    if BLOCK_N <= PAGE:
        return (tile % (PAGE // BLOCK_N)) * BLOCK_N + lane
    else:
        return lane % PAGE


@triton.jit
def token_slots(token, num_tokens, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,
                PAGE: tl.constexpr, SLOTS_GIVEN: tl.constexpr, UNIFORM_QUERY_LEN: tl.constexpr, BATCH: tl.constexpr):
    """Cache slot (block * PAGE + offset, int64) of new tokens, negative where nothing is to be written.

    Either read from ``slot_ptr`` (SLOTS_GIVEN), or derived as LMDeploy lays a batch out: sequence ``s`` owns tokens
    ``q_start[s] .. q_start[s] + q_len[s]``, which are the last ``q_len[s]`` of its ``kv_len[s]``. UNIFORM_QUERY_LEN
    greater than zero says that every sequence has that many, which saves the search.
    """
    valid = token < num_tokens
    if SLOTS_GIVEN:
        return tl.load(slot_ptr + token, mask=valid, other=-1).to(tl.int64)
    else:
        if UNIFORM_QUERY_LEN > 0:
            seq = token // UNIFORM_QUERY_LEN
            valid = valid & (seq < batch)
            back = UNIFORM_QUERY_LEN - token % UNIFORM_QUERY_LEN
        else:
            index = tl.arange(0, BATCH)
            starts = tl.load(q_start_ptr + index, mask=index < batch, other=0).to(tl.int32)
            ends = starts + tl.load(q_len_ptr + index, mask=index < batch, other=0).to(tl.int32)
            ends = tl.where(index < batch, ends, 0x7FFFFFFF)
            seq = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
            valid = valid & (seq < batch)
            end = tl.load(q_start_ptr + seq, mask=valid, other=0).to(tl.int32) + tl.load(
                q_len_ptr + seq, mask=valid, other=0).to(tl.int32)
            back = end - token
        position = tl.load(kv_len_ptr + seq, mask=valid, other=0).to(tl.int32) - back
        valid = valid & (position >= 0)
        block = tl.load(table_ptr + seq.to(tl.int64) * stride_table + position // PAGE, mask=valid, other=0)
        return tl.where(valid, block.to(tl.int64) * PAGE + position % PAGE, -1)
