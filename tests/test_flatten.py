"""Decoding pages into dense rows: bit-exact, and beside new tokens that are not decoded at all."""
import pytest
import torch
from helpers import by_name, covering, finite, frobenius, problem, stored

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.kernels.flatten import NewTokens, flatten

EVERY = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_rows(p, dtype):
    return [stored(x, dtype) for x in reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)]


@pytest.mark.parametrize('dtype', DTYPES)
@EVERY
def test_bit_exact(fmt, dtype, device):
    p = problem(fmt, [20, 0, 1, 77, 0], device=device, v_head_dim=128)
    rows = kvq.flatten(p.cache, p.block_table, p.kv_lens, dtype)
    for x, expected in zip(rows, expected_rows(p, dtype), strict=True):
        assert x.dtype == dtype and x.shape == expected.shape and torch.equal(x, expected)


@pytest.mark.parametrize('change', [
    {'head_dim': 32}, {'head_dim': 80}, {'head_dim': 96}, {'head_dim': 192, 'v_head_dim': 128}, {'head_dim': 256},
    {'head_dim': 128, 'v_head_dim': 40}, {'block_size': 64, 'kv_heads': 1}, {'block_size': 256, 'kv_heads': 1},
    {'pooled': True, 'kv_heads': 3}, {'lens_dtype': torch.int64}, {'k_std': 1e3, 'v_std': 1e3},
    {'k_std': 1e-3, 'v_std': 1e-7}, {'per_head_static': True, 'kv_heads': 4, 'head_dim': 32},
], ids=lambda change: '-'.join(f'{k}={v}' for k, v in change.items()))
@FORMATS
def test_bit_exact_in_every_shape(fmt, change, device):
    p = problem(fmt, [18, 0, 33], device=device, **change)
    rows = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    for x, expected in zip(rows, expected_rows(p, torch.float32), strict=True):
        assert finite(expected) and torch.equal(x, expected)


@pytest.mark.filterwarnings('ignore:invalid value:RuntimeWarning')
@FORMATS
def test_every_finite_code_decodes_exactly(fmt, device):
    """All codes, not only those that random data hits. (NaN and infinity codes are never written.)"""
    p = problem(fmt, [256], device=device, head_dim=16, kv_heads=1)
    codes = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    for rows in (p.cache.k_codes, p.cache.v_codes):
        rows[:] = codes.view(1, 1, 16, 16)
    rows = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    for x, expected, codec in zip(rows, expected_rows(p, torch.float32), (fmt.key.codec, fmt.value.codec), strict=True):
        values = reference.decode_codes(codes[:2**codec.bits], codec)
        assert (values.isfinite() & (values.abs() <= codec.qmax)).sum() >= 247 / 256 * 2**codec.bits
        keep = expected.isfinite()
        assert torch.equal(x[keep], expected[keep])


@FORMATS
def test_nothing_to_decode(fmt, device):
    p = problem(fmt, [0, 0], device=device)
    key, value = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.bfloat16)
    assert key.shape == (0, 2, 64) and value.shape == (0, 2, 64)


@pytest.mark.parametrize('total', [51, 60, 150])
@FORMATS
def test_rows_behind_the_last_token_become_zeros(fmt, total, device):
    """Up to ``total_tokens``, an upper bound: attention kernels read them. Rows beyond keep what they held."""
    p = problem(fmt, [18, 0, 33], device=device)
    key, value = (torch.full((160, 4, 64), 7.0, device=device)[:, :2] for _ in range(2))
    flatten(p.cache, p.block_table, p.kv_lens, key, value, total)
    for x, expected in zip((key, value), expected_rows(p, torch.float32), strict=True):
        assert not x.is_contiguous() and torch.equal(x[:51], expected)
        assert not x[51:total].any() and (x[total:] == 7.0).all()


RANGES = [(0, 100), (7, 7), (16, 32), (15, 17), (64, 71), (0, 0), (3, 4), (90, 100)]
"""First and last token: whole, empty, on page borders, across one, within a page."""


@pytest.mark.parametrize('block_size', [16, 64, 128])
@FORMATS
def test_ranges(fmt, block_size, device):
    """Only the tokens asked for, wherever they lie in their pages; nothing else is read."""
    p = problem(fmt, [100] * len(RANGES), device=device, v_head_dim=32, block_size=block_size, kv_heads=1, pooled=True)
    first, last = (torch.tensor(x, device=device) for x in zip(*RANGES, strict=True))
    kept = [slice(100 * i + a, 100 * i + b) for i, (a, b) in enumerate(RANGES)]
    expected = [torch.cat([x[rows] for rows in kept]) for x in expected_rows(p, torch.float32)]
    asked = torch.zeros(p.slots.numel(), dtype=torch.bool, device=device)
    for rows in kept:
        asked[rows] = True
    unread = p.slots[~asked]
    for x in (p.cache.k_scales, p.cache.v_scales):
        if x is not None:
            x.transpose(1, 2)[unread // block_size, unread % block_size] = float('nan')
    rows = sum(b - a for a, b in RANGES) + 70
    out = [torch.full((rows, 1, dim), 7.0, device=device) for dim in (64, 32)]
    flatten(p.cache, p.block_table, last, *out, rows, first=first)
    for x, exact in zip(out, expected, strict=True):
        assert torch.equal(x[:-70], exact) and not x[-70:].any()


def with_new_tokens(p, q_lens, dtype, first=None):
    """Flatten with NewTokens whose rows differ from the cached ones: (new rows, dense rows)."""
    generator = torch.Generator().manual_seed(9)
    total, cache = sum(q_lens), p.cache
    new = [(torch.randn(total, cache.num_kv_heads, dim, generator=generator) * 50).to(dtype).to(p.kv_lens.device)
           for dim in (cache.head_dim, cache.v_head_dim)]
    q_lens = torch.tensor(q_lens, dtype=p.kv_lens.dtype, device=p.kv_lens.device)
    first = None if first is None else torch.tensor(first, dtype=q_lens.dtype, device=q_lens.device)
    rows = int((p.kv_lens if first is None else p.kv_lens - first).sum())
    out = [torch.full((rows, cache.num_kv_heads, dim), 1e30, device=q_lens.device).to(dtype)
           for dim in (cache.head_dim, cache.v_head_dim)]
    flatten(cache, p.block_table, p.kv_lens, *out, rows,
            NewTokens(new[0], new[1], (q_lens.cumsum(0) - q_lens).to(q_lens.dtype), q_lens), first)
    return new, out


@pytest.mark.parametrize('dtype', DTYPES)
@FORMATS
def test_new_tokens_are_copied_and_history_is_decoded(fmt, dtype, device):
    lens, q_lens = [40, 0, 9, 17, 33], [10, 0, 9, 1, 0]
    p = problem(fmt, lens, device=device, v_head_dim=32, pooled=True)
    new, out = with_new_tokens(p, q_lens, dtype)
    for raw, dense, history in zip(new, out, expected_rows(p, dtype), strict=True):
        start = taken = 0
        for n, q_len in zip(lens, q_lens, strict=True):
            rows = dense[start:start + n]
            assert torch.equal(rows[:n - q_len], history[start:start + n - q_len])
            assert torch.equal(rows[n - q_len:], raw[taken:taken + q_len])
            start, taken = start + n, taken + q_len


@FORMATS
def test_the_new_tokens_pages_are_not_read(fmt, device):
    """New tokens come from their rows whatever their pages hold."""
    p = problem(fmt, [40], device=device, fill=False)
    reference.reshape_and_cache(p.key[:20], p.value[:20], p.cache, p.slots[:20])
    new, out = with_new_tokens(p, [20], torch.float32)
    for raw, dense, source in zip(new, out, (p.key, p.value), strict=True):
        assert torch.equal(dense[20:], raw)
        assert finite(dense[:20]) and frobenius(dense[:20], source[:20]) < 1.1 * fmt.max_error


@FORMATS
def test_new_tokens_behind_a_part_of_the_history(fmt, device):
    """As a sliding window needs it: history from ``first`` on, then the new tokens."""
    lens, q_lens, first = [100, 20, 3, 40], [4, 20, 1, 7], [91, 0, 2, 33]
    p = problem(fmt, lens, device=device)
    for raw, dense, history in zip(*with_new_tokens(p, q_lens, torch.float32, first),
                                   expected_rows(p, torch.float32), strict=True):
        start = taken = row = 0
        for n, q_len, skipped in zip(lens, q_lens, first, strict=True):
            cached = n - q_len - skipped
            assert torch.equal(dense[row:row + cached], history[start + skipped:start + n - q_len])
            assert torch.equal(dense[row + cached:row + cached + q_len], raw[taken:taken + q_len])
            start, taken, row = start + n, taken + q_len, row + cached + q_len
        assert row == dense.size(0)
