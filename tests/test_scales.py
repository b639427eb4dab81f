"""Static scales: names, rules, files, validation, sharding."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmdeploy_kvq.scales import (
    LayerScales,
    ScaleError,
    ScaleFile,
    digest_of_scales,
    parse_name,
    read_file,
    shard,
    validate,
    write_file,
)

OWNERS = st.lists(st.sampled_from(['model', 'layers', '0', '17', 'self_attn', 'attn', 'mixer', 'language_model', 'h']),
                  min_size=1, max_size=6).map('.'.join)
TAILS = {'k_scale': 'k', 'v_scale': 'v', 'kv_scale': 'kv', 'k_proj.output_scale': 'k', 'v_proj.output_scale': 'v',
         'k_cache.scale': 'k', 'v_cache.scale': 'v', 'q_scale': 'unused', 'prob_scale': 'unused',
         'prob_output_scale': 'unused', 'k_zero_point': 'zero point', 'k_cache.zero_point': 'zero point'}


@given(OWNERS, st.sampled_from(sorted(TAILS)))
def test_every_scale_name_is_recognized(owner, tail):
    found = parse_name(f'{owner}.{tail}')
    assert found is not None and found.owner == owner and found.kind == TAILS[tail]


SEGMENTS = st.text(st.characters(codec='ascii', exclude_characters='.'), min_size=1, max_size=12)


@given(st.lists(SEGMENTS, min_size=1, max_size=6), st.sampled_from(sorted(TAILS)))
def test_names_are_taken_apart_wherever_they_stand(parts, tail):
    """Any owner: the longest known tail is split off, and owner and tail give the name back."""
    name = '.'.join([*parts, tail])
    found = parse_name(name)
    assert found is not None and name.startswith(found.owner + '.')
    assert TAILS[name[len(found.owner) + 1:]] == found.kind == TAILS[tail]


@given(st.lists(SEGMENTS, min_size=1, max_size=6))
def test_other_names_are_left_alone(parts):
    """What does not end in a known tail is a weight, and so is a tail without an owner."""
    name = '.'.join(parts)
    if not any(name.endswith('.' + tail) for tail in TAILS):
        assert parse_name(name) is None
    assert all(parse_name(tail) is None for tail in TAILS if '.' not in tail)


@given(OWNERS, st.sampled_from(['weight', 'bias', 'k_proj.weight_scale', 'k_proj.input_scale', 'k_proj.weight',
                                'o_proj.output_scale', 'k_norm.weight', 'scale', 'weight_scale_inv', 'xk_scale']))
def test_weights_are_not_scales(owner, tail):
    assert parse_name(f'{owner}.{tail}') is None


def value(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


@given(*[st.one_of(st.none(), st.just(-1.0), st.floats(2**-20, 2**14, width=32)) for _ in range(3)])
def test_missing_scales_take_the_other_value(k, v, kv):
    """Both: used. One only (or a merged one): the other takes it. None (absent, or the sentinel -1): 1.0."""
    scales = LayerScales(*(None if x is None else value(x) for x in (k, v, kv)))
    got_k, got_v, source = scales.resolved('layer 3')
    k, v = (kv if x is None else x for x in (k, v))
    k, v = (None if x in (None, -1.0) else x for x in (k, v))
    if k is None and v is None:
        assert float(got_k) == float(got_v) == 1.0 and source == 'default'
    else:
        assert float(got_k) == (k if k is not None else v) and float(got_v) == (v if v is not None else k)
        assert source == 'checkpoint'


@pytest.mark.parametrize('bad', [0.0, -0.5, math.nan, math.inf])
def test_unusable_values_name_layer_and_value(bad):
    with pytest.raises(ScaleError, match=rf'layers\.7.*v_scale is {bad:g}'):
        LayerScales(k=value(1.0), v=value(bad)).resolved('model.layers.7')


def test_checkpoint_scales_are_per_tensor():
    found = LayerScales().add('k', 'n', torch.tensor([[0.5]], dtype=torch.bfloat16))
    assert found.k.shape == () and found.k.dtype == torch.float32
    found = LayerScales().add('k', 'n', torch.ones(4))
    with pytest.raises(ScaleError, match=r'model\.layers\.2: k_scale has 4 elements.*per-tensor scales only'):
        found.resolved('model.layers.2')
    assert LayerScales(k=torch.ones(4), source='file').resolved('')[0].shape == (4, )


def test_zero_points_that_are_zero_change_nothing():
    found = LayerScales(k=value(0.5)).add('zero point', 'n', torch.zeros(4)).add('unused', 'q', value(math.nan))
    assert found == LayerScales(k=found.k)


def test_file_round_trip(tmp_path):
    path = tmp_path / 'kv_scales.safetensors'
    layers = {0: (value(0.5), value(0.25)), 1: (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))}
    write_file(path, layers, {'format': 'kvq', 'data': 'built-in'})
    file = read_file(path)
    assert file.metadata.pop('scale_digest') == digest_of_scales(layers)
    assert file.metadata == {'format': 'kvq', 'data': 'built-in'}
    for layer, pair in layers.items():
        k, v, source = file.layers[layer].resolved('')
        assert torch.equal(k, pair[0]) and torch.equal(v, pair[1]) and source == 'file'
    validate(file, range(2), num_kv_heads=2)


def test_vllm_json_is_read(tmp_path):
    """One rank: a scalar for K and V. Two ranks: one value per half of the KV heads."""
    path = tmp_path / 'kv_cache_scales.json'
    for ranks, expected in (({'0': {'0': 0.5, '1': 0.25}}, [0.5]),
                            ({'0': {'0': 0.5, '1': 1}, '1': {'0': 0.75, '1': 1}}, [0.5, 0.5, 0.75, 0.75])):
        path.write_text(json.dumps({'model_type': 'llama', 'kv_cache': {'dtype': 'float8_e4m3fn',
                                                                        'scaling_factor': ranks}}))
        file = read_file(path)
        validate(file, range(2), num_kv_heads=4)
        k, v, _ = file.layers[0].resolved('')
        assert torch.equal(k, v)
        assert shard(k, 4, 0, 1).flatten().tolist() == expected


def broken(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Files that must be refused, and what the message says."""
    (tmp_path / 'cut.safetensors').write_bytes(b'\x10\x00\x00\x00')
    (tmp_path / 'cut.json').write_text('{"kv_cache": ')
    save_file({'model.layers.0.attention.k_scale': torch.ones(1)}, tmp_path / 'named.safetensors')
    return {'absent': (tmp_path / 'none.safetensors', 'does not exist'),
            'truncated': (tmp_path / 'cut.safetensors', 'cannot be read'),
            'json': (tmp_path / 'cut.json', 'cannot be read'),
            'names': (tmp_path / 'named.safetensors', 'unknown key')}


@pytest.mark.parametrize('which', ['absent', 'truncated', 'json', 'names'])
def test_broken_files_are_refused_by_name(tmp_path, which):
    path, message = broken(tmp_path)[which]
    with pytest.raises(ScaleError, match=f'{path.name}.*{message}'):
        read_file(path)


@pytest.mark.parametrize(('layers', 'message'), [
    ({0: LayerScales(k=value(1))}, 'no scales for layer 1'),
    ({n: LayerScales(k=value(1)) for n in range(3)}, 'unknown layer 2'),
    ({0: LayerScales(k=value(1)), 1: LayerScales(k=torch.ones(3))}, r'layer 1: k_scale has shape \(3,\)'),
    ({0: LayerScales(k=value(1)), 1: LayerScales(k=value(1), v=value(math.nan))}, 'layer 1: v_scale is nan'),
    ({0: LayerScales(k=torch.tensor([1.0, 0.0])), 1: LayerScales(k=value(1))}, 'layer 0: k_scale is 0'),
])
def test_files_are_validated_against_the_model(layers, message):
    with pytest.raises(ScaleError, match=message):
        validate(ScaleFile(layers, path='f.safetensors'), range(2), num_kv_heads=2)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]))
def test_ranks_share_the_heads(heads, world):
    """Splitting and joining gives every head back; with fewer heads than ranks they are replicated in order."""
    scale = torch.arange(heads) + 1.0
    parts = torch.cat([shard(scale, heads, rank, world).reshape(-1) for rank in range(world)])
    repeat = max(world // heads, 1) if heads > 1 else world
    assert torch.equal(parts, scale.repeat_interleave(repeat) if world > heads or heads == 1 else scale)
    assert all(float(shard(value(0.5), heads, rank, world)) == 0.5 for rank in range(world))
