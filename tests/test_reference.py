"""The specification itself: encoding against its bounds, attention against loops over single numbers."""
import math

import numpy as np
import pytest
import torch
from helpers import by_name, finite, frobenius, grid, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference

ENCODINGS = {(encoding.codec.name, encoding.per_token_head): encoding for fmt in kvq.FORMATS
             for encoding in (fmt.key, fmt.value)}
PER_TOKEN = [e for e in ENCODINGS.values() if e.per_token_head]
STATIC = [e for e in ENCODINGS.values() if not e.per_token_head]
CODECS = list({e.codec.name: e.codec for e in ENCODINGS.values()}.values())


def encoding_id(value: object) -> str | None:
    """Test ids of encodings and codecs."""
    if hasattr(value, 'per_token_head'):
        return f'{value.codec.name}-{"token" if value.per_token_head else "static"}'
    return getattr(value, 'name', None)


def static_scale(encoding) -> torch.Tensor | None:
    return None if encoding.per_token_head else torch.tensor(1.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('head_dim', [64, 128, 256])
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_round_trip_error_is_within_the_formats_bound(fmt, head_dim):
    for encoding in (fmt.key, fmt.value):
        x = normal(500, 4, head_dim)
        codes, scale = reference.encode(x, encoding, static_scale(encoding))
        assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.dtype == torch.float32
        error = frobenius(reference.decode(codes, encoding, scale), x)
        assert 0 < error <= fmt.max_error


@pytest.mark.parametrize('encoding', ENCODINGS.values(), ids=encoding_id)
def test_dequantized_values_are_within_a_tenth(encoding):
    """vLLM's promise for N(0, 1) data in bf16: 0.1 absolute plus 0.1 relative."""
    x = normal(1000, 2, 128).bfloat16()
    codes, scale = reference.encode(x, encoding, static_scale(encoding))
    error = (reference.decode(codes, encoding, scale) - x.float()).abs()
    assert (error <= 0.1 + 0.1 * x.float().abs()).all()


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_scale_is_absmax_over_qmax(encoding):
    x = normal(50, 3, 96) * torch.logspace(-8, 4, 50)[:, None, None]
    codes, scale = reference.encode(x, encoding)
    expected = [[max(max(abs(v) for v in row) / encoding.codec.qmax, 1e-6) for row in token] for token in x.tolist()]
    assert scale.shape == (50, 3)
    torch.testing.assert_close(scale, torch.tensor(expected), rtol=1e-6, atol=0)
    largest = reference.decode(codes, encoding, scale).abs().amax(-1)
    used = scale > 1e-6
    torch.testing.assert_close(largest[used], x.abs().amax(-1)[used], rtol=1e-6, atol=0)


@pytest.mark.parametrize('encoding', ENCODINGS.values(), ids=encoding_id)
def test_rows_of_zeros_decode_to_zeros(encoding):
    codes, scale = reference.encode(torch.zeros(3, 2, 64), encoding, static_scale(encoding))
    if encoding.per_token_head:
        assert (scale == 1e-6).all()
    assert not reference.decode(codes, encoding, scale).any()


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_rows_below_the_smallest_scale_stay_finite_and_small(encoding):
    x = normal(4, 2, 64) * 1e-30
    codes, scale = reference.encode(x, encoding)
    assert (scale == 1e-6).all() and (reference.decode(codes, encoding, scale) - x).abs().max() < 1e-6


@pytest.mark.parametrize('codec', CODECS, ids=encoding_id)
def test_codes_beyond_qmax_saturate(codec):
    scaled = torch.tensor([1.0, 1.001, 2.0, 1e6, 3.4e38, math.inf]) * codec.qmax
    for sign in (1, -1):
        values = reference.decode_codes(reference.encode_codes(sign * scaled, codec), codec)
        assert torch.equal(values, torch.full((6, ), sign * codec.qmax))


@pytest.mark.parametrize('codec', CODECS, ids=encoding_id)
def test_ties_round_to_even(codec):
    """Halfway between two values, the code whose last bit is zero wins."""
    values = grid(codec)
    halfway = (values[:-1] + values[1:]) / 2
    codes = reference.encode_codes(halfway, codec)
    assert (codes % 2 == 0).all()


@pytest.mark.parametrize('encoding', STATIC, ids=encoding_id)
def test_static_scales_saturate_multiply_and_may_differ_per_head(encoding):
    x = normal(40, 2, 64) * torch.tensor([1.0, 30.0])[:, None]
    scale = torch.tensor([0.01, 0.3])

    def decoded(values, given):
        codes, kept = reference.encode(values, encoding, given)
        assert kept is given
        return reference.decode(codes, encoding, given)

    assert torch.equal(decoded(x, scale), torch.cat([decoded(x[:, h:h + 1], scale[h]) for h in range(2)], 1))
    assert frobenius(decoded(x, scale), x) < 0.07
    limit = encoding.codec.qmax * scale
    assert torch.equal(decoded(torch.full((1, 2, 8), 65504.0), scale)[0], limit[:, None].expand(2, 8))


def test_a_static_encoding_without_scale_is_refused():
    for encoding in STATIC:
        with pytest.raises(ValueError, match='scale'):
            reference.encode(torch.zeros(1, 1, 16), encoding)


@pytest.mark.parametrize('encoding', ENCODINGS.values(), ids=encoding_id)
def test_values_beyond_fp16_saturate(encoding):
    x = torch.tensor([[[math.inf, -math.inf, 3e38, -1e5, 65504.0, 1.0, 0.0, -0.0] * 2]])
    static = None if encoding.per_token_head else torch.tensor(300.0)
    codes, scale = reference.encode(x, encoding, static)
    decoded = reference.decode(codes, encoding, scale)
    assert finite(decoded) and decoded.abs().max() <= 65504 * 1.07
    clamped = reference.encode(x.clamp(-65504, 65504), encoding, static)
    assert torch.equal(codes, clamped[0]) and torch.equal(scale, clamped[1])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize('encoding', ENCODINGS.values(), ids=encoding_id)
def test_any_finite_row_becomes_its_nearest_codes(encoding, data):
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = torch.from_numpy(data.draw(npst.arrays(np.float32, (2, 1, 16), elements=floats)))
    given_scale = None if encoding.per_token_head else torch.tensor(
        data.draw(st.floats(2.0**-10, 256.0, width=32)), dtype=torch.float32)
    codes, scale = reference.encode(x, encoding, given_scale)
    decoded = reference.decode(codes, encoding, scale)
    assert finite(scale) and (scale > 0).all() and finite(decoded)

    qmax, values = encoding.codec.qmax, grid(encoding.codec).double()
    target = (x.double().clamp(-65504, 65504) / scale.double()[..., None]).clamp(-qmax, qmax)
    nearest = (target[..., None] - values).abs().amin(-1)
    distance = (target - reference.decode_codes(codes, encoding.codec).double()).abs()
    assert (distance <= nearest + 1e-6 * target.abs()).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize('codec', CODECS, ids=encoding_id)
def test_encoding_is_monotonic_and_stable(codec, data):
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = torch.tensor(sorted(data.draw(st.lists(floats, min_size=2, max_size=20))), dtype=torch.float32)
    decoded = reference.decode_codes(reference.encode_codes(x, codec), codec)
    assert (decoded.diff() >= 0).all()
    again = reference.decode_codes(reference.encode_codes(decoded, codec), codec)
    assert torch.equal(again, decoded)


@pytest.mark.parametrize('codec', CODECS, ids=encoding_id)
def test_encoding_the_decoded_values_changes_nothing(codec):
    values = grid(codec)
    assert torch.equal(reference.decode_codes(reference.encode_codes(values, codec), codec), values)


def naive_attention(query, key, value, sm_scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None):
    """The issue's wording, one number at a time."""
    (rows, heads, dim), (kv_len, kv_heads, v_dim) = query.shape, value.shape
    out = torch.zeros(rows, heads, v_dim, dtype=torch.float64)
    for row in range(rows):
        position = kv_len - rows + row
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = {}
            for other in range(kv_len):
                if other > position or (window is not None and window >= 0 and position - other > window):
                    continue
                score = sum(float(query[row, head, d]) * float(key[other, kv_head, d]) for d in range(dim))
                score *= dim**-0.5 if sm_scale is None else sm_scale
                if softcap:
                    score = softcap * math.tanh(score / softcap)
                if alibi_slopes is not None:
                    score += float(alibi_slopes[head]) * (other - position)
                scores[other] = score
            if not scores:
                continue
            extra = [] if sinks is None else [float(sinks[head])]
            top = max([*scores.values(), *extra])
            total = sum(math.exp(s - top) for s in [*scores.values(), *extra])
            for other, score in scores.items():
                out[row, head] += math.exp(score - top) / total * value[other, kv_head].double()
    return out


SINKS, SLOPES = torch.tensor([0.0, 3.0, -2.0, 1.0]), torch.tensor([0.5, 0.25, 1.0, 0.0])
FEATURES = {
    'plain': {}, 'sm_scale': {'sm_scale': 0.3}, 'window 0': {'window': 0}, 'window 2': {'window': 2},
    'window of all': {'window': 100}, 'window off': {'window': -1}, 'softcap': {'softcap': 1.5},
    'softcap off': {'softcap': 0.0}, 'sinks': {'sinks': SINKS}, 'alibi': {'alibi_slopes': SLOPES},
    'all': {'sm_scale': 0.5, 'window': 3, 'softcap': 2.0, 'sinks': SINKS, 'alibi_slopes': SLOPES},
}


@pytest.mark.parametrize('rows, kv_len', [(1, 7), (3, 7), (4, 4), (3, 1), (2, 0)])
@pytest.mark.parametrize('features', FEATURES.values(), ids=FEATURES.keys())
def test_attention_is_the_formula(features, rows, kv_len):
    query, key, value = normal(rows, 4, 8), normal(kv_len, 2, 8, seed=1), normal(kv_len, 2, 6, seed=2)
    out = reference.attention(query.double(), key.double(), value.double(), **features)
    assert out.shape == (rows, 4, 6)
    torch.testing.assert_close(out, naive_attention(query, key, value, **features), rtol=1e-9, atol=1e-9)
    assert not out[:max(rows - kv_len, 0)].any()  # rows before the sequence's first token see nothing


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_paged_attention_attends_to_the_decoded_cache(fmt):
    p = problem(fmt, [9, 0, 33], device='cpu', v_head_dim=32)
    query = normal(6, 4, 64, seed=5)
    out = reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=2, dtype=torch.float64)
    key, value = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    assert key.shape == (42, 2, 64) and value.shape == (42, 2, 32)
    start = 0
    for index, n in enumerate(p.kv_lens.tolist()):
        expected = naive_attention(query[2 * index:2 * index + 2], key[start:start + n], value[start:start + n])
        torch.testing.assert_close(out[2 * index:2 * index + 2], expected, rtol=1e-6, atol=1e-6)
        start += n
    assert not out[2:4].any()


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_paging_reads_back_what_was_written(fmt):
    """Pages, heads and tokens end up where the block table says, in order."""
    p = problem(fmt, [5, 40, 0, 16], device='cpu', v_head_dim=128, k_std=1.0)
    key, value = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    assert key.shape == p.key.shape and value.shape == p.value.shape
    assert frobenius(key, p.key) <= fmt.max_error and frobenius(value, p.value) <= fmt.max_error


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_negative_slots_write_nothing(fmt):
    p = problem(fmt, [20], device='cpu')
    before = p.snapshot()
    reference.reshape_and_cache(p.key + 1, p.value + 1, p.cache, torch.full((20, ), -1))
    assert p.same_bytes(before)
