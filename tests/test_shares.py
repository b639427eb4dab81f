"""How decode divides a batch among programs: every tile once, evenly, and in few pieces where shares are small."""
import random

import pytest
import torch
import triton
import triton.language as tl

from lmdeploy_kvq.kernels.launch import interpreted
from lmdeploy_kvq.kernels.tiles import (
    FEW_SEQUENCES,
    FEW_TILES,
    FEWEST,
    ONE_EACH,
    WHOLE,
    first_tile,
    program_of,
    program_share,
)

TOKENS = 128
MUCH = 64


@triton.jit
def _shares(lens_ptr, out_ptr, batch, target, each, most, BATCH: tl.constexpr, PIECES: tl.constexpr):
    """Of one program: sequence, unit, count, all, programs, who it thinks begins with its first unit, and the shift."""
    pid = tl.program_id(0)
    seq, skip, count, total, programs, shift = program_share(
        pid, lens_ptr, lens_ptr, 0, batch, target, each, most, 1, -1, 128, BATCH, False, PIECES)
    begin = first_tile(pid + 1, total, programs) - count
    tl.store(out_ptr + pid * 7, seq)
    tl.store(out_ptr + pid * 7 + 1, skip)
    tl.store(out_ptr + pid * 7 + 2, count)
    tl.store(out_ptr + pid * 7 + 3, total)
    tl.store(out_ptr + pid * 7 + 4, programs)
    tl.store(out_ptr + pid * 7 + 5, program_of(begin, total, programs))
    tl.store(out_ptr + pid * 7 + 6, shift)


def shares(tiles: list[int], target: int, each: int, pieces: int = 16) -> torch.Tensor:
    """[target, 7] of a batch of so many tiles per sequence; checks that every unit is taken once, in order, and that
    sequences are units where none has more than two tiles. Empty ones have no unit."""
    device = 'cpu' if interpreted() else 'cuda'
    lens = torch.tensor([n * TOKENS for n in tiles], dtype=torch.int32, device=device)
    out = torch.full((target, 7), -1, dtype=torch.int32, device=device)
    _shares[(target, )](lens, out, len(tiles), target, each, MUCH * each, triton.next_power_of_2(len(tiles)), pieces)
    out = out.cpu()
    taken = []
    whole = max(tiles) <= 2**WHOLE.value
    tiles = [min(n, 1) if whole else n for n in tiles]
    for pid, (seq, tile, count, total, programs, first, shift) in enumerate(out.tolist()):
        assert shift == (WHOLE.value if whole else 0)
        assert total == sum(tiles) and 1 <= programs <= min(target, total)
        assert (count > 0) == (pid < programs) and (not count or first == pid)
        for _ in range(count):
            while tile >= tiles[seq]:
                seq, tile = seq + 1, 0
            taken.append((seq, tile))
            tile += 1
    assert taken == [(seq, tile) for seq, n in enumerate(tiles) for tile in range(n)]
    return out


@pytest.mark.parametrize('seed', range(24))
def test_every_tile_once_and_evenly(seed):
    """Whatever the lengths: equal shares, to one tile; and no program has much more to do than it could have. In every
    other batch, which is larger, a third of the sequences are empty."""
    draw = random.Random(seed)
    tiles = [draw.randint(1, 70) for _ in range(draw.randint(1, 9))]
    full, target = len(tiles), draw.randint(1, 50)
    if seed % 2:
        tiles = [draw.choice((0, draw.randint(1, 3 + seed), draw.randint(1, 3))) for _ in range(draw.randint(33, 200))]
        full = sum(n > 0 for n in tiles)
    each = draw.randint(1, target)
    out = shares(tiles, target, each, draw.choice((2, 8, 16)))
    counts, total = out[:, 2][out[:, 2] > 0], out[0, 3].item()
    assert counts.max() - counts.min() <= 1
    wanted = target
    if total <= MUCH * each and (full <= FEW_SEQUENCES.value or 4 * total >= 3 * full * max(tiles)):
        small = total <= ONE_EACH.value * each and full <= each
        wanted = each if small else 2 * each if full <= 2 * each else target
    assert counts.max() <= max(FEW_TILES.value, -(-total // max(1, int(min(target, total, wanted) * FEWEST.value))))


@pytest.mark.parametrize('tiles, target, each, pieces, programs', [
    ([32], 49, 16, 16, 16),  # two levels of combining otherwise
    ([64], 49, 16, 16, 16),
    ([128], 49, 16, 16, 16),  # one on each multiprocessor of eight KV heads
    ([256], 49, 16, 16, 32),  # two
    ([81, 3, 6, 68], 49, 16, 16, 29),  # as many as leave sixteen results of the longest
    ([81, 3, 6, 68], 198, 66, 16, 66),  # too few for two KV heads
    ([81, 3, 6, 68, 1, 112, 6, 79, 20, 8, 33, 14], 198, 66, 16, 198),  # many of various lengths: all
    ([4] * 32, 49, 16, 16, 32),  # a sequence each
    ([4] * 64, 49, 16, 16, 32),  # two sequences each
    ([16] * 32, 49, 16, 16, 32),
    ([32] * 32, 49, 16, 16, 32),
    ([32] * 64, 49, 16, 16, 49),  # much to read: as many as fit
    ([1] * 5, 49, 16, 16, 5),
    ([2] * 5, 49, 16, 16, 5),  # not divided
    ([2, 1, 2], 49, 16, 16, 3),
    ([1, 2] * 60, 49, 16, 16, 40),  # three sequences each
    ([2] * 300, 198, 66, 8, 150),
    ([16], 198, 66, 8, 8),  # results of eight rows are read four at a time
    ([64], 198, 66, 8, 64),
    ([4] * 64, 198, 66, 8, 64),
    ([128] * 16, 198, 66, 8, 128),
])
def test_small_shares(tiles, target, each, pieces, programs):
    """The loads of docs/performance.md."""
    assert shares(tiles, target, each, pieces)[0, 4] == programs


@pytest.mark.parametrize('tiles', [
    [81, 3, 6, 68], [1] * 5, [2, 1, 2], [32], [1] * 40, [1, 2] * 60, [32] * 33, [81, 3, 6, 68, 1, 112, 6, 79, 20, 8],
])
def test_empty_sequences_change_nothing(tiles):
    """At the end, as CUDA graphs pad a batch, or between: the others are divided as they are without them."""
    plain = shares(tiles, 198, 66)
    padded = shares(tiles + [0] * (128 - len(tiles)), 198, 66)
    assert torch.equal(padded[:plain[0, 4]], plain[:plain[0, 4]]) and not padded[plain[0, 4]:, 2].any()
    between = shares([0] * 3 + [n for some in tiles for n in (some, 0)], 198, 66)
    assert torch.equal(between[:, 2:], plain[:, 2:])


def test_a_thousand_sequences_of_a_million_tokens():
    """Products of tiles do not overflow; one program says how many there are."""
    device = 'cpu' if interpreted() else 'cuda'
    lens = torch.full((1024, ), 1 << 20, dtype=torch.int32, device=device)
    out = torch.zeros(7, dtype=torch.int32, device=device)
    _shares[(1, )](lens, out, 1024, 198, 66, MUCH * 66, 1024, 16)
    assert out[:5].tolist() == [0, 0, (1 << 23) // 198 + 1, 1 << 23, 198]  # the first take one more
