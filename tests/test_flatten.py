"""Decoding pages into dense rows: bit-exact, and beside new tokens that are not decoded at all."""
import pytest
import torch
from helpers import by_name, finite, problem, stored

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.kernels.flatten import NewTokens, flatten

FORMATS = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_rows(p, dtype):
    return [stored(x, dtype) for x in reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)]


@pytest.mark.parametrize('dtype', DTYPES)
@FORMATS
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
    p.cache.k_rows[:] = codes.view(1, 1, 1, 2, 8, 1, 4, 4)
    p.cache.v_rows[:] = codes.view(1, 1, 1, 4, 4, 1, 2, 2, 4)
    rows = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    for x, expected, codec in zip(rows, expected_rows(p, torch.float32), (fmt.key.codec, fmt.value.codec), strict=True):
        values = reference.decode_codes(codes, codec)
        assert (values.isfinite() & (values.abs() <= codec.qmax)).sum() >= 247
        keep = expected.isfinite()
        assert torch.equal(x[keep], expected[keep])


@FORMATS
def test_nothing_to_decode(fmt, device):
    p = problem(fmt, [0, 0], device=device)
    key, value = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.bfloat16)
    assert key.shape == (0, 2, 64) and value.shape == (0, 2, 64)


@FORMATS
def test_total_may_be_an_upper_bound(fmt, device):
    """Rows beyond the last token keep what they held, so that CUDA graphs can use fixed buffers."""
    p = problem(fmt, [18, 0, 33], device=device)
    key, value = (torch.full((70, 4, 64), 7.0, device=device)[:, :2] for _ in range(2))
    flatten(p.cache, p.block_table, p.kv_lens, key, value, 70)
    for x, expected in zip((key, value), expected_rows(p, torch.float32), strict=True):
        assert not x.is_contiguous() and torch.equal(x[:51], expected) and (x[51:] == 7.0).all()


def with_new_tokens(p, q_lens, window, dtype, new_dtype):
    """Flatten with NewTokens whose rows differ from the cached ones: (new rows, dense rows)."""
    generator = torch.Generator().manual_seed(9)
    total, cache = sum(q_lens), p.cache
    new = [(torch.randn(total, cache.num_kv_heads, dim, generator=generator) * 50).to(new_dtype).to(p.kv_lens.device)
           for dim in (cache.head_dim, cache.v_head_dim)]
    q_lens = torch.tensor(q_lens, dtype=p.kv_lens.dtype, device=p.kv_lens.device)
    rows = int(p.kv_lens.sum())
    out = [torch.full((rows, cache.num_kv_heads, dim), 1e30, device=q_lens.device).to(dtype)
           for dim in (cache.head_dim, cache.v_head_dim)]
    flatten(cache, p.block_table, p.kv_lens, *out, rows,
            NewTokens(new[0], new[1], (q_lens.cumsum(0) - q_lens).to(q_lens.dtype), q_lens, window))
    return new, out


@pytest.mark.parametrize('dtype', DTYPES)
@FORMATS
def test_new_tokens_are_copied_and_history_is_decoded(fmt, dtype, device):
    lens, q_lens = [40, 0, 9, 17, 33], [10, 0, 9, 1, 0]
    p = problem(fmt, lens, device=device, v_head_dim=32, pooled=True)
    new, out = with_new_tokens(p, q_lens, None, dtype, dtype)
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
    new, out = with_new_tokens(p, [20], None, torch.float32, torch.float32)
    for raw, dense, source in zip(new, out, (p.key, p.value), strict=True):
        assert torch.equal(dense[20:], raw)
        assert finite(dense[:20]) and (dense[:20] - source[:20]).abs().max() < 0.5


@pytest.mark.parametrize('window', [0, 5, 30, 1000])
@FORMATS
def test_history_outside_the_window_becomes_zeros(fmt, window, device):
    """Cached tokens that no new token sees are zeros, decoded or not: finite either way, and never from their pages."""
    lens, q_lens = [100, 20, 3], [4, 20, 1]
    p = problem(fmt, lens, device=device)
    for raw, dense, history in zip(*with_new_tokens(p, q_lens, window, torch.float32, torch.float32),
                                   expected_rows(p, torch.float32), strict=True):
        start = taken = 0
        for n, q_len in zip(lens, q_lens, strict=True):
            rows, seen = dense[start:start + n], max(n - q_len - window, 0)
            assert not rows[:seen].any()
            assert torch.equal(rows[seen:n - q_len], history[start + seen:start + n - q_len])
            assert torch.equal(rows[n - q_len:], raw[taken:taken + q_len])
            start, taken = start + n, taken + q_len


@FORMATS
def test_unseen_pages_may_hold_anything(fmt, device):
    """Pages that the window hides completely are not decoded: 0xFF in them reaches nothing."""
    p = problem(fmt, [100], device=device)
    hidden = p.block_table[0, :4].long()
    p.cache.k_codes[hidden] = p.cache.v_codes[hidden] = 0xFF
    for scales in (p.cache.k_scales, p.cache.v_scales):
        if scales is not None:
            scales[hidden] = float('nan')
    for _, dense in zip(*with_new_tokens(p, [4], 5, torch.float32, torch.float32), strict=True):
        assert not dense[:64].any() and finite(dense)
