"""Writing new tokens: codes and scales against the reference, and every byte that must not change."""
import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import POISON, by_name, covering, finite, problem, steps_apart

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.formats import part_dim
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.launch import interpreted
from lmdeploy_kvq.transforms import from_matrix

EVERY = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)
WITH_STATIC = [fmt for fmt in kvq.FORMATS if not (fmt.key.per_token_head and fmt.value.per_token_head)]


def written(p, **changes):
    """The same problem written by the kernel and by the reference: (kernel's, reference's)."""
    kvq.reshape_and_cache(p.key, p.value, p.cache, p.slots)
    expected = problem(p.cache.format, p.kv_lens.tolist(), device=p.key.device.type, **changes)
    return p, expected


def by_token(rows: torch.Tensor) -> torch.Tensor:
    """Codes as [blocks, tokens, kv_heads, bytes]."""
    return rows.transpose(1, 2)


def on_the_grid(x: torch.Tensor, encoding, scale: torch.Tensor, transform) -> torch.Tensor:
    """fp64: rows, rotated and divided by their step, before they are rounded to codes."""
    x = x.float().clamp(-65280, 65280)
    if encoding.rotation is not None:
        x = transform.store(x)
    if encoding.per_token_head:
        size = x.abs().amax(-1) / encoding.codec.qmax if encoding.statistic == 'absmax' else x.square().mean(-1).sqrt()
        scale = (size * encoding.shrink).clamp(min=1e-6)
    return x.double() / scale.double()[..., None]


def assert_same_tokens(p, expected, rare: float = 2e-2):
    """Codes equal, or one apart at a rounding tie and rarely; equal codes' scales to 1e-6; unused bytes still 0xFF."""
    fmt, slots = p.cache.format, p.slots
    block, offset = slots // p.cache.block_size, slots % p.cache.block_size
    unused = torch.ones(p.cache.num_blocks, p.cache.block_size, dtype=torch.bool, device=slots.device)
    unused[block, offset] = False
    for x, encoding, transform, scale, other_scale, rows, others in (
        (p.key, fmt.key, p.cache.k_transform, p.cache.k_scale, expected.cache.k_scale, p.cache.k_codes,
         expected.cache.k_codes),
        (p.value, fmt.value, p.cache.v_transform, p.cache.v_scale, expected.cache.v_scale, p.cache.v_codes,
         expected.cache.v_codes),
    ):
        codec = encoding.codec
        rows, others = by_token(rows), by_token(others)
        assert (rows[unused] == 0xFF).all()
        codes, other = (reference.unpack(r[block, offset], codec, x.size(-1)) for r in (rows, others))
        apart = steps_apart(codes, other, codec)
        assert apart.max() <= 1 and (apart > 0).double().mean() < rare
        exact = on_the_grid(x, encoding, scale, transform).cpu()[apart > 0]
        low, high = (reference.decode_codes(c.cpu(), codec)[apart > 0].double() for c in (codes, other))
        # A rotation sums as many products as a row is long, in another order.
        error = 3e-7 * exact.abs() if encoding.rotation is None else 2e-6 * codec.qmax
        assert ((exact - (low + high) / 2).abs() <= error).all()
        if encoding.per_token_head:
            assert scale[unused].isnan().all()
            same = (apart == 0).all(-1).to(scale.device)
            torch.testing.assert_close(scale[block, offset][same], other_scale[block, offset][same], atol=0,
                                       rtol=1e-6 if encoding.rotation is None else 3e-6)


# The order in which NumPy, hence the interpreter, sums a matrix product depends on its width: calibrated on a GPU only.
@pytest.mark.parametrize('pieces', [(64, ), (3, 20, 1, 17)], ids=['even', 'uneven'])
@pytest.mark.parametrize('fmt, calibrated', [
    (fmt, calibrated) for fmt in kvq.FORMATS for calibrated in (False, True)
    if not calibrated or fmt.takes_transform and not interpreted()], ids=by_name)
def test_pages_do_not_depend_on_the_size_of_a_piece(fmt, pieces, calibrated, device):
    """Every byte of codes and scales: what a prompt in chunks writes, and what a prefix cache finds again."""
    tokens, heads, dim = 48 if interpreted() else 2000, 1, 64
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn((2, tokens, heads, dim), generator=generator).bfloat16().to(device)
    matrix = torch.randn((heads, dim, dim), generator=generator, dtype=torch.float64)
    transform = from_matrix(torch.eye(dim) + 0.03 * matrix).to(device)
    pages = []
    for sizes in ((tokens, ), pieces):
        cache = kvq.PagedCache.allocate(fmt, tokens // 16 + 1, 16, heads, dim, device=device)
        cache = replace(cache, k_transform=transform) if calibrated else cache
        start = 0
        for size in itertools.cycle(sizes):
            end = min(start + size, tokens)
            kvq.reshape_and_cache(key[start:end], value[start:end], cache, torch.arange(start, end, device=device))
            start = end
            if start == tokens:
                break
        pages.append([x[:tokens // 16].view(torch.uint8).cpu() for x in cache.tensors()[:4] if x is not None])
    assert len(pages[0]) == (4 if fmt.per_token_head else 2)
    for whole, in_pieces in zip(*pages):
        assert torch.equal(whole, in_pieces)


@pytest.mark.parametrize('dim', [64, 128, 256])
@FORMATS
def test_every_tile_writes_the_same_pages(fmt, dim, device, monkeypatch):
    """Rows per program and warps, as few as one token has and as many as a prompt: every byte."""
    kernel = importlib.import_module('lmdeploy_kvq.kernels.fill')
    pages: list = []
    rotated = fmt.key.rotation or fmt.value.rotation  # takes four rows per warp, or eight
    for tile in (*([] if rotated else [(2, 1)]), (4, 1), (8, 1), (8, 2), (16, 4), (32, 4)):
        monkeypatch.setattr(kernel, '_tile', lambda *args, tile=tile: tile)
        p = problem(fmt, [9 if interpreted() else 300], device=device, fill=False, head_dim=dim, dtype=torch.bfloat16)
        kvq.reshape_and_cache(p.key, p.value, p.cache, p.slots)
        pages = pages or p.snapshot()
        assert p.same_bytes(pages)
    assert pages[0].ne(POISON).any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@EVERY
def test_codes_and_scales_equal_the_references(fmt, dtype, device):
    shape = {'head_dim': 128, 'dtype': dtype, 'block_size': 64}
    lens = [70, 1, 40] if interpreted() else [199, 1, 100]
    p, expected = written(problem(fmt, lens, device=device, fill=False, **shape), **shape)
    # bf16 has so few bits that one value in 200 is a tie of an fp8 format.
    assert_same_tokens(p, expected, rare=3e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize('head_dim, v_head_dim', [
    (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 256), (128, 40),
])
@FORMATS
def test_head_sizes(fmt, head_dim, v_head_dim, device):
    shape = {'head_dim': head_dim, 'v_head_dim': v_head_dim, 'dtype': torch.bfloat16}
    p, expected = written(problem(fmt, [3, 0, 2], device=device, fill=False, **shape), **shape)
    assert_same_tokens(p, expected)


@pytest.mark.parametrize('lens', [[2, 1], [60, 7]], ids=['few', 'many'])
@FORMATS
def test_views_into_one_pool(fmt, lens, device):
    """Block strides larger than the tensors, as LMDeploy allocates; the gaps between tensors stay untouched."""
    shape = {'pooled': True, 'head_dim': 72, 'kv_heads': 3}
    p, expected = written(problem(fmt, lens, device=device, fill=False, **shape), **shape)
    assert not p.cache.k_codes.is_contiguous() and not p.cache.v_codes.is_contiguous()
    assert_same_tokens(p, expected)
    changed = p.pool != 0xFF
    per_token = p.cache.num_kv_heads * sum(part_dim(72, e.codec.parts) for e in (fmt.key, fmt.value))
    scales = 4 * p.cache.num_kv_heads * sum(e.per_token_head for e in (fmt.key, fmt.value))
    assert changed.sum() <= sum(lens) * (per_token + scales)


@FORMATS
def test_rows_may_be_strided(fmt, device):
    """Keys and values as slices of one projection, the usual case in an engine."""
    p = problem(fmt, [70], device=device, fill=False, dtype=torch.bfloat16)
    packed = torch.cat([p.key, p.value, p.key], 1)
    key, value = packed[:, :2], packed[:, 2:4]
    assert not key.is_contiguous()
    kvq.reshape_and_cache(key, value, p.cache, p.slots)
    assert_same_tokens(p, problem(fmt, [70], device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize('tokens', [5, 70])
@FORMATS
def test_padding_slots_leave_every_byte(fmt, tokens, device):
    p = problem(fmt, [tokens], device=device, pooled=True)
    before = p.snapshot()
    for negative in (-1, -p.cache.block_size, -2**31):
        kvq.reshape_and_cache(p.key + 1, p.value - 1, p.cache, torch.full_like(p.slots, negative))
    assert p.same_bytes(before)


@pytest.mark.parametrize('tokens', [6, 100])
@FORMATS
def test_padding_between_tokens_is_skipped(fmt, tokens, device):
    p = problem(fmt, [tokens], device=device, fill=False, head_dim=32)
    skipped = torch.arange(tokens, device=device) % 3 == 1
    p.slots = torch.where(skipped, -1, p.slots)
    kvq.reshape_and_cache(p.key, p.value, p.cache, p.slots)
    alone = problem(fmt, [tokens], device=device, fill=False, head_dim=32)
    kvq.reshape_and_cache(p.key[~skipped], p.value[~skipped], alone.cache, p.slots[~skipped])
    assert p.same_bytes(alone.snapshot())
    p.key, p.value, p.slots = p.key[~skipped], p.value[~skipped], p.slots[~skipped]
    alone = problem(fmt, [tokens], device=device, fill=False, head_dim=32)
    reference.reshape_and_cache(p.key, p.value, alone.cache, p.slots)
    assert_same_tokens(p, alone)


@FORMATS
def test_slots_may_be_int32_and_strided(fmt, device):
    p = problem(fmt, [5], device=device, fill=False, head_dim=32)
    kvq.reshape_and_cache(p.key, p.value, p.cache, torch.stack([p.slots, p.slots], 1).int()[:, 0])
    assert_same_tokens(p, problem(fmt, [5], device=device, head_dim=32))


@FORMATS
def test_no_tokens(fmt, device):
    p = problem(fmt, [3], device=device)
    before = p.snapshot()
    kvq.reshape_and_cache(p.key[:0], p.value[:0], p.cache, p.slots[:0])
    assert p.same_bytes(before)


@FORMATS
def test_rewriting_a_slot_replaces_it(fmt, device):
    """Nothing of a page's earlier contents survives in a token written again."""
    p = problem(fmt, [5], device=device, seed=1, k_std=900.0, v_std=900.0, head_dim=32)
    fresh = problem(fmt, [5], device=device, fill=False, head_dim=32)
    p.cache.k_static_scale, p.cache.v_static_scale = fresh.cache.k_static_scale, fresh.cache.v_static_scale
    for cache in (p.cache, fresh.cache):
        kvq.reshape_and_cache(fresh.key, fresh.value, cache, p.slots)
    for one, two in zip(reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32),
                        reference.flatten(fresh.cache, p.block_table, p.kv_lens, torch.float32), strict=True):
        assert torch.equal(one, two)


@FORMATS
def test_extreme_rows(fmt, device):
    """Zeros, signed zeros, subnormals, infinities, values beyond fp16, one outlier: as the reference, all finite."""
    rows = torch.randn(9, 1, 64, generator=torch.Generator().manual_seed(3))
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2] *= 1e-40
    rows[3] *= 1e-9
    rows[4, 0, ::2], rows[4, 0, 1::7] = math.inf, -math.inf
    rows[5] *= 1e30
    rows[6] *= 65504 / rows[6].abs().max()
    rows[7, 0, 5] = 30000.0
    rows[8] = 1e-6
    rows = rows.to(device)
    p = problem(fmt, [9], device=device, fill=False, kv_heads=1)
    p.key, p.value = rows, rows.flip(-1)
    kvq.reshape_and_cache(p.key, p.value, p.cache, p.slots)
    expected = problem(fmt, [9], device=device, fill=False, kv_heads=1)
    reference.reshape_and_cache(p.key, p.value, expected.cache, p.slots)
    assert_same_tokens(p, expected)
    for x in reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32):
        assert finite(x) and x[:2].abs().max() < 1e-5  # grids of 4 and 2 bits have no zero


@FORMATS
def test_a_row_with_nan_poisons_no_other(fmt, device):
    p = problem(fmt, [5], device=device, fill=False, head_dim=32)
    p.key[2, 0, 3] = p.value[2, 1, 4] = math.nan
    kvq.reshape_and_cache(p.key, p.value, p.cache, p.slots)
    clean = problem(fmt, [5], device=device, head_dim=32)
    decoded = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    expected = reference.flatten(clean.cache, p.block_table, p.kv_lens, torch.float32)
    for x, y in zip(decoded, expected, strict=True):
        keep = torch.arange(5, device=device) != 2
        torch.testing.assert_close(x[keep], y[keep], rtol=0.3, atol=1e-3)


@pytest.mark.parametrize('per_head', [False, True], ids=['scalar', 'per head'])
@pytest.mark.parametrize('fmt', WITH_STATIC, ids=by_name)
def test_static_scales(fmt, per_head, device):
    shape = {'per_head_static': per_head, 'kv_heads': 4, 'k_std': 3.0, 'v_std': 0.01, 'dtype': torch.bfloat16}
    p = problem(fmt, [80], device=device, fill=False, **shape)
    for encoding, scale in ((fmt.key, p.cache.k_static_scale), (fmt.value, p.cache.v_static_scale)):
        assert encoding.per_token_head or ((scale != 1.0).all() and scale.numel() == (4 if per_head else 1))
    p, expected = written(p, **shape)
    assert_same_tokens(p, expected)


def layout(p, q_lens, kv_dtype=torch.int32, uniform=0):
    """LMDeploy's description of a batch whose sequences' last ``q_lens`` tokens are new."""
    q_lens = torch.tensor(q_lens, dtype=kv_dtype, device=p.kv_lens.device)
    return TokenLayout(q_start=q_lens.cumsum(0).to(kv_dtype) - q_lens, q_lens=q_lens, kv_lens=p.kv_lens.to(kv_dtype),
                       block_table=p.block_table, uniform_query_len=uniform)


def newest(p, q_lens):
    """Rows and slots of every sequence's last ``q_lens`` tokens; slots are -1 where a sequence is shorter."""
    rows, slots, start = [], [], 0
    for n, q_len in zip(p.kv_lens.tolist(), q_lens, strict=True):
        index = torch.arange(n - q_len, n)
        rows.append(torch.where(index < 0, 0, index + start))
        slots.append(torch.where(index < 0, -1, p.slots.cpu()[rows[-1]]))
        start += n
    rows, slots = torch.cat(rows).to(p.slots.device), torch.cat(slots).to(p.slots.device)
    return p.key[rows], p.value[rows], slots


@pytest.mark.parametrize('lens, q_lens, kv_dtype', [
    ([7, 3, 20], [2, 3, 1], torch.int32),
    ([5, 0, 30, 0, 1], [3, 0, 4, 0, 1], torch.int64),
    ([0, 20, 33, 9], [0, 5, 0, 2], torch.int32),
    ([150, 0, 17], [90, 0, 17], torch.int64),
], ids=['mixed', 'empty', 'empty first', 'many'])
@FORMATS
def test_a_batch_as_lmdeploy_describes_it(fmt, lens, q_lens, kv_dtype, device):
    """The same bytes as with explicit slots: ragged prefill with history, without, and sequences of no tokens."""
    shape = {'fill': False, 'head_dim': 32, 'pooled': True}
    by_layout, by_slots = (problem(fmt, lens, device=device, **shape) for _ in range(2))
    key, value, slots = newest(by_slots, q_lens)
    kvq.reshape_and_cache(key, value, by_slots.cache, slots)
    fill(key, value, by_layout.cache, layout(by_layout, q_lens, kv_dtype))
    assert (slots >= 0).all() and by_layout.same_bytes(by_slots.snapshot())


@pytest.mark.parametrize('query_len', [1, 3])
@FORMATS
def test_decode_batches(fmt, query_len, device):
    """Every sequence brings query_len tokens; a sequence shorter than that has only its last ones written."""
    lens = [17, query_len, 1, 0]
    shape = {'fill': False, 'head_dim': 32, 'kv_heads': 1}
    uniform, ragged, by_slots = (problem(fmt, lens, device=device, **shape) for _ in range(3))
    q_lens = [query_len] * len(lens)
    key, value, slots = newest(by_slots, q_lens)
    kvq.reshape_and_cache(key, value, by_slots.cache, slots)
    fill(key, value, uniform.cache, layout(uniform, q_lens, uniform=query_len))
    fill(key, value, ragged.cache, layout(ragged, q_lens))
    assert uniform.same_bytes(by_slots.snapshot()) and ragged.same_bytes(by_slots.snapshot())


@FORMATS
def test_rows_that_belong_to_no_sequence_are_skipped(fmt, device):
    p, by_slots = (problem(fmt, [9, 4], device=device, fill=False, head_dim=32, kv_heads=1) for _ in range(2))
    key, value, slots = newest(by_slots, [3, 4])
    kvq.reshape_and_cache(key, value, by_slots.cache, slots)
    fill(torch.cat([key, key[:2]]), torch.cat([value, value[:2]]), p.cache, layout(p, [3, 4]))
    assert p.same_bytes(by_slots.snapshot())


def test_bad_arguments_are_named(device):
    p = problem(kvq.FORMATS[0], [4], device=device, v_head_dim=32)
    before = p.snapshot()
    for key, value, slots, words in (
        (p.key, p.value, p.slots[:3], 'slot'),
        (p.key[:, :1], p.value, p.slots, 'key'),
        (p.key, p.key, p.slots, 'value'),
        (p.key, p.value[:3], p.slots, 'value'),
        (p.key[..., :32], p.value, p.slots, 'key'),
        (p.key.flatten(1), p.value, p.slots, 'key'),
        (p.key.transpose(1, 2).contiguous().transpose(1, 2), p.value, p.slots, 'contiguous'),
    ):
        with pytest.raises(ValueError, match=words):
            kvq.reshape_and_cache(key, value, p.cache, slots)
    assert p.same_bytes(before)
