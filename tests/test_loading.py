"""Scales through LMDeploy's real loader, on small checkpoints of every naming scheme, family and quantization."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_kvq import FORMATS
from lmdeploy_kvq.scales import FILE_NAME, ScaleError, write_file


def value(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


def write_model(folder: Path, family: str, size: int = 64) -> None:
    """A tiny random model of a family, as transformers saves it (fp16: LMDeploy asks the GPU about bf16)."""
    import transformers
    common = dict(vocab_size=64, hidden_size=size, intermediate_size=size, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=size // 4, max_position_embeddings=64, bos_token_id=1,
                  eos_token_id=2, tie_word_embeddings=family == 'Gemma')
    if family == 'Qwen3Moe':
        common.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if family in ('Mixtral', 'GptOss'):
        common.update(num_local_experts=4, num_experts_per_tok=2)
    config = getattr(transformers, f'{family}Config')(**common)
    torch.manual_seed(0)
    getattr(transformers, f'{family}ForCausalLM')(config).to(torch.float16).save_pretrained(folder)


def load(folder: Path, config: dict | None = None, weights: bool = True):
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
        if weights:
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
        rows = settle(model, policy, str(tmp_path), 2)  # of transforms, where a file may bring some
        assert {row[3] for row in rows} <= {'default'} and buffers(model) == [(1, 1)] * 2
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


def quantize_weights(folder: Path, block: int | None) -> dict:
    """A checkpoint's projections in fp8, as AutoFP8 (one scale each) or in blocks; returns the quantization config."""
    path, out = folder / 'model.safetensors', {}
    for name, weight in load_file(path).items():
        if not name.endswith('_proj.weight'):
            out[name] = weight
            continue
        scale = weight.float().abs().max() / 448
        out[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        if block is None:
            out[name + '_scale'], out[name.replace('.weight', '.input_scale')] = scale.clone(), value(1.0)
        else:
            out[name + '_scale_inv'] = scale.repeat(*(size // block for size in weight.shape))
    save_file(out, path, metadata={'format': 'pt'})
    scheme: dict = {'quant_method': 'fp8', 'activation_scheme': 'static' if block is None else 'dynamic'}
    return scheme if block is None else {**scheme, 'weight_block_size': [block, block]}


@pytest.mark.parametrize('block', [None, 128], ids=['per tensor', 'blocked'])
def test_fp8_checkpoints_with_a_cache_scheme_load(tmp_path, block):
    """Weights in fp8 by LMDeploy's own layers, the cache's scales by ours."""
    from lmdeploy_kvq.backends.loading import settle
    write_model(tmp_path, 'Llama', 512)
    plain = load_file(tmp_path / 'model.safetensors')['model.layers.1.self_attn.v_proj.weight'].float()
    config = quantize_weights(tmp_path, block)
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_proj.output_scale': value(n + i / 4 + 0.5)
                          for n in range(2) for i, x in enumerate('kv')})
    model = load(tmp_path, {'quantization_config': {**config, 'kv_cache_scheme': 'static'}})
    assert [row[3] for row in settle(model, 16, str(tmp_path), 2)] == ['checkpoint'] * 2
    assert buffers(model) == [(0.5, 0.75), (1.5, 1.75)]
    qkv = model.model.layers[1].self_attn.qkv_proj
    assert qkv.weight.dtype == torch.float8_e4m3fn
    scale = qkv.weight_scale[-256:, None] if block is None else qkv.weight_scale_inv[-2:].repeat_interleave(
        128, 0).repeat_interleave(128, 1)
    decoded = qkv.weight[-256:].float() * scale
    assert (decoded - plain).norm() / plain.norm() < 0.03


KV_ONLY = {'quant_method': 'compressed-tensors', 'config_groups': {}, 'kv_cache_scheme': {'num_bits': 8,
                                                                                         'type': 'float'}}
FP8_GROUP = {'group_0': {'targets': ['Linear'], 'weights': {'type': 'float', 'num_bits': 8, 'strategy': 'tensor'}}}


@pytest.mark.parametrize(('config', 'message'), [
    ({'quant_method': 'modelopt', 'quant_algo': 'FP8'}, r'modelopt.*quant_algo FP8.*LMDeploy loads unquantized'),
    ({'quant_method': 'compressed-tensors', 'config_groups': FP8_GROUP, 'kv_cache_scheme': {'type': 'float'}},
     r'compressed-tensors.*fp8 weights \(group_0: tensor\) are not supported.*quant_method fp8'),
], ids=['modelopt', 'compressed-tensors'])
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path, config, message):
    write_model(tmp_path, 'Llama')
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {'quantization_config': config})


def test_modelopts_own_file_is_read(tmp_path):
    """hf_quant_config.json: an fp8 KV cache alone loads, quantized weights are refused."""
    from lmdeploy_kvq.backends.loading import settle
    write_model(tmp_path, 'Llama')
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_proj.{x}_scale': value(0.5) for n in range(2) for x in 'kv'})
    path = tmp_path / 'hf_quant_config.json'
    path.write_text(json.dumps({'producer': {'name': 'modelopt'},
                                'quantization': {'quant_algo': None, 'kv_cache_quant_algo': 'FP8'}}))
    model = load(tmp_path)
    settle(model, 16, str(tmp_path), 2)
    assert buffers(model) == [(0.5, 0.5)] * 2
    path.write_text(json.dumps({'quantization': {'quant_algo': 'FP8', 'kv_cache_quant_algo': 'FP8'}}))
    with pytest.raises(ValueError, match='quant_algo FP8'):
        load(tmp_path)
    assert load(tmp_path, {'quantization_config': KV_ONLY}) is not None, 'config.json comes first'


def test_files_of_the_working_folder_are_nobodys(tmp_path, monkeypatch):
    """A configuration that comes from no folder is not mixed up with one that lies here."""
    from types import SimpleNamespace

    from lmdeploy_kvq.backends.checkpoints import declares_fp8_cache
    (tmp_path / 'hf_quant_config.json').write_text(json.dumps({'quantization': {'kv_cache_quant_algo': 'FP8'}}))
    monkeypatch.chdir(tmp_path)
    assert not declares_fp8_cache(SimpleNamespace(name_or_path=''))
    assert declares_fp8_cache(SimpleNamespace(name_or_path=str(tmp_path)))


@pytest.mark.parametrize(('config', 'advised'), [
    ({'quant_method': 'fp8', 'activation_scheme': 'static', 'kv_cache_scheme': 'static'}, True),
    ({'quant_method': 'fp8', 'activation_scheme': 'static'}, False),
    ({'quant_method': 'modelopt', 'quant_algo': None, 'kv_cache_quant_algo': 'FP8'}, True),
    ({'quant_method': 'modelopt', 'quant_algo': None, 'kv_cache_quant_algo': None}, False),
    ({'quant_method': 'compressed-tensors', 'config_groups': {}, 'kv_cache_scheme': {'num_bits': 8, 'type': 'float'}},
     True),
    ({'quant_method': 'compressed-tensors', 'config_groups': {}, 'kv_cache_scheme': {'num_bits': 8, 'type': 'int'}},
     False),
    (None, False),
])
def test_policy_none_is_advised_where_the_configuration_declares_an_fp8_cache(tmp_path, caplog, config, advised):
    """By LMDeploy's own step before loading; scales need not be there. Other policies hear nothing."""
    import lmdeploy.pytorch.engine.executor as executor
    from lmdeploy.pytorch.config import CacheConfig, ModelConfig
    write_model(tmp_path, 'Llama')
    if config is not None:
        path = tmp_path / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'quantization_config': config}))
    model_config = ModelConfig.from_pretrained(str(tmp_path), dtype='float16', device_type='cuda')
    for policy in (0, 16, 8):
        caplog.clear()
        cache_config = CacheConfig(max_batches=8, block_size=64, num_cpu_blocks=0, num_gpu_blocks=8,
                                   quant_policy=policy)
        executor._finalize_sparse_mla_cache_policy([model_config], cache_config)
        lines = [r.message for r in caplog.records if 'declares an FP8 KV cache' in r.message]
        assert len(lines) == (advised and policy == 0)
        assert all('--quant-policy fp8 ' in line for line in lines) and cache_config.quant_policy == policy


def build(folder: Path, policy: int, empty: bool = False, before=None):
    """LMDeploy's own ``BaseModelAgent._build_model`` with what it needs of an agent, on the CPU; returns the agent."""
    from types import SimpleNamespace

    from lmdeploy.pytorch.config import ModelConfig
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
    agent = SimpleNamespace(
        patched_model=before, rank=0, model_path=str(folder), adapters=None, device='cpu', need_output=True,
        strategy_factory=None, backend_config=SimpleNamespace(enable_deterministic=False),
        misc_config=SimpleNamespace(empty_init=empty, language_model_only=False, dllm_config=None,
                                    enable_return_routed_experts=False),
        spec_agent=SimpleNamespace(build_model_context=lambda: None, num_spec_tokens=0),
        cache_config=SimpleNamespace(quant_policy=policy, max_batches=8),
        model_config=ModelConfig.from_pretrained(str(folder), dtype='float16', device_type='cuda'))
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        BaseModelAgent._build_model(agent)
    return agent


def wrapped(model):
    """A model as its agent holds it once it serves: in a graph runner."""
    from types import SimpleNamespace
    return SimpleNamespace(get_model=lambda: model)


def test_engines_build_their_models_with_scales(tmp_path, caplog):
    """Through the patched method of LMDeploy's agent, with weights."""
    write_model(tmp_path, 'Llama')
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_scale': value(n + 1.5) for n in range(2) for x in 'kv'})
    agent = build(tmp_path, 16)
    assert isinstance(agent.patched_model, torch.nn.Module) and buffers(agent.patched_model) == [(1.5, 1.5), (2.5, 2.5)]
    for policy in IGNORING:
        caplog.clear()
        assert buffers(build(tmp_path, policy).patched_model) == [(1, 1)] * 2
        assert ('carries scales of an FP8 KV cache' in caplog.text) == (policy == 0)


def test_a_rebuilt_model_keeps_its_scales(tmp_path):
    """Level-2 wake-up: no weights are read, and the new model has the old one's scales, live updates included."""
    from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader
    write_model(tmp_path, 'Llama')
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_scale': value(n + 1.5) for n in range(2) for x in 'kv'})
    first = build(tmp_path, 16, empty=True)
    assert buffers(first.patched_model) == [(1.5, 1.5), (2.5, 2.5)], "no weights, the checkpoint's scales"
    model = first.patched_model
    update = iter([('model.layers.0.self_attn.k_scale', value(7.0))])
    assert list(ModelWeightLoader._rename_weights_iterator(update, model)) == []
    model.to('meta')
    again = build(tmp_path, 16, empty=True, before=wrapped(model)).patched_model
    assert again is not model and buffers(again) == [(7.0, 1.5), (2.5, 2.5)]


def test_a_rebuilt_models_transforms_are_where_its_weights_are(tmp_path, monkeypatch):
    """Level-2 wake-up: Llama makes its scale buffers on the host, and no weights are read that would move them."""
    write_model(tmp_path, 'Llama')
    fmt = next(fmt for fmt in FORMATS if fmt.takes_transform)
    write_file(tmp_path / FILE_NAME, {}, {'format': fmt.name},
               {n: {'k_transform': torch.eye(16).repeat(2, 1, 1)} for n in range(2)})
    from lmdeploy.pytorch.engine.model_agent import agent
    from lmdeploy.pytorch.models.patch import build_patched_model

    from lmdeploy_kvq.backends.attention import TRANSFORM
    from lmdeploy_kvq.backends.loading import attention_layers

    def elsewhere(*args, **kwargs):
        """Weights on the meta device, as they would be on a GPU; buffers where Llama makes them."""
        model = build_patched_model(*args, **kwargs)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(weight.to('meta'), weight.requires_grad)
        return model

    monkeypatch.setattr(agent, 'build_patched_model', elsewhere)
    model = build(tmp_path, fmt.policy, empty=True).patched_model
    for layer in attention_layers(model).values():
        assert getattr(layer.impl, TRANSFORM).inverse.device.type == layer.k_scale.device.type == 'meta'
