"""Block diffusion (SDAR): checked and loaded on a CPU, generated on a GPU. Its attention is in test_attention.py."""
from __future__ import annotations

import json
from pathlib import Path

import engines
import models
import pytest
import torch
from test_architectures import cache_config, model_config

import lmdeploy_kvq as kvq

pytestmark = pytest.mark.covers('feature.dllm')
BLOCK, PASSAGES = 4, engines.PASSAGES[:2]
SHAPE = {'vocab_size': 151936, 'hidden_size': 128, 'intermediate_size': 128}  # LMDeploy fixes the mask's id


def write_sdar(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A tiny SDAR: Qwen3 under another name, whose head answers with the first 256 tokens only."""
    from safetensors.torch import load_file, save_file
    models.write(folder, 'qwen3', dtype, **SHAPE)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'model_type': 'sdar', 'architectures': ['SDARForCausalLM'],
                                'sliding_window': None}))
    weights = load_file(folder / 'model.safetensors')
    weights['lm_head.weight'][models.VOCAB:] = 0
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An fp16 model: LMDeploy asks the GPU about bf16."""
    kvq.install()
    path = tmp_path_factory.mktemp('sdar')
    write_sdar(path, torch.float16)
    return path


def test_every_format_accepts_it(folder):
    from lmdeploy.pytorch.engine import executor
    config = model_config(folder)
    assert config.model_paradigm == 'dllm'
    for fmt in kvq.FORMATS:
        executor._finalize_sparse_mla_cache_policy([config], cache_config(fmt.policy))


def test_its_attention_says_how_long_a_block_is(folder):
    """Loaded by LMDeploy: what our decoding asks of a layer is there, and it is never FlashAttention-3."""
    from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl
    from lmdeploy.pytorch.config import DLLMConfig
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.models.patch import BuildModelContext, build_patched_model
    from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights

    from lmdeploy_kvq.backends.attention import window_of
    from lmdeploy_kvq.backends.loading import attention_layers
    context = BuildModelContext(dllm_config=DLLMConfig(block_length=BLOCK))
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        model = build_patched_model(model_config(folder), device='cpu', build_model_ctx=context)
        load_model_weights(model, str(folder), device='cpu')
    layers = list(attention_layers(model).values())
    assert len(layers) == 2
    for layer in layers:
        assert type(layer.impl) is TritonAttentionImpl and layer.impl.block_sparse_size == BLOCK
        assert window_of(layer.impl) is None


@pytest.mark.gpu
def test_blocks_are_those_of_the_bf16_cache(tmp_path):
    """The first block after a prompt: as many tokens as bf16's as the formats' predictions let expect.

    A token of the block is taken when it is the surest, and the others are predicted again: each is up to four
    predictions away from bf16's.
    """
    write_sdar(tmp_path)
    prompts = models.prompts(96, 32, seed=4, step=BLOCK)
    engine = {'num_gpu_blocks': 900, 'max_batch_size': 96, 'cudagraph_capture_batch_sizes': [96],
              'dllm_block_length': BLOCK, 'dllm_denoising_steps': BLOCK,
              'dllm_unmasking_strategy': 'low_confidence_static'}
    policies = {'none': 0, **{name: kvq.get_format(name).policy for name in engines.FORMATS}}
    specs = {name: {'prompts': prompts, 'new_tokens': BLOCK, 'quant_policy': policy, 'engine': engine, 'out': ''}
             for name, policy in policies.items()}
    specs['eager'] = {**specs['none'], 'engine': {**engine, 'eager_mode': True}}
    runs = engines.run(tmp_path, specs)

    def differing(a: dict, b: dict) -> float:
        pairs = [(x, y) for ours, theirs in zip(a['tokens'], b['tokens']) for x, y in zip(ours, theirs, strict=True)]
        return sum(x != y for x, y in pairs) / len(pairs)

    floor = differing(runs['none'], runs['eager'])
    model = models.build('qwen3', **SHAPE).to(torch.bfloat16).float()
    model.lm_head.weight.data[models.VOCAB:] = 0
    base = [models.log_probabilities(model, ids) for ids in PASSAGES]
    for name in engines.FORMATS:
        cached = [models.log_probabilities(model, ids, models.quantized_cache(model, name)) for ids in PASSAGES]
        missed = torch.cat([q.argmax(-1) != p.argmax(-1) for p, q in zip(base, cached)])
        found, expected = differing(runs['none'], runs[name]), float(missed.float().mean())
        print(name, found, expected, floor)
        assert found <= BLOCK * expected + 2 * floor + 0.02
