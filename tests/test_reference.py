"""The specification itself: encoding against its bounds, attention against loops over single numbers."""
import math

import numpy as np
import pytest
import torch
from helpers import by_name, default_transform, finite, frobenius, grid, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.formats import part_dim

ENCODINGS = list(dict.fromkeys(encoding for fmt in kvq.FORMATS for encoding in (fmt.key, fmt.value)))
PER_TOKEN = [e for e in ENCODINGS if e.per_token_head]
STATIC = [e for e in ENCODINGS if not e.per_token_head]
CODECS = list(dict.fromkeys(e.codec for e in ENCODINGS))
SMALL = 1e-5  # what a row of zeros may become: an even grid has no zero, and rotating back adds up a row's elements


def encoding_id(value: object) -> str | None:
    """Test ids of encodings and codecs."""
    if hasattr(value, 'per_token_head'):
        parts = [value.codec.name, 'token' if value.per_token_head else 'static', value.rotation, value.rule]
        return '-'.join(part for part in parts if part)
    return getattr(value, 'name', None)


def static_scale(encoding) -> torch.Tensor | None:
    return None if encoding.per_token_head else torch.tensor(1.0)


def through(x: torch.Tensor, encoding, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Codes, scale and decoded values of x, with the transform that is there if no other is given."""
    transform = default_transform(encoding, x.size(-1))
    codes, scale = reference.encode(x, encoding, static_scale(encoding) if scale is None else scale, transform)
    return codes, scale, reference.decode(codes, encoding, scale, transform)


def stored(x: torch.Tensor, encoding) -> torch.Tensor:
    """The rows that are quantized: saturated and rotated, fp32."""
    x = x.float().clamp(-65280, 65280)
    return x if encoding.rotation is None else default_transform(encoding, x.size(-1)).store(x)


def steps(rows: torch.Tensor, encoding) -> torch.Tensor:
    """The step of each stored row's grid, fp64, as docs/formats.md defines it."""
    rows = rows.double()
    size = rows.abs().amax(-1) / encoding.codec.qmax if encoding.statistic == 'absmax' else (
        rows.square().sum(-1) / rows.size(-1)).sqrt()
    return (encoding.shrink * size).clamp(min=1e-6)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('head_dim', [16, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_round_trip_error_is_within_the_formats_bound(fmt, head_dim):
    errors = []
    for encoding in (fmt.key, fmt.value):
        x = normal(500, 4, head_dim)
        codes, scale, decoded = through(x, encoding)
        assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.dtype == torch.float32
        errors.append(frobenius(decoded, x))
        assert 0 < errors[-1] <= fmt.max_error
    assert head_dim != 256 or max(errors) > 0.85 * fmt.max_error, 'the bound says little'


@pytest.mark.parametrize('encoding', [e for e in ENCODINGS if e.codec.bits == 8], ids=encoding_id)
def test_dequantized_values_are_within_a_tenth(encoding):
    """vLLM's promise for N(0, 1) data in bf16: 0.1 absolute plus 0.1 relative."""
    x = normal(1000, 2, 128).bfloat16()
    error = (through(x, encoding)[2] - x.float()).abs()
    assert (error <= 0.1 + 0.1 * x.float().abs()).all()


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_scales_are_the_rules(encoding):
    """One number at a time: the grid's step, or what fits the codes best, or what keeps <x, decoded x>."""
    x = normal(50, 3, 96) * torch.logspace(-8, 4, 50)[:, None, None]
    codes, scale, _ = through(x, encoding)
    assert scale.shape == (50, 3)
    rows, step = stored(x, encoding), steps(stored(x, encoding), encoding)
    values = reference.decode_codes(codes, encoding.codec)
    for token in range(50):
        for head in range(3):
            xs, cs = rows[token, head].double().tolist(), values[token, head].double().tolist()
            xx, xc, cc = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((xs, xs), (xs, cs), (cs, cs)))
            expected = {'step': float(step[token, head]), 'least_squares': xc / max(cc, 1e-300),
                        'unbiased': xx / max(xc, 1e-12)}[encoding.rule]
            assert float(scale[token, head]) == pytest.approx(max(expected, 1e-6), rel=1e-5)


@pytest.mark.parametrize('encoding', [e for e in PER_TOKEN if e.rule == 'step'], ids=encoding_id)
def test_a_rows_largest_element_is_kept(encoding):
    rows = stored(normal(50, 3, 96), encoding)
    codes, scale, _ = through(normal(50, 3, 96), encoding)
    largest = reference.decode_codes(codes, encoding.codec).abs().amax(-1) * scale  # not rotated back
    torch.testing.assert_close(largest, rows.abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
def test_rows_of_zeros_decode_to_zeros(encoding):
    for dim in (16, 64, 80, 128, 256):
        _, scale, decoded = through(torch.zeros(3, 2, dim), encoding)
        if encoding.per_token_head:
            assert (scale == 1e-6).all()
        assert decoded.abs().max() < SMALL if encoding.codec.offset % 1 else not decoded.any()


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_rows_below_the_smallest_scale_stay_finite_and_small(encoding):
    x = normal(4, 2, 64) * 1e-30
    _, scale, decoded = through(x, encoding)
    assert (scale == 1e-6).all() and (decoded - x).abs().max() < SMALL


@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
@pytest.mark.parametrize('value', [0.5, -3.0, 1000.0])
def test_constant_rows(encoding, value):
    """Unrotated they are one code; rotated, one large element among zeros, the worst case of an even grid, which has
    no zero. Least squares never lose more than the row, and the unbiased rule is kept from losing much more."""
    x = torch.full((3, 2, 128), value)
    _, scale, decoded = through(x, encoding, None if encoding.per_token_head else torch.tensor(abs(value) / 4))
    assert finite(scale) and finite(decoded)
    limit = 1.2 if encoding.rule == 'unbiased' else {8: 0.06, 4: 0.65, 2: 1.0}[encoding.codec.bits]
    assert frobenius(decoded, x) < limit


@pytest.mark.parametrize('encoding', [e for e in PER_TOKEN if e.rule == 'unbiased'], ids=encoding_id)
def test_the_unbiased_rule_keeps_the_product_with_the_row_itself(encoding):
    x = normal(50, 2, 128)
    torch.testing.assert_close((through(x, encoding)[2] * x).sum(-1), x.square().sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_one_huge_outlier(encoding):
    """Rotated, an outlier is spread over the row: all elements are alike, and coarse codes keep the row."""
    x = normal(40, 2, 64)
    x[..., 5] = 3000.0
    decoded = through(x, encoding)[2]
    assert finite(decoded) and frobenius(decoded, x) < {8: 0.06, 4: 0.08, 2: 0.2}[encoding.codec.bits]


@pytest.mark.parametrize('encoding', PER_TOKEN, ids=encoding_id)
def test_what_is_not_finite_stays_with_its_token(encoding):
    """Infinities saturate, NaN is lost; no other token or head sees either."""
    x = normal(6, 3, 64)
    codes, scale, _ = through(x, encoding)
    bad = x.clone()
    bad[1, 0, 3], bad[2, 1, :], bad[4, 2, 7] = math.inf, -math.inf, math.nan
    bad_codes, bad_scale, decoded = through(bad, encoding)
    untouched = torch.ones(6, 3, dtype=torch.bool)
    untouched[[1, 2, 4], [0, 1, 2]] = False
    assert torch.equal(bad_codes[untouched], codes[untouched]) and torch.equal(bad_scale[untouched], scale[untouched])
    untouched[[1, 2], [0, 1]] = True
    assert finite(decoded[untouched]) and finite(bad_scale[untouched])


@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
def test_encoding_is_deterministic_and_row_by_row(encoding):
    x = normal(30, 2, 80)
    codes, scale, decoded = through(x, encoding)
    again = through(x, encoding)
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1]) and torch.equal(decoded, again[2])
    flipped = through(x.flip(0), encoding)
    assert (codes == flipped[0].flip(0)).float().mean() > 0.999  # fp32 sums may differ in their last bit, by shape
    torch.testing.assert_close(decoded.norm(dim=-1), flipped[2].flip(0).norm(dim=-1), rtol=0.01, atol=0)


def test_a_rotated_encoding_without_its_transform_is_refused():
    for encoding in ENCODINGS:
        if encoding.rotation is not None:
            with pytest.raises(ValueError, match='transform'):
                reference.encode(torch.zeros(1, 1, 16), encoding)
            with pytest.raises(ValueError, match='transform'):
                reference.decode(torch.zeros(1, 1, 16, dtype=torch.uint8), encoding, torch.ones(1, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize('codec', CODECS, ids=encoding_id)
def test_packing_is_undone_by_unpacking(codec, data):
    dim = 8 * data.draw(st.integers(2, 32))
    codes = torch.from_numpy(data.draw(npst.arrays(np.uint8, (2, 3, dim), elements=st.integers(0, 2**codec.bits - 1))))
    packed = reference.pack(codes, codec)
    assert packed.shape == (2, 3, part_dim(dim, codec.parts)) and packed.size(-1) % 16 == 0
    assert torch.equal(reference.unpack(packed, codec, dim), codes)
    byte = data.draw(st.integers(0, packed.size(-1) - 1))  # the layout that docs/formats.md writes down
    held = [int(codes[0, 0, d]) if d < dim else 0 for d in range(byte, codec.parts * packed.size(-1), packed.size(-1))]
    assert int(packed[0, 0, byte]) == sum(code << codec.bits * part for part, code in enumerate(held))


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


@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
def test_an_encoding_that_does_not_saturate_has_no_use_for_it(encoding):
    """What the fill leaves out: no element of a row, divided by the row's step, is rounded to beyond the last code."""
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(7))
    rows *= 10.0**torch.arange(-8, 8).repeat(256)[:, None]
    rows[::3, 5] *= 100
    rows = rows.clamp(-65280, 65280)
    size = rows.square().mean(-1).sqrt()
    if encoding.statistic == 'absmax':
        size = rows.abs().amax(-1) / encoding.codec.qmax
    inverse = 1.0 / (size * encoding.shrink).clamp(min=reference.MIN_SCALE)
    beyond = (rows * inverse[:, None]).abs().amax() > encoding.codec.qmax * (1 + 1e-6)
    assert encoding.saturates or not beyond
    assert beyond or not (encoding.saturates and encoding.per_token_head)  # those that do, do


@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
def test_values_beyond_fp16_saturate(encoding):
    x = torch.tensor([[[math.inf, -math.inf, 3e38, -1e5, 65504.0, 1.0, 0.0, -0.0] * 2]])
    static = None if encoding.per_token_head else torch.tensor(300.0)
    codes, scale, decoded = through(x, encoding, static)
    saturated = x.clamp(-65280, 65280)
    assert finite(decoded) and decoded.norm() <= 1.3 * saturated.norm()
    assert encoding.rotation is not None or decoded.abs().max() <= 65280 * 1.07
    again = through(saturated, encoding, static)
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize('encoding', ENCODINGS, ids=encoding_id)
def test_any_finite_row_becomes_its_nearest_codes(encoding, data):
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = torch.from_numpy(data.draw(npst.arrays(np.float32, (2, 1, 16), elements=floats)))
    given_scale = None if encoding.per_token_head else torch.tensor(
        data.draw(st.floats(2.0**-10, 256.0, width=32)), dtype=torch.float32)
    codes, scale, decoded = through(x, encoding, given_scale)
    assert finite(scale) and (scale > 0).all() and finite(decoded)

    qmax, values = encoding.codec.qmax, grid(encoding.codec).double()
    rows = stored(x, encoding)
    step = scale.double() if given_scale is not None else steps(rows, encoding)
    target = (rows.double() / step[..., None]).clamp(-qmax, qmax)
    nearest = (target[..., None] - values).abs().amin(-1)
    distance = (target - reference.decode_codes(codes, encoding.codec).double()).abs()
    assert (distance <= nearest + 1e-6 * (target.abs() + encoding.codec.offset)).all()


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
