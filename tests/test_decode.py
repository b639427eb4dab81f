"""Paged attention against attention in float64 over the same decoded cache, feature by feature."""
import functools

import pytest
import torch
from helpers import by_name, covering, finite, frobenius, problem, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.workspace import Workspace

EVERY = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)
WITH_STATIC = [fmt for fmt in kvq.FORMATS if not (fmt.key.per_token_head and fmt.value.per_token_head)]
BOUND = 1e-3
LENS = [40, 0, 17, 1, 33]


def queries(p, query_len: int, group: int, dtype=torch.float32, std: float = 1.0, seed: int = 1) -> torch.Tensor:
    """Random queries that bf16 holds exactly, so that rounding the input is no part of any error."""
    generator = torch.Generator().manual_seed(seed)
    shape = (p.kv_lens.numel() * query_len, p.cache.num_kv_heads * group, p.cache.head_dim)
    return (torch.randn(shape, generator=generator) * std).bfloat16().to(p.kv_lens.device).to(dtype)


def oracle(query, p, query_len: int, **features) -> torch.Tensor:
    """Attention over the decoded cache in float64."""
    return reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=query_len, dtype=torch.float64,
                                     **features)


def check(p, query_len: int = 1, group: int = 4, std: float = 1.0, bound: float = BOUND, **features) -> torch.Tensor:
    """Run kernel and reference, compare, and return the kernel's output."""
    query = queries(p, query_len, group, std=std)
    out = kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=query_len, **features)
    expected = oracle(query, p, query_len, **features)
    assert out.shape == (*query.shape[:2], p.cache.v_head_dim) and out.dtype == query.dtype
    assert finite(expected) and finite(out)
    assert frobenius(out, expected) <= bound
    rows = out.unflatten(0, (-1, query_len))
    for index, n in enumerate(p.kv_lens.tolist()):
        unseen = max(query_len - n, 0)
        assert not rows[index, :unseen].any()  # exactly zero, sinks or not
        assert rows[index, unseen:].any() or n == 0
    return out


@functools.cache
def sinks(heads: int, device: str) -> torch.Tensor:
    return torch.linspace(-3, 4, heads, device=device)


@functools.cache
def slopes(heads: int, device: str) -> torch.Tensor:
    return 2.0**-torch.arange(1, heads + 1, device=device).float()


@pytest.mark.parametrize('query_len', [1, 3, 16])
@EVERY
def test_query_lengths(fmt, query_len, device):
    """Causal among the new tokens; sequences shorter than the query, empty ones, and poison everywhere else."""
    check(problem(fmt, LENS, device=device), query_len)


@pytest.mark.parametrize('window, query_len', [(0, 1), (0, 4), (1, 4), (20, 1), (20, 4), (1000, 4), (-1, 4)])
@FORMATS
def test_window(fmt, window, query_len, device):
    check(problem(fmt, [70, 0, 17, 1], device=device, kv_heads=1), query_len, window=window)


@pytest.mark.parametrize('query_len', [1, 3])
@FORMATS
def test_window_hides_pages_that_may_hold_anything(fmt, query_len, device):
    p = problem(fmt, [100, 40], device=device, kv_heads=1)
    query = queries(p, query_len, 4)
    out = kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=query_len, window=9)
    hidden = torch.cat([p.block_table[0, :5], p.block_table[1, :1]]).long()  # tokens 0-79 and 0-15
    p.cache.k_codes[hidden] = p.cache.v_codes[hidden] = 0xFF
    for scales in (p.cache.k_scales, p.cache.v_scales):
        if scales is not None:
            scales[hidden] = float('nan')
    again = kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=query_len, window=9)
    assert finite(again) and torch.equal(again, out)


@pytest.mark.parametrize('features, query_len', [
    ('softcap', 1), ('softcap', 3), ('sinks', 1), ('sinks', 3), ('alibi', 1), ('alibi', 3), ('sm_scale', 1),
    ('window+sinks', 2), ('window+softcap+alibi', 3), ('window+softcap+sinks+alibi+sm_scale', 1),
    ('window+softcap+sinks+alibi+sm_scale', 16),
])
@FORMATS
def test_features(fmt, features, query_len, device):
    group, p = 3, problem(fmt, [37, 0], device=device)
    given = {'window': 11, 'softcap': 2.0, 'sinks': sinks(group * 2, device), 'alibi_slopes': slopes(group * 2, device),
             'sm_scale': 0.31}
    chosen = {name if name != 'alibi' else 'alibi_slopes' for name in features.split('+')}
    check(p, query_len, group, **{name: value for name, value in given.items() if name in chosen})


@FORMATS
def test_features_that_are_off(fmt, device):
    """None, zero and negative softcaps and negative windows are the same as no argument, to the bit."""
    p = problem(fmt, [20, 3], device=device, kv_heads=1)
    query = queries(p, 1, 4)
    plain = kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens)
    for features in ({'window': None}, {'window': -1}, {'window': 10**6}, {'softcap': None}, {'softcap': 0.0},
                     {'softcap': -1.0}, {'sinks': None}, {'alibi_slopes': None}, {'sm_scale': 64**-0.5}):
        assert torch.equal(kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, **features), plain)


@FORMATS
def test_sinks_and_slopes_in_the_models_dtype(fmt, device):
    p = problem(fmt, [20, 3], device=device, kv_heads=1)
    check(p, 1, 4, sinks=sinks(4, device).bfloat16(), alibi_slopes=slopes(4, device).half())


@pytest.mark.parametrize('head_dim, v_head_dim', [
    (16, 16), (32, 32), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 256), (128, 40),
])
@FORMATS
def test_head_sizes(fmt, head_dim, v_head_dim, device):
    p = problem(fmt, [21, 0], device=device, head_dim=head_dim, v_head_dim=v_head_dim)
    check(p, 2, 2, sinks=sinks(4, device))


@pytest.mark.parametrize('group, query_len', [(1, 1), (1, 3), (4, 1), (7, 3), (16, 1), (64, 1), (64, 2)])
@FORMATS
def test_query_heads_per_kv_head(fmt, group, query_len, device):
    """Up to 64 heads times the query's rows: one or several row tiles."""
    p = problem(fmt, [35, 2], device=device, head_dim=32, kv_heads=2 if group < 64 else 1)
    check(p, query_len, group, sinks=sinks(p.cache.num_kv_heads * group, device),
          alibi_slopes=slopes(p.cache.num_kv_heads * group, device))


@FORMATS
def test_the_most_rows_of_all(fmt, device):
    check(problem(fmt, [20], device=device, head_dim=32, kv_heads=1), 16, 64)


@pytest.mark.parametrize('block_size', [16, 32, 64, 128, 256])
@FORMATS
def test_block_sizes(fmt, block_size, device):
    """Lengths around page and tile boundaries."""
    lens = [block_size - 1, block_size, block_size + 1, 3 * block_size // 2, 0]
    check(problem(fmt, lens, device=device, block_size=block_size, head_dim=32, kv_heads=1), 2, 3)


@pytest.mark.parametrize('window', [5, 100])
@FORMATS
def test_windows_inside_large_pages(fmt, window, device):
    check(problem(fmt, [256, 130, 300], device=device, block_size=256, head_dim=32, kv_heads=1), 3, 2, window=window)


@pytest.mark.parametrize('lens_dtype', [torch.int32, torch.int64])
@FORMATS
def test_views_into_one_pool(fmt, lens_dtype, device):
    """The engine's cache: every tensor strided over one pool per block, lengths in either width."""
    p = problem(fmt, LENS, device=device, pooled=True, lens_dtype=lens_dtype, kv_heads=3, head_dim=72, v_head_dim=40)
    assert not p.cache.k_codes.is_contiguous() and p.block_table.stride(0) > p.block_table.size(1)
    before = p.snapshot()
    check(p, 2, 2)
    assert p.same_bytes(before)


@FORMATS
def test_queries_may_be_strided(fmt, device):
    p = problem(fmt, [20, 9], device=device)
    query = queries(p, 1, 4)
    packed = torch.cat([query, query], 1)[:, :8]
    assert not packed.is_contiguous()
    out = kvq.paged_attention(packed, p.cache, p.block_table, p.kv_lens)
    assert torch.equal(out, kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens))


@pytest.mark.parametrize('dtype, rounding', [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@FORMATS
def test_query_dtypes(fmt, dtype, rounding, device):
    """Only the rounding of the output is allowed on top (the interpreter cuts bf16: one unit instead of half)."""
    p = problem(fmt, [70, 0, 9], device=device)
    query = queries(p, 2, 4, dtype)
    out = kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=2)
    expected = oracle(query, p, 2)
    assert out.dtype == dtype and finite(out) and not out[2:4].any()
    assert frobenius(out, expected) <= BOUND + rounding


@pytest.mark.parametrize('q_std, k_std, v_std', [
    (1e5, 1.0, 1.0), (1e5, 1e-5, 1.0), (1.0, 1e3, 1.0), (1.0, 1.0, 1e3), (1e-3, 1e3, 1e3), (1e5, 1e3, 1e3),
    (1.0, 1.0, 1e-3), (1e-6, 1.0, 1.0), (1e-20, 1.0, 1.0), (1.0, 1e-3, 1e4),
])
@FORMATS
def test_magnitudes(fmt, q_std, k_std, v_std, device):
    """Beyond fp16's range in the query, far from one in K and V."""
    check(problem(fmt, [90, 0, 30], device=device, k_std=k_std, v_std=v_std, kv_heads=1), 1, 4, std=q_std)


@FORMATS
def test_queries_of_zeros_average_the_values(fmt, device):
    p = problem(fmt, [30, 0], device=device)
    out = check(p, 1, 4, std=0.0)
    _, value = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    torch.testing.assert_close(out[0], value.mean(0).repeat_interleave(4, 0), rtol=2e-3, atol=2e-3)


@FORMATS
def test_rows_of_zeros_in_the_cache(fmt, device):
    """A cache of zeros (scale 1e-6): zeros out, and nothing undefined on the way."""
    p = problem(fmt, [30, 5], device=device, k_std=0.0, v_std=0.0)
    for name in ('k_static_scale', 'v_static_scale'):
        if getattr(p.cache, name) is not None:
            setattr(p.cache, name, torch.ones((), device=device))
    reference.reshape_and_cache(p.key, p.value, p.cache, p.slots)
    out = kvq.paged_attention(queries(p, 1, 4), p.cache, p.block_table, p.kv_lens, sinks=sinks(8, device))
    # A grid of 4 or 2 bits has no zero: its codes of least magnitude, times the smallest scale, are next to nothing.
    assert out.abs().max() <= (0 if fmt.value.codec.offset == round(fmt.value.codec.offset) else 1e-5)


@pytest.mark.parametrize('fmt', WITH_STATIC, ids=by_name)
def test_static_scales_per_head(fmt, device):
    p = problem(fmt, [40, 9], device=device, kv_heads=4, per_head_static=True, k_std=2.0, v_std=0.1)
    check(p, 2, 2)


@FORMATS
def test_write_then_read(fmt, device):
    """The public calls together: what reshape_and_cache writes is what paged_attention and flatten read."""
    cache = kvq.PagedCache.allocate(fmt.name, 6, 16, 2, 64, device=device)
    generator = torch.Generator().manual_seed(4)
    key, value = (torch.randn(22, 2, 64, generator=generator).to(device) for _ in range(2))
    table = torch.tensor([[4, 0, 3], [2, 1, 1]], dtype=torch.int32, device=device)
    kv_lens = torch.tensor([18, 4], device=device)
    position = torch.cat([torch.arange(18), torch.arange(4)]).to(device)
    sequence = torch.tensor([0] * 18 + [1] * 4, device=device)
    kvq.reshape_and_cache(key, value, cache, table[sequence, position // 16] * 16 + position % 16)
    query = torch.randn(2, 4, 64, generator=generator).to(device)
    out = kvq.paged_attention(query, cache, table, kv_lens)
    raw = torch.cat([reference.attention(query[i:i + 1], key[rows], value[rows])
                     for i, rows in enumerate((slice(0, 18), slice(18, 22)))])
    assert 0 < frobenius(out, raw) <= 3 * fmt.max_error  # against attention without any quantization
    dense = kvq.flatten(cache, table, kv_lens, torch.float32)
    assert all(frobenius(x, y) <= 1.1 * fmt.max_error for x, y in zip(dense, (key, value), strict=True))


def test_bad_arguments_are_named(device):
    p = problem(kvq.FORMATS[0], [20, 9], device=device, kv_heads=2)
    good = queries(p, 1, 2)
    wide = torch.zeros(2, 130, 64, device=device)
    for query, given, words in (
        (good[:1], {}, 'batch 2'),
        (good, {'query_len': 2}, 'query_len'),
        (good[..., :32], {}, 'head_dim 64'),
        (good[:, :3], {}, '2 KV heads'),
        (wide, {}, '1 to 64'),
        (torch.zeros(34, 4, 64, device=device), {'query_len': 17}, '1 to 16'),
        (good.transpose(1, 2).contiguous().transpose(1, 2), {}, 'contiguous'),
    ):
        with pytest.raises(ValueError, match=words):
            kvq.paged_attention(query, p.cache, p.block_table, p.kv_lens, **given)
    with pytest.raises(ValueError, match='1 to 1024'):
        kvq.paged_attention(torch.zeros(1025, 4, 64, device=device), p.cache, p.block_table[:1].expand(1025, -1),
                            torch.zeros(1025, dtype=torch.int32, device=device))


def test_a_workspace_of_another_batch_is_refused(device):
    """It has the wrong size: a kernel that wrote to it would write beyond it."""
    p = problem(kvq.FORMATS[0], [20, 9], device=device, kv_heads=2)
    query = queries(p, 1, 2)
    workspace = Workspace.allocate(query[:1], p.cache, 1, 1)
    with pytest.raises(ValueError, match='made for'):
        decode(query, p.cache, p.block_table, p.kv_lens, torch.empty_like(query), query_len=1, sm_scale=1.0,
               workspace=workspace)


@pytest.mark.gpu
@pytest.mark.parametrize('fmt', [fmt for fmt in kvq.FORMATS if fmt.key.codec.name.startswith('e')], ids=by_name)
def test_fp8_by_integer_arithmetic(fmt, device, monkeypatch):
    """What GPUs without fp8 instructions run, on whatever GPU this is."""
    from lmdeploy_kvq.kernels import decode, fill, flatten
    for module in (decode, fill, flatten):
        monkeypatch.setattr(module, 'compute_capability', lambda device: 80)
    p = problem(fmt, LENS, device=device)
    check(p, 2)
    key, value = kvq.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    expected = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    assert torch.equal(key, expected[0]) and torch.equal(value, expected[1])


def test_cpu_tensors_without_the_interpreter_are_refused():
    python("""
import torch, lmdeploy_kvq as kvq
cache = kvq.PagedCache.allocate('fp8_per_token_head', 2, 16, 1, 32, device='cpu')
rows, lens, table = torch.zeros(1, 1, 32), torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
for call in (lambda: kvq.reshape_and_cache(rows, rows, cache, torch.zeros(1, dtype=torch.int64)),
             lambda: kvq.paged_attention(rows, cache, table, lens),
             lambda: kvq.flatten(cache, table, lens, torch.float32)):
    try:
        call()
    except ValueError as error:
        assert 'TRITON_INTERPRET=1' in str(error) and 'reference' in str(error), error
    else:
        raise AssertionError('accepted')
kvq.reference.reshape_and_cache(rows, rows, cache, torch.zeros(1, dtype=torch.int64))
assert kvq.reference.paged_attention(rows, cache, table, lens).shape == (1, 1, 32)
""")
