"""Streaming statistics: they equal what all data at once gives, and the scales are the right ones."""
from __future__ import annotations

import math

import pytest
import torch

from lmdeploy_kvq.calibrate import FILE, STATIC
from lmdeploy_kvq.formats import E4M3, E5M2
from lmdeploy_kvq.kvstats import BINS_PER_OCTAVE, GRANULARITIES, METHODS, Magnitudes, ModelStatistics
from lmdeploy_kvq.reference import MAX_INPUT, MIN_SCALE, decode_codes, encode_codes
from lmdeploy_kvq.scales import FILE_NAME, ScaleError, fingerprint, read_file, validate, write_file

HEADS, DIM, V_DIM, GROUP = 3, 16, 24, 2
CODECS = sorted({fmt.key.codec for fmt in STATIC}, key=lambda c: c.name)


def test_the_file_has_one_name():
    assert FILE == FILE_NAME


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def statistics(pieces=((7, True), (1, False), (5, False), (9, True)), dtype=torch.float32):
    """Two sequences, in pieces; returns the statistics and all that was counted, with the first tokens marked."""
    seen, parts = ModelStatistics(), []
    for number, (tokens, start) in enumerate(pieces):
        q, k, v = (normal(tokens, heads, dim, seed=10 * number + i, scale=1 + i).to(dtype)
                   for i, (heads, dim) in enumerate(((HEADS * GROUP, DIM), (HEADS, DIM), (HEADS, V_DIM))))
        first = torch.zeros(tokens, dtype=torch.bool)
        first[0] = start
        for layer in (4, 7):
            seen.update(layer, q, k, v, first)
        parts.append((q, k, v, first))
    return seen, [torch.cat(column) for column in zip(*parts)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_pieces_add_up(dtype):
    seen, (q, k, v, first) = statistics(dtype=dtype)
    assert sorted(seen.layers) == [4, 7] and seen.tokens == 22
    layer = seen.layers[7]
    assert torch.equal(layer.key.absmax, k.float().abs().amax((0, 2)))
    assert torch.equal(layer.value.absmax, v.float().abs().amax((0, 2)))
    assert layer.key.counts.sum(1).tolist() == [22 * DIM] * HEADS
    assert layer.value.counts.sum(1).tolist() == [22 * V_DIM] * HEADS
    tensors, k, q = layer.tensors(), k.float()[~first], q.float()[~first]
    for head in range(HEADS):
        torch.testing.assert_close(tensors['k_second_moment'][head], k[:, head].T @ k[:, head] / 20)
        torch.testing.assert_close(tensors['k_mean'][head], k[:, head].mean(0))
        group = q[:, head * GROUP:(head + 1) * GROUP].reshape(-1, DIM)
        torch.testing.assert_close(tensors['q_second_moment'][head], group.T @ group / (20 * GROUP))


def test_the_first_layer_seen_again_means_all_were_seen():
    assert not ModelStatistics().complete and not statistics(((3, True), ))[0].complete
    assert statistics(((3, True), (1, False)))[0].complete


@pytest.mark.parametrize('codec', CODECS, ids=lambda c: c.name)
def test_absmax_reaches_the_largest_code_and_no_further(codec):
    seen, (_, k, _, _) = statistics()
    key = seen.layers[4].key
    scales = key.scale(codec, 'absmax', 'head', 100)
    assert scales.shape == (HEADS, ) and scales.dtype == torch.float32
    top = (k.abs() / scales[:, None]).amax((0, 2))
    torch.testing.assert_close(top, torch.full((HEADS, ), codec.qmax))
    tensor = key.scale(codec, 'absmax', 'tensor', 100)
    assert tensor.shape == () and tensor == scales.max()


@pytest.mark.parametrize('percentile', [50.0, 90.0, 99.9])
def test_percentiles_are_within_a_bin(percentile):
    x = normal(4000, 2, 8) * torch.tensor([1.0, 50.0])[:, None]
    seen = Magnitudes.empty(2, torch.device('cpu'))
    for part in x.split(700):
        seen.update(part)
    got = seen.scale(E4M3, 'percentile', 'head', percentile) * E4M3.qmax
    expected = torch.stack([x[:, head].abs().flatten().quantile(percentile / 100) for head in range(2)])
    assert ((got / expected).log2().abs() < 1.5 / BINS_PER_OCTAVE).all()
    assert torch.equal(seen.scale(E4M3, 'percentile', 'head', 100), seen.scale(E4M3, 'absmax', 'head', 100))


def squared_error(x, scale, codec):
    return float((decode_codes(encode_codes(x / scale, codec), codec) * scale - x).square().sum())


@pytest.mark.parametrize('codec', CODECS, ids=lambda c: c.name)
def test_mse_loses_less_than_absmax_where_something_stands_out(codec):
    """Far below an outlier lie most values: subnormal codes at absmax, unless the outlier may saturate."""
    x = normal(20_000, 1, 16, scale=1e-5 if codec is E4M3 else 1e-9)
    x[5, 0, 3] = 1.0 if codec is E4M3 else 2.0**-3
    seen = Magnitudes.empty(1, torch.device('cpu'))
    seen.update(x)
    absmax, mse = (seen.scale(codec, method, 'tensor', 100) for method in ('absmax', 'mse'))
    assert mse <= absmax and squared_error(x, mse, codec) <= squared_error(x, absmax, codec) * 1.001


def test_mse_finds_the_best_of_its_candidates():
    """Against the error of the values themselves, not of the histogram."""
    x = normal(5000, 1, 16).pow(3)
    seen = Magnitudes.empty(1, torch.device('cpu'))
    seen.update(x)
    chosen = squared_error(x, seen.scale(E4M3, 'mse', 'tensor', 100), E4M3)
    tried = [squared_error(x, float(seen.absmax) * 2.0**(-step / 4) / E4M3.qmax, E4M3) for step in range(32)]
    assert chosen <= min(tried) * 1.05


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_zeros_huge_values_and_infinities_have_usable_scales(method, granularity):
    seen = Magnitudes.empty(2, torch.device('cpu'))
    x = torch.zeros(10, 2, 8)
    seen.update(x)
    assert (seen.scale(E5M2, method, granularity, 99.9) == MIN_SCALE).all()
    x[3, 1, 2], x[4, 1, 1] = math.inf, -1e9
    seen.update(x)
    scale = seen.scale(E5M2, method, granularity, 100)
    assert scale.isfinite().all() and scale.max() <= MAX_INPUT / E5M2.qmax


def test_nan_is_refused_when_written(tmp_path):
    seen = ModelStatistics()
    q, k, v = normal(4, 2, 8), normal(4, 1, 8), normal(4, 1, 8)
    k[1] = math.nan
    seen.update(0, q, k, v, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ScaleError, match='layer 0: k_scale is nan'):
        write_file(tmp_path / 'x.safetensors', seen.scales(STATIC[0]), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('method', METHODS)
def test_files_keep_scales_and_statistics(tmp_path, method, granularity):
    from safetensors.torch import load_file
    seen, _ = statistics()
    path, scales = tmp_path / 'x.safetensors', seen.scales(STATIC[0], method, granularity)
    write_file(path, scales, {'method': method}, {n: layer.tensors() for n, layer in seen.layers.items()})
    file = read_file(path)
    validate(file, [4, 7], HEADS)
    for layer, (k, v) in scales.items():
        assert torch.equal(file.layers[layer].resolved('')[0], k) and torch.equal(file.layers[layer].resolved('')[1], v)
        assert file.layers[layer].source == 'calibrated'
    tensors = load_file(path)
    assert tensors['model.layers.4.self_attn.k_second_moment'].shape == (HEADS, DIM, DIM)
    assert tensors['model.layers.4.self_attn.k_mean'].shape == (HEADS, DIM)
    assert sum(t.numel() for t in tensors.values()) <= 2 * HEADS * (2 * DIM * DIM + DIM + 4)


def test_fingerprints_follow_the_architecture(tmp_path):
    from safetensors.torch import save_file
    prints = []
    for number, (config, shape) in enumerate((('{}', 4), ('{}', 4), ('{"a": 1}', 4), ('{}', 5))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / 'config.json').write_text(config)
        save_file({'w': torch.full((shape, ), float(number))}, folder / 'model.safetensors')
        write_file(folder / FILE_NAME, {0: (torch.ones(()), torch.ones(()))}, {'date': str(number)})
        prints.append(fingerprint(folder))
    assert prints[0] == prints[1] and len(set(prints)) == 3
