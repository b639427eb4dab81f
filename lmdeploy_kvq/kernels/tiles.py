"""Paging on the device: which sequence a program serves, and where tokens live. Addresses only, no values.

Pages: K codes are [block, head, token, dim] and V codes [block, head, dim, token] (tokens contiguous, because the PV
product contracts over tokens); scales are [block, head, token]. Block strides are arbitrary: LMDeploy packs all
tensors of a block into one pool. Offsets are int64.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_tiles(kv_len, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Range [first, last) of BLOCK_N-token tiles that any of a sequence's last QUERY_LEN rows sees."""
    last = tl.cdiv(kv_len, BLOCK_N)
    if WINDOW >= 0:
        first = tl.maximum(kv_len - QUERY_LEN - WINDOW, 0) // BLOCK_N
    else:
        first = kv_len * 0
    return first, last


@triton.jit
def locate_split(pid, kv_lens_ptr, batch, target, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
                 BATCH: tl.constexpr, MIN_TILES: tl.constexpr):
    """Share the tiles of a ragged batch evenly among about ``target`` programs.

    Every program derives the same plan from the lengths on the device (CUDA graphs freeze the grid, not the lengths):
    a sequence gets one split per ``chunk`` tiles, at least one; split ``i`` of ``n`` takes an even part of its tiles.

    Args:
        pid: index of this program among ``target + batch``.
        kv_lens_ptr: [batch] lengths.
        batch: sequences; ``BATCH`` is its next power of two.

    Returns:
        (seq, split, splits, kv_len): ``seq >= batch`` where nothing is left to do.
    """
    index = tl.arange(0, BATCH)
    lens = tl.load(kv_lens_ptr + index, mask=index < batch, other=0).to(tl.int32)
    first, last = visible_tiles(lens, QUERY_LEN, WINDOW, BLOCK_N)
    tiles = tl.maximum(last - first, 0)
    chunk = tl.maximum(tl.cdiv(tl.sum(tiles, 0), target), MIN_TILES)
    splits = tl.where(index < batch, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)
    ends = tl.cumsum(splits, 0)
    seq = tl.sum((ends <= pid).to(tl.int32), 0)
    mine = index == seq
    count = tl.sum(tl.where(mine, splits, 0), 0)
    split = pid - (tl.sum(tl.where(mine, ends, 0), 0) - count)
    kv_len = tl.sum(tl.where(mine, lens, 0), 0)
    return seq, split, count, kv_len


@triton.jit
def locate_tile(pid, first_ptr, last_ptr, batch, BLOCK_N: tl.constexpr, BATCH: tl.constexpr):
    """Which tile of a ragged batch of token ranges [first, last) the ``pid``-th program takes.

    Tiles are BLOCK_N tokens from a multiple of BLOCK_N on, as in the pages, so a range's first and last may be partial.

    Args:
        pid: index of this program.
        first_ptr, last_ptr: [batch] the ranges; without ``first_ptr`` (None) they begin at 0. last >= first.
        batch: sequences; ``BATCH`` is its next power of two.

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
def tile_tokens(table_ptr, tile, kv_len, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where tile ``tile`` of a sequence lives.

    Args:
        table_ptr: the sequence's row of the block table.
        kv_len: tokens of the sequence; the table is not read beyond them.

    Returns:
        block (a scalar where a tile lies in one page, else [BLOCK_N]), offset [BLOCK_N] inside the page, and
        position [BLOCK_N] inside the sequence.
    """
    lane = tl.arange(0, BLOCK_N)
    position = tile * BLOCK_N + lane
    if BLOCK_N <= PAGE:
        # One page-table read per tile keeps "offsets are contiguous" provable, which V's wide loads need.
        block = tl.load(table_ptr + tile * BLOCK_N // PAGE).to(tl.int64)
        offset = (tile % (PAGE // BLOCK_N)) * BLOCK_N + lane
    else:
        page = tile * (BLOCK_N // PAGE) + lane // PAGE
        block = tl.load(table_ptr + page, mask=position < kv_len, other=0).to(tl.int64)
        offset = lane % PAGE
    return block, offset, position


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
