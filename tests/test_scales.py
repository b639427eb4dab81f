"""Static scales: names, rules, files, sharding, and LMDeploy's real loader on small checkpoints of every scheme."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmdeploy_kvq import FORMATS
from lmdeploy_kvq.scales import (
    LayerScales,
    ScaleError,
    ScaleFile,
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


def write_model(folder: Path, family: str) -> None:
    """A tiny random model of a family, as transformers saves it (fp16: LMDeploy asks the GPU about bf16)."""
    import transformers
    common = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                  tie_word_embeddings=family == 'Gemma')
    if family == 'Qwen3Moe':
        common.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if family in ('Mixtral', 'GptOss'):
        common.update(num_local_experts=4, num_experts_per_tok=2)
    config = getattr(transformers, f'{family}Config')(**common)
    torch.manual_seed(0)
    getattr(transformers, f'{family}ForCausalLM')(config).to(torch.float16).save_pretrained(folder)


def load(folder: Path, config: dict | None = None):
    """LMDeploy's model with the folder's weights, through its own loader."""
    from lmdeploy.pytorch.config import ModelConfig
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.models.patch import BuildModelContext, build_patched_model
    from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights
    if config is not None:
        path = folder / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    model_config = ModelConfig.from_pretrained(str(folder), dtype='float16', device_type='cuda')
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        model = build_patched_model(model_config, device='cpu',
                                    build_model_ctx=BuildModelContext(quant_config=model_config.quant_config))
        load_model_weights(model, str(folder), device='cpu')
    return model


def add_scales(folder: Path, scales: dict[str, torch.Tensor]) -> None:
    """Put tensors into a checkpoint."""
    path = folder / 'model.safetensors'
    save_file(load_file(path) | scales, path, metadata={'format': 'pt'})


def buffers(model) -> list[tuple[float, float]]:
    from lmdeploy_kvq.backends.loading import attention_layers
    return [(float(m.k_scale), float(m.v_scale)) for m in attention_layers(model).values()]


SCHEMES = {
    'vllm': ('self_attn.attn.k_scale', 'self_attn.attn.v_scale'),
    'llmcompressor': ('self_attn.k_scale', 'self_attn.v_scale'),
    'merged': ('self_attn.kv_scale', None),
    'modelopt': ('self_attn.k_proj.k_scale', 'self_attn.v_proj.v_scale'),
    'qkv': ('self_attn.qkv_proj.k_scale', 'self_attn.qkv_proj.v_scale'),
    'output': ('self_attn.k_proj.output_scale', 'self_attn.v_proj.output_scale'),
    'mixer': ('mixer.k_proj.k_scale', 'mixer.v_proj.v_scale'),
    'cache': ('self_attn.k_cache.scale', 'self_attn.v_cache.scale'),
    'k only': ('self_attn.k_scale', None),
}


@pytest.mark.parametrize('scheme', SCHEMES)
def test_every_naming_scheme_loads(tmp_path, scheme):
    """The real loader, which fails with a KeyError on these names without us."""
    from lmdeploy_kvq.backends.loading import settle
    write_model(tmp_path, 'Llama')
    names = SCHEMES[scheme]
    values = [(0.5, 0.25), (2.0, 4.0)]
    add_scales(tmp_path, {f'model.layers.{layer}.{name}': value(values[layer][i])
                          for layer in range(2) for i, name in enumerate(names) if name}
               | {'model.layers.0.self_attn.q_scale': value(3.0), 'model.layers.1.self_attn.prob_scale': value(3.0)})
    model = load(tmp_path)
    audit = settle(model, 16, str(tmp_path), 2)
    assert buffers(model) == [(k, v if names[1] else k) for k, v in values]
    assert [row[3] for row in audit] == ['checkpoint'] * 2


@pytest.mark.parametrize('family', ['Llama', 'Qwen2', 'Qwen3', 'Qwen3Moe', 'Mistral', 'Mixtral', 'Gemma',
                                    pytest.param('GptOss', marks=pytest.mark.gpu)])
def test_every_family_loads(tmp_path, family):
    from lmdeploy_kvq.backends.loading import settle
    write_model(tmp_path, family)
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_scale': value(n + 1.5) for n in range(2) for x in 'kv'})
    model = load(tmp_path)
    settle(model, 16, str(tmp_path), 2)
    assert buffers(model) == [(1.5, 1.5), (2.5, 2.5)]


def test_order_of_sources_strict_and_updates(tmp_path, monkeypatch):
    """File before checkpoint before 1.0; buffers are filled in place; live updates follow; strict refuses defaults."""
    from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader

    from lmdeploy_kvq.backends.loading import SCALES, attention_layers, settle
    write_model(tmp_path, 'Llama')
    model = load(tmp_path)
    layers = attention_layers(model)
    addresses = [m.k_scale.data_ptr() for m in layers.values()]
    assert [row[3] for row in settle(model, 16, str(tmp_path), 2)] == ['default'] * 2 and buffers(model) == [(1, 1)] * 2
    monkeypatch.setenv(SCALES, 'strict')
    with pytest.raises(ScaleError, match='strict: no scales for 2 of 2 layers'):
        settle(model, 16, str(tmp_path), 2)
    monkeypatch.delenv(SCALES)

    update = [('model.layers.1.self_attn.k_scale', value(0.125)), ('model.norm.weight', torch.ones(64))]
    rest = list(ModelWeightLoader._rename_weights_iterator(iter(update), model))
    assert [name for name, _ in rest] == ['model.norm.weight']
    assert buffers(model) == [(1, 1), (0.125, 0.125)]
    assert [m.k_scale.data_ptr() for m in layers.values()] == addresses

    write_file(tmp_path / 'kv_scales.safetensors', {n: (value(n + 3.0), value(n + 5.0)) for n in range(2)}, {})
    assert [row[3] for row in settle(model, 16, str(tmp_path), 2)] == ['file'] * 2
    assert buffers(model) == [(3, 5), (4, 6)]
    list(ModelWeightLoader._rename_weights_iterator(iter(update), model))
    assert buffers(model) == [(3, 5), (4, 6)], 'a file overrides the checkpoint'

    other = tmp_path / 'other.safetensors'
    write_file(other, {n: (torch.tensor([1.0, 2.0]), value(7.0)) for n in range(2)}, {})
    monkeypatch.setenv(SCALES, str(other))
    settle(model, 16, str(tmp_path), 2, rank=1, world_size=2)
    assert [(m.k_scale.tolist(), float(m.v_scale)) for m in layers.values()] == [([2.0], 7.0)] * 2


UNUSABLE = {
    'zero': ('k_scale', value(0.0), 'k_scale is 0'),
    'nan': ('v_scale', value(math.nan), 'v_scale is nan'),
    'per head': ('k_scale', torch.ones(2), r'k_scale has 2 elements.*per-tensor scales only'),
    'per channel': ('v_scale', torch.ones(2, 16), r'v_scale has 32 elements'),
    'zero point': ('k_zero_point', value(3.0), r'k_zero_point is not zero.*zero points are not supported'),
}
IGNORING = [0, 8, *(fmt.policy for fmt in FORMATS if fmt.per_token_head)]
STATIC = [fmt.policy for fmt in FORMATS if not fmt.per_token_head]


@pytest.mark.parametrize('which', UNUSABLE)
def test_only_static_policies_mind_unusable_scales(tmp_path, which):
    """bf16, LMDeploy's integers and per-token-head formats ignore them, static ones name layer and value."""
    from lmdeploy_kvq.backends.loading import model_scales, settle
    write_model(tmp_path, 'Llama')
    name, tensor, message = UNUSABLE[which]
    add_scales(tmp_path, {f'model.layers.1.self_attn.{name}': tensor})
    for policy in IGNORING:
        model = load(tmp_path)
        assert settle(model, policy, str(tmp_path), 2) == [] and buffers(model) == [(1, 1)] * 2
        assert model_scales(model).layers == {}
    for policy in STATIC:
        with pytest.raises(ScaleError, match=rf'layers\.1\..*{message}'):
            settle(load(tmp_path), policy, str(tmp_path), 2)


@pytest.mark.parametrize('which', UNUSABLE)
def test_live_updates_with_unusable_scales(tmp_path, which):
    """Ignored and refused by the same policies; what was served before stays."""
    from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader

    from lmdeploy_kvq.backends.loading import model_scales, settle
    write_model(tmp_path, 'Llama')
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_scale': value(0.5) for n in range(2) for x in 'kv'})
    model = load(tmp_path)
    name, tensor, message = UNUSABLE[which]
    update = [(f'model.layers.1.self_attn.{name}', tensor), ('model.norm.weight', torch.ones(64))]

    settle(model, STATIC[0], str(tmp_path), 2)
    with pytest.raises(ScaleError, match=rf'layers\.1\..*{message}'):
        list(ModelWeightLoader._rename_weights_iterator(iter(update), model))
    again = [('model.layers.1.self_attn.q_scale', value(1.0)), ('model.layers.1.self_attn.k_scale', value(0.25))]
    assert list(ModelWeightLoader._rename_weights_iterator(iter(again), model)) == []
    assert buffers(model) == [(0.5, 0.5), (0.25, 0.5)]

    for policy in IGNORING:
        model = load(tmp_path)
        settle(model, policy, str(tmp_path), 2)
        left = list(ModelWeightLoader._rename_weights_iterator(iter(update), model))
        assert [name for name, _ in left] == ['model.norm.weight'] and model_scales(model).layers == {}
        assert buffers(model) == [(1, 1)] * 2


@pytest.mark.parametrize('config', [
    {'quant_method': 'compressed-tensors', 'config_groups': {}, 'kv_cache_scheme': {'num_bits': 8, 'type': 'float'}},
    {'quant_method': 'modelopt', 'quant_algo': None, 'kv_cache_quant_algo': 'FP8'},
], ids=lambda c: c['quant_method'])
def test_checkpoints_that_quantize_only_the_cache_load(tmp_path, config):
    write_model(tmp_path, 'Llama')
    add_scales(tmp_path, {'model.layers.0.self_attn.k_scale': value(0.5), 'model.layers.1.self_attn.k_scale': value(2)})
    from lmdeploy_kvq.backends.loading import settle
    model = load(tmp_path, {'quantization_config': config})
    settle(model, 16, str(tmp_path), 2)
    assert buffers(model) == [(0.5, 0.5), (2.0, 2.0)]


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path):
    write_model(tmp_path, 'Llama')
    with pytest.raises(ValueError, match=r'modelopt.*quant_algo FP8'):
        load(tmp_path, {'quantization_config': {'quant_method': 'modelopt', 'quant_algo': 'FP8'}})
