"""Paged attention, however its work is divided: splits, orders of programs, padding, large and empty batches."""
import dataclasses

import pytest
import torch
import triton
from helpers import finite, frobenius, problem
from test_decode import BOUND, EVERY, FORMATS, check, oracle, queries, sinks, slopes

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.workspace import DecodeConfig, Workspace, default_config


@pytest.mark.parametrize('block_n, programs, window', [
    (16, 1, None), (16, 2, 156), (16, 7, None), (16, 16, 156), (16, 60, None), (32, 5, None), (32, 60, 156),
    (64, 3, 171),
])
@FORMATS
def test_splits_change_nothing_but_rounding(fmt, block_n, programs, window, device):
    """From one program for all sequences to more than there are tiles, and than the reduction takes at a time (16).

    Tiles within a page, of one, and of several; windows whose first row sees tokens that the second does not.
    """
    p = problem(fmt, [300, 0, 65, 1], device=device, head_dim=32, kv_heads=1, block_size=32)
    query = queries(p, 2, 2)
    gentle = slopes(2, device) / 100  # so that far tokens count
    features = {'sm_scale': 0.2, 'window': window, 'sinks': sinks(2, device), 'alibi_slopes': gentle}
    config = DecodeConfig(block_n=block_n, occupancy=1, programs=programs)
    out = torch.full_like(query, float('nan'))
    decode(query, p.cache, p.block_table, p.kv_lens, out, query_len=2, config=config, **features)
    expected = oracle(query, p, 2, **features)
    assert finite(out) and frobenius(out, expected) <= BOUND
    assert not out[2:4].any() and not out[6].any() and out[7].any()


@pytest.mark.parametrize('division', [(1, 1 << 20, 0), (2, 64, 1), (3, 0, 5), (7, 1 << 20, 6)])
@FORMATS
def test_the_division_of_work_changes_nothing_but_rounding(fmt, division, device):
    """Whichever programs work, in whatever order; sequences of one or two tiles, and longer ones."""
    for lens in ([97, 128, 3, 64], [300, 0, 65, 1, 500]):
        p = problem(fmt, lens, device=device)
        query, config = queries(p, 1, 4), DecodeConfig(64, 4, programs=7)
        out = torch.empty_like(query)
        workspace = Workspace.allocate(query, p.cache, len(lens), 1, config)
        workspace = dataclasses.replace(workspace, division=division).prepare(query, p.cache)
        decode(query, p.cache, p.block_table, p.kv_lens, out, query_len=1, sm_scale=query.size(-1)**-0.5,
               workspace=workspace)
        assert frobenius(out, oracle(query, p, 1)) <= BOUND
        assert not workspace.counters.any()  # as they were


@pytest.mark.parametrize('new', [0, 2])
@pytest.mark.parametrize('programs', [None, 3, 7])
@FORMATS
def test_padding_changes_no_bit(fmt, programs, new, device):
    """Empty sequences, or those with which LMDeploy pads the batch of a CUDA graph, only new tokens in page 0: what the
    others read is summed in the same order."""
    lens = [300, 65, 1, 130, 500, 64]
    p = problem(fmt, lens, device=device)
    query = queries(p, 2, 4)
    config = None if programs is None else DecodeConfig(64, 4, programs=programs)
    plain = torch.empty_like(query)
    decode(query, p.cache, p.block_table, p.kv_lens, plain, query_len=2, sm_scale=0.125, config=config)
    for size in (8, 40)[:1 if programs is None else 2]:  # launch parameters may change at a power of two
        more = size - len(lens)
        table = torch.cat([p.block_table, p.block_table.new_zeros(more, p.block_table.size(1))])
        kv_lens = torch.cat([p.kv_lens, p.kv_lens.new_full((more, ), new)])
        padded = torch.cat([query, query.new_zeros(2 * more, *query.shape[1:])])
        out = torch.full_like(padded, float('nan'))
        decode(padded, p.cache, table, kv_lens, out, query_len=2, sm_scale=0.125, padded=new > 0, config=config)
        assert torch.equal(out[:len(plain)], plain) and not out[len(plain):].any()


@FORMATS
def test_only_padding_is_padding(fmt, device):
    """Sequences of nothing but new tokens in other pages, and longer ones in page 0, are read; all are unless asked."""
    p = problem(fmt, [2, 3, 2], device=device)
    p.block_table[1:, 0] = 0
    reference.reshape_and_cache(p.key[2:5], p.value[2:5], p.cache, torch.arange(3, device=device))
    query = queries(p, 2, 4)
    expected = oracle(query, p, 2)
    for padded in (False, True):
        out = torch.full_like(query, float('nan'))
        decode(query, p.cache, p.block_table, p.kv_lens, out, query_len=2, sm_scale=query.size(-1)**-0.5,
               padded=padded)
        read = 4 if padded else 6
        assert frobenius(out[:read], expected[:read]) <= BOUND and not out[read:].any()


@EVERY
def test_padded_batches_have_the_launch_of_others(fmt):
    """Up to the next power of two, which CUDA graphs pad to: another launch would sum in another order."""
    cache = kvq.PagedCache.allocate(fmt.name, 2, 64, 3, 64, device='cpu')
    found = [default_config(cache, 8, batch, 3) for batch in range(1, 257)]
    for batch in range(1, 257):
        assert found[batch - 1] == found[triton.next_power_of_2(batch) - 1]
    assert len(set(found)) > 1


@FORMATS
def test_large_batches(fmt, device):
    """More sequences than a power of two, most of them tiny, one long."""
    lens = [n % 5 for n in range(65)] + [300]
    check(problem(fmt, lens, device=device, head_dim=32, kv_heads=1, block_size=32), 1, 2)


@pytest.mark.parametrize('sequences', [1, 3, 40])
@FORMATS
def test_empty_batch_rows_with_poisoned_table(fmt, sequences, device):
    """A batch of empty sequences only, as graph padding makes them."""
    p = problem(fmt, [0] * sequences, device=device)
    out = kvq.paged_attention(queries(p, 2, 4), p.cache, p.block_table, p.kv_lens, query_len=2, sinks=sinks(8, device))
    assert torch.equal(out, torch.zeros_like(out))
