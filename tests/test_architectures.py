"""Every architecture as far as a machine without a GPU can see: configuration, checks, sizes, weights.

The tiny models are transformers' own (tests/models.py). What their caches do on a GPU is in test_architectures_gpu.py.
"""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import models
import pytest
import torch
from models import ARCHITECTURES

import lmdeploy_kvq as kvq
from lmdeploy_kvq import capacity, cli
from lmdeploy_kvq._autoload import SCALES
from lmdeploy_kvq.plan import Settings, cache_shape, read_model

EACH = pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.covers(f'arch.{name}'))
                                        for name in ARCHITECTURES])


@pytest.fixture(scope='module', autouse=True)
def installed():
    """The hook, whatever this process's environment says."""
    kvq.install()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Folder of an architecture's model, written once; fp16: LMDeploy asks the GPU about bf16."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            path = tmp_path_factory.mktemp(name)
            models.write(path, name, torch.float16)
            folders[name] = path
        return folders[name]

    return folder


def model_config(folder: Path):
    """As the engine reads it."""
    from lmdeploy.pytorch.config import ModelConfig
    return ModelConfig.from_pretrained(str(folder), dtype='float16', device_type='ascend')  # asks no GPU about bf16


def cache_config(policy: int, **changes):
    """As the engine makes it."""
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch.config import CacheConfig
    return CacheConfig(**{'max_batches': 8, 'block_size': 64, 'num_cpu_blocks': 0, 'num_gpu_blocks': 4,
                          'kernel_block_size': 64, 'quant_policy': QuantPolicy(policy), **changes})


@EACH
def test_predictions_depend_on_the_cache(name):
    """What the GPU's tests compare would show a broken cache: without V, or with other tokens' K."""
    model, ids = models.build(name), models.prompts(1, 200)[0]
    for which in ('values', 'keys'):
        assert models.forget(model, ids, which) > 0.2


@EACH
def test_the_engine_accepts_it(written, name):
    """LMDeploy's configuration of the model, the check that runs before loading, in every format."""
    from lmdeploy.pytorch.engine import executor
    arch, config = ARCHITECTURES[name], model_config(written(name))
    text = arch.text
    assert (config.num_layers, config.head_dim) == (arch.cached, text['head_dim'])
    assert bool(config.states_shapes) == ('linear_attention' in text.get('layer_types', ()))
    for fmt in kvq.FORMATS:
        executor._finalize_sparse_mla_cache_policy([config], cache_config(fmt.policy))


@EACH
def test_the_model_agent_finds_a_tokenizer(written, name, monkeypatch):
    """LMDeploy's engine loads one also where it is given token ids, and compiles grammars for it."""
    from lmdeploy.pytorch.engine.guided_process import GuidedDecodingManager
    from lmdeploy.tokenizer import Tokenizer
    if name == 'gpt_oss':  # as scripts/token_engine.py does: it would be downloaded
        monkeypatch.setattr('openai_harmony.load_harmony_encoding', lambda name: None)
    tokenizer = Tokenizer(str(written(name))).model.model
    assert len(tokenizer) >= models.VOCAB and tokenizer.decode(tokenizer.encode('K and V')) == 'K and V'
    manager = GuidedDecodingManager(tokenizer, models.VOCAB)
    manager.get_processor(0, 0, {'type': 'regex_schema', 'regex_schema': '[0-9]+'})


@EACH
def test_doctor_checks_it(written, name, monkeypatch, capsys):
    """The command: what the engine would store, and every layer's scales where LMDeploy can build the model."""
    monkeypatch.setenv(SCALES, '')
    arch = ARCHITECTURES[name]
    static = next(fmt for fmt in kvq.FORMATS if fmt.needs_scales)
    cli.main(['doctor', '--model', str(written(name)), '--quant-policy', static.name, '--json'])
    found = json.loads(capsys.readouterr().out)
    assert all(row['supported'] for row in found['formats'])
    assert found['cache'] == {'layers': arch.cached, 'kv_heads': arch.text['num_key_value_heads'],
                              'head_dim': arch.text['head_dim'], 'v_head_dim': arch.text['head_dim']}
    assert len(found['problems']) == 1
    if all(importlib.util.find_spec(module) for module in arch.needs):
        assert [row['source'] for row in found['layers']] == ['default'] * arch.cached
        assert f'{arch.cached} of {arch.cached} layers have no' in found['problems'][0]
    else:
        assert 'cannot build this model: ' in found['problems'][0] and found['layers'] == []


@EACH
def test_plan_counts_what_the_engine_allocates(written, name):
    """Bytes of a block, of the layers that keep K and V: those that LMDeploy's own plan has, for every format."""
    from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan
    config, model = model_config(written(name)), read_model(written(name))
    arch = ARCHITECTURES[name]
    assert (model.layers, model.all_layers) == (arch.cached, arch.text['num_hidden_layers'])
    shape = cache_shape(model, Settings(1))
    for fmt in (None, *kvq.FORMATS):
        planned = build_block_cache_plan(config, cache_config(0 if fmt is None else fmt.policy), 1)
        assert capacity.block_bytes(fmt, shape) == planned.logical_block_nbytes


@EACH
def test_its_weights_load(written, name):
    """Through LMDeploy's own loader, into as many paged attentions as there are layers with K and V."""
    from test_loading import load

    from lmdeploy_kvq.backends.loading import attention_layers
    arch = ARCHITECTURES[name]
    if not arch.loads_on_cpu or arch.needs:
        pytest.skip('LMDeploy loads it with CUDA only')
    layers = attention_layers(load(written(name)))
    assert len(layers) == arch.cached
    assert {module.impl.head_size for module in layers.values()} == {arch.text['head_dim']}


@pytest.mark.covers('arch.mla')
@pytest.mark.parametrize('family', ['DeepseekV2', 'DeepseekV3', 'DeepseekV4', 'MiniCPM3', 'Glm4MoeLite'])
def test_models_without_k_and_v_per_head_are_refused(tmp_path, family, capsys):
    """In the check that runs before loading, by doctor, and by plan where the configuration says that it is MLA."""
    import transformers
    from lmdeploy.pytorch.engine import executor

    from lmdeploy_kvq.backends.audit import read_config
    config = getattr(transformers, f'{family}Config')()
    config.architectures = [f'{family}ForCausalLM']
    config.save_pretrained(tmp_path)
    read = read_config(str(tmp_path))
    for fmt in kvq.FORMATS:
        with pytest.raises(ValueError, match=r'latent \(MLA\) or non-standard KV cache'):
            executor._finalize_sparse_mla_cache_policy([read], cache_config(fmt.policy))
    assert cli.main(['doctor', '--model', str(tmp_path)]) == 1
    assert 'keeps a latent (MLA) or non-standard KV cache' in ' '.join(capsys.readouterr().out.split())
    if getattr(config, 'kv_lora_rank', None):
        assert cli.main(['plan', str(tmp_path), '--gpu-memory', '80G']) == 2
        assert 'keeps a latent (MLA) KV cache' in ' '.join(capsys.readouterr().err.split())


def test_published_intervals_of_full_attention(tmp_path):
    """Qwen3-Next as published: an interval, and no list of layer types. Every fourth of 48 layers has K and V."""
    import transformers
    config = transformers.Qwen3NextConfig(architectures=['Qwen3NextForCausalLM']).to_dict()
    config.pop('layer_types')
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'full_attention_interval': 4}))
    model = read_model(tmp_path)
    assert (model.layers, model.all_layers) == (12, 48)
