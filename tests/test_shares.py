"""How decode divides a batch among programs: every tile once, evenly, and in few pieces where shares are small."""
import random

import pytest
import torch
import triton
import triton.language as tl

from lmdeploy_kvq.kernels.launch import interpreted
from lmdeploy_kvq.kernels.tiles import FEW_TILES, FEWEST, first_tile, program_of, program_share

TOKENS = 128


@triton.jit
def _shares(lens_ptr, out_ptr, batch, target, BATCH: tl.constexpr, PIECES: tl.constexpr):
    """Of one program: sequence, tile, count, all tiles, programs, and who it thinks begins with its first tile."""
    pid = tl.program_id(0)
    seq, skip, count, total, programs = program_share(pid, lens_ptr, batch, target, 1, -1, 128, BATCH, PIECES)
    begin = first_tile(pid + 1, total, programs) - count
    tl.store(out_ptr + pid * 6, seq)
    tl.store(out_ptr + pid * 6 + 1, skip)
    tl.store(out_ptr + pid * 6 + 2, count)
    tl.store(out_ptr + pid * 6 + 3, total)
    tl.store(out_ptr + pid * 6 + 4, programs)
    tl.store(out_ptr + pid * 6 + 5, program_of(begin, total, programs))


def shares(tiles: list[int], target: int, pieces: int = 16) -> torch.Tensor:
    """[target, 6] of a batch of so many tiles per sequence; checks that every tile is taken once, in order."""
    device = 'cpu' if interpreted() else 'cuda'
    lens = torch.tensor([n * TOKENS for n in tiles], dtype=torch.int32, device=device)
    out = torch.full((target, 6), -1, dtype=torch.int32, device=device)
    _shares[(target, )](lens, out, len(tiles), target, triton.next_power_of_2(len(tiles)), pieces)
    out = out.cpu()
    taken = []
    for pid, (seq, tile, count, total, programs, first) in enumerate(out.tolist()):
        assert total == sum(tiles) and 1 <= programs <= min(target, total)
        assert (count > 0) == (pid < programs) and (not count or first == pid)
        for _ in range(count):
            taken.append((seq, tile))
            seq, tile = (seq, tile + 1) if tile + 1 < tiles[seq] else (seq + 1, 0)
    assert taken == [(seq, tile) for seq, n in enumerate(tiles) for tile in range(n)]
    return out


@pytest.mark.parametrize('seed', range(12))
def test_every_tile_once_and_evenly(seed):
    """Whatever the lengths: equal shares, to one tile; and no program has much more to do than it could have."""
    draw = random.Random(seed)
    tiles, target = [draw.randint(1, 70) for _ in range(draw.randint(1, 9))], draw.randint(1, 50)
    out = shares(tiles, target, draw.choice((2, 8, 16)))
    counts = out[:, 2][out[:, 2] > 0]
    assert counts.max() - counts.min() <= 1
    assert counts.max() <= max(FEW_TILES.value, -(-sum(tiles) // max(1, int(min(target, sum(tiles)) * FEWEST.value))))


@pytest.mark.parametrize('tiles, target, pieces, programs', [
    ([32], 49, 16, 16),  # two levels of combining otherwise
    ([64], 49, 16, 16),
    ([128], 49, 16, 32),  # four tiles each, where 49 programs have up to three
    ([4] * 32, 49, 16, 32),  # a sequence each
    ([4] * 64, 49, 16, 32),  # two sequences each
    ([16] * 32, 49, 16, 32),
    ([32] * 64, 49, 16, 49),  # much to read: as many as fit
    ([1] * 5, 49, 16, 5),
    ([16], 198, 8, 8),  # results of eight rows are read four at a time
    ([64], 198, 8, 64),
    ([4] * 64, 198, 8, 128),
])
def test_small_shares(tiles, target, pieces, programs):
    """The loads of docs/performance.md."""
    assert shares(tiles, target, pieces)[0, 4] == programs


def test_a_thousand_sequences_of_a_million_tokens():
    """Products of tiles do not overflow; one program says how many there are."""
    device = 'cpu' if interpreted() else 'cuda'
    lens = torch.full((1024, ), 1 << 20, dtype=torch.int32, device=device)
    out = torch.zeros(6, dtype=torch.int32, device=device)
    _shares[(1, )](lens, out, 1024, 198, 1024, 16)
    assert out[:5].tolist() == [0, 0, (1 << 23) // 198 + 1, 1 << 23, 198]  # the first take one more
