"""Addresses of paged tokens: where a tile of a sequence lies, which part of a batch a program handles.

No arithmetic on values here.

Pages: K and V are [block, head, token, bytes of a row], scales [block, head, token]. A page and head is one contiguous
piece of each. Block and head strides are arbitrary: LMDeploy packs all tensors of a block into one pool. Offsets are
int64.
"""
from __future__ import annotations

import triton
import triton.language as tl

ONE_EACH = tl.constexpr(8)
"""Tiles per multiprocessor and KV head's share of them, up to which four warps on each are enough: see
:func:`program_share`."""

FEW_SEQUENCES = tl.constexpr(8)
"""Sequences up to which it does not matter for that whether they are about as long."""

FEWEST = tl.constexpr(0.625)
"""The part of those programs, that there are at least where even shares are better than equal ones."""

FEW_TILES = tl.constexpr(4)
"""Tiles that a program takes rather than leaving more results than are combined at once."""

COUNT = tl.constexpr(23)
TILES = tl.constexpr((1 << 23) - 1)
"""Bits of a sum that are tiles; those from COUNT on are sequences, so that one reduction has both."""

WHOLE = tl.constexpr(1)
"""Sequences of 2^WHOLE tiles are not divided where none is longer: a tile takes less time than to combine results."""


@triton.jit
def visible_tiles(kv_len, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BATCH: tl.constexpr):
    """Range [first, last) of BLOCK_N-token tiles that any of a sequence's last QUERY_LEN rows sees.

    An empty sequence has none; the only one of a batch has one, of which nothing is visible, so that somebody writes
    its rows without more ado.
    """
    if WINDOW >= 0:
        first = tl.maximum(kv_len - QUERY_LEN - WINDOW, 0) // BLOCK_N
    else:
        first = kv_len * 0
    last = tl.cdiv(kv_len, BLOCK_N)
    if BATCH == 1:
        last = tl.maximum(last, first + 1)
    return first, last


@triton.jit
def tokens_of(seq, kv_lens_ptr, table_ptr, stride_table, mask, QUERY_LEN: tl.constexpr, PADDED: tl.constexpr):
    """Lengths of sequences ``seq``, 0 where ``mask`` is not set.

    With PADDED also 0 for those that only pad the batch of a CUDA graph, as LMDeploy's do behind all others: nothing
    but QUERY_LEN new tokens, in page 0, which its allocator gives to nobody.
    """
    lens = tl.load(kv_lens_ptr + seq, mask=mask, other=0).to(tl.int32)
    if PADDED:
        page = tl.load(table_ptr + tl.cast(seq, tl.int64) * stride_table, mask=mask & (lens == QUERY_LEN), other=1)
        lens = tl.where(page == 0, 0, lens)
    return lens


@triton.jit
def first_tile(pid, total, programs):
    """The first of ``total`` tiles that program ``pid`` of ``programs`` takes; the inverse of :func:`program_of`.

    The first programs take one tile more than others where they cannot all take as many.
    """
    share = total // tl.maximum(programs, 1)
    return pid * share + tl.minimum(pid, total - programs * share)


@triton.jit
def program_of(tile, total, programs):
    """The program that takes tile ``tile`` of ``total``."""
    share = total // programs
    larger = total - programs * share  # programs with a tile more
    low = tile < larger * (share + 1)
    behind = tl.where(low, tile, tile - larger * (share + 1))
    return tl.where(low, 0, larger) + behind // tl.where(low, share + 1, share)


@triton.jit
def _ratio(a, b):
    """floor(a / b) of positive integers, a below 2^20, in a third of the time of an integer division."""
    return ((a.to(tl.float32) + 0.5) / b.to(tl.float32)).to(tl.int32)


@triton.jit
def _ratio_up(a, b):
    """ceil(a / b), like :func:`_ratio`."""
    return _ratio(a + b - 1, b)


@triton.jit
def _fewer_programs(programs, longest, sequences, total, each, PIECES: tl.constexpr):
    """``programs``, or fewer that divide ``sequences`` better; see :func:`program_share`."""
    alike = 4 * total >= 3 * sequences * longest
    if alike | (sequences <= FEW_SEQUENCES):
        # A sequence more is several reads in a row: no fewer programs than sequences.
        if (total <= ONE_EACH * each) & (sequences <= each):
            programs = tl.minimum(programs, each)
        elif sequences <= 2 * each:
            programs = tl.minimum(programs, 2 * each)
    share = _ratio_up(total, programs)
    short = longest <= FEW_TILES * PIECES
    if (share > 1) | (short & (longest > PIECES)):
        pieces = tl.maximum(_ratio(longest, share), 1)
        few = (pieces > PIECES) & short
        pieces = tl.where(few, PIECES, pieces)
        pieces = _ratio_up(longest, _ratio_up(longest, pieces))  # as long as the longest of them with fewer
        whole = _ratio_up(share, longest)  # sequences of a program, if it has any whole
        aligned = _ratio_up(total * pieces, longest * whole)
        # Where they are not alike, what suits the longest sequence suits no other, but for one round of results.
        aligned = tl.where(alike | few, aligned, _ratio(total * (PIECES - 1), longest))
        programs = tl.where(few | ((aligned >= programs * FEWEST) & (aligned < programs)), aligned, programs)
    return programs


@triton.jit
def _row_units(row_total, shift):
    """Units of a row of sequences, from its sum of tiles and sequences: sequences where those are units."""
    return tl.where(shift > 0, row_total >> COUNT, row_total & TILES)


@triton.jit
def program_share(pid, kv_lens_ptr, table_ptr, stride_table, batch, target, each, most, QUERY_LEN: tl.constexpr,
                  WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BATCH: tl.constexpr, PADDED: tl.constexpr,
                  PIECES: tl.constexpr):
    """An equal share of a ragged batch's tiles for each of ``target`` programs or fewer, wherever sequences begin.

    Every program derives the same plan from the lengths on the device (CUDA graphs freeze the grid, not the lengths).
    This is the partition of stream-K matrix products (Osama et al., 2023, arXiv:2301.03598), with fewer programs where
    shares are small: one or two on each multiprocessor, and of those as many as leave few results of a sequence, or
    divide sequences of about one length evenly, or take them whole. docs/performance.md has the measurements behind
    the limits. Sequences that only pad a batch for its CUDA graph (:func:`tokens_of`) have no tiles and do not count:
    they must not change how the others are divided, for that is what decides their last bits.

    Lengths come in rows of 32, so that a warp has all of them and no sum needs a barrier.

    Args:
        pid: index of this program among ``target``.
        kv_lens_ptr: [batch] lengths, less than 2^23 tiles in 32 of them (in BATCH / 8 where that is more).
        table_ptr, stride_table: the block table, which is read with PADDED only.
        batch: sequences; ``BATCH`` is a power of two, as many or more.
        each: of ``target``, how many make four warps on each multiprocessor.
        most: tiles beyond which bandwidth is what counts, and all programs work.
        PIECES: results of a sequence that are combined at once, nearly.

    Returns:
        (seq, skip, count, total, programs, shift): the sequence to begin with and how many of its visible tiles others
        take before, how many tiles to take from there on through the following sequences (0 for programs too many), all
        tiles, and how many programs share them; all in units of 2^shift tiles, of which a sequence's last may be part.
    """
    ROW: tl.constexpr = BATCH if BATCH <= 32 else max(32, BATCH // 8)
    lane = tl.arange(0, ROW)
    rows, row_totals = (), ()
    total, sequences = batch * 0, batch * 0
    largest = tl.zeros([ROW], tl.int32)
    for start in tl.static_range(0, BATCH, ROW):
        lens = tokens_of(start + lane, kv_lens_ptr, table_ptr, stride_table, start + lane < batch, QUERY_LEN, PADDED)
        first, last = visible_tiles(lens, QUERY_LEN, WINDOW, BLOCK_N, BATCH)
        tiles = last - first
        rows += (tiles, )
        if BATCH == 1:
            row_total = tl.sum(tiles, 0)
            total, sequences = row_total, batch
        else:
            row_total = tl.sum(tl.where(tiles > 0, tiles + (TILES + 1), 0), 0)
            total += row_total & TILES
            sequences += row_total >> COUNT
        row_totals += (row_total, )
        largest = tl.maximum(largest, tiles)
    shift = batch * 0
    if total <= sequences << WHOLE:  # noqa: SIM102 - else some sequence has more, and there is nothing to reduce
        if (tl.max(largest, 0) - 1) >> WHOLE == 0:
            shift += WHOLE
            total = sequences * 1
            largest = tl.minimum(largest, 1)
    programs = tl.minimum(target, total)
    if (total > PIECES) & (total <= most):  # else there is nothing to gain
        programs = _fewer_programs(programs, tl.max(largest, 0), sequences, total, each, PIECES)
    begin = first_tile(pid, total, programs)
    count = tl.where(pid < programs, first_tile(pid + 1, total, programs) - begin, 0)
    # The row of the sequence to begin with, then its place there.
    seq, skip, tiles = begin * 0, begin, rows[0]  # type: ignore[misc]
    above = _row_units(row_totals[0], shift)  # type: ignore[misc]
    for row in tl.static_range(1, BATCH // ROW):
        later = above <= begin
        tiles = tl.where(later, rows[row], tiles)
        seq = tl.where(later, row * ROW, seq)
        skip = tl.where(later, begin - above, skip)
        above += _row_units(row_totals[row], shift)
    tiles = tl.where(shift > 0, tl.minimum(tiles, 1), tiles)
    ends = tl.cumsum(tiles, 0)
    over = ends <= skip
    seq += tl.sum(over.to(tl.int32), 0)
    skip -= tl.max(tl.where(over, ends, 0), 0)
    return seq, skip, count, total, programs, shift


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
def tile_pages(table_ptr, tile, kv_len, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of a tile, a tuple of scalars: one read per page, where a read per token would cost a register for each.

    Args:
        table_ptr: the sequence's row of the block table. It is not read beyond kv_len; page 0 is for what is not there.
        tile: index of the tile in the sequence.
        kv_len: tokens of the sequence.
    """
    PAGES: tl.constexpr = (BLOCK_N + PAGE - 1) // PAGE
    pages = ()
    for page in tl.static_range(0, PAGES):
        token = tile * BLOCK_N + page * PAGE
        pages += (tl.load(table_ptr + token // PAGE, mask=token < kv_len, other=0), )
    return pages


@triton.jit
def block_of(pages, lane, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids (int64) of token offsets ``lane`` of a tile, from :func:`tile_pages`; a scalar where it has one page."""
    if BLOCK_N <= PAGE:
        return pages[0].to(tl.int64)
    else:
        block = tl.zeros_like(lane).to(tl.int64)
        for page in tl.static_range(0, BLOCK_N // PAGE):
            block = tl.where(lane // PAGE >= page, pages[page].to(tl.int64), block)
        return block


@triton.jit
def tile_block(table_ptr, tile, kv_len, lane, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids (int64) of a tile: a scalar where the tile lies in one page, else one for each token in ``lane``.

    Args:
        table_ptr, tile, kv_len: see :func:`tile_pages`.
        lane: token offsets inside the tile.
    """
    return block_of(tile_pages(table_ptr, tile, kv_len, PAGE, BLOCK_N), lane, PAGE, BLOCK_N)


@triton.jit
def tile_offset(tile, lane, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets inside their page of tokens ``lane`` of a tile."""
    if BLOCK_N <= PAGE:
        return (tile % (PAGE // BLOCK_N)) * BLOCK_N + lane
    else:
        return lane % PAGE


@triton.jit
def token_places(token, num_tokens, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,
                 PAGE: tl.constexpr, SLOTS_GIVEN: tl.constexpr, UNIFORM_QUERY_LEN: tl.constexpr, BATCH: tl.constexpr):
    """Page (int64) of new tokens and offset in it, and whether they are to be written at all.

    Either read from ``slot_ptr`` (SLOTS_GIVEN), or derived as LMDeploy lays a batch out: sequence ``s`` owns tokens
    ``q_start[s] .. q_start[s] + q_len[s]``, which are the last ``q_len[s]`` of its ``kv_len[s]``. UNIFORM_QUERY_LEN
    greater than zero says that every sequence has that many, which saves the search.
    """
    valid = token < num_tokens
    if SLOTS_GIVEN:
        slot = tl.load(slot_ptr + token, mask=valid, other=-1).to(tl.int64)
        valid = slot >= 0
        slot = tl.maximum(slot, 0)
        return slot // PAGE, slot % PAGE, valid
    else:
        if UNIFORM_QUERY_LEN > 0:
            seq = token // UNIFORM_QUERY_LEN
            valid = valid & (seq < batch)
            back = UNIFORM_QUERY_LEN - token % UNIFORM_QUERY_LEN
        elif BATCH == 1:
            seq = token * 0
            back = tl.load(q_start_ptr).to(tl.int32) + tl.load(q_len_ptr).to(tl.int32) - token
            valid = valid & (back > 0)
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
        if BATCH == 1 and UNIFORM_QUERY_LEN == 0:
            position = tl.load(kv_len_ptr).to(tl.int32) - back
        else:
            position = tl.load(kv_len_ptr + seq, mask=valid, other=0).to(tl.int32) - back
        valid = valid & (position >= 0)
        block = tl.load(table_ptr + seq.to(tl.int64) * stride_table + position // PAGE, mask=valid, other=0)
        return block.to(tl.int64), position % PAGE, valid
