"""Tiny random-weight models of real architectures, written as checkpoints that LMDeploy's loader reads.

Their attention matters: scores spread by about two (a softmax over them prefers few tokens), and what it returns is as
large as what else a layer adds. With the weights that architectures are initialized with, attention is nearly uniform,
its average nearly zero, and a broken cache would not show. :func:`forget` measures it.
"""
from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB, HIDDEN, WINDOW = 256, 256, 96
SCORE = 1.5
"""Standard deviation of the elements of queries and keys; of scores it is the square."""

_COMMON = {'vocab_size': VOCAB, 'hidden_size': HIDDEN, 'intermediate_size': 256, 'num_hidden_layers': 2,
           'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 128, 'max_position_embeddings': 8192,
           'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'tie_word_embeddings': False}
_MOE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 64}
_LINEAR = {'head_dim': 256, 'num_hidden_layers': 4, 'layer_types': ['linear_attention'] * 3 + ['full_attention'],
           'linear_num_key_heads': 2, 'linear_num_value_heads': 4, 'linear_key_head_dim': 64,
           'linear_value_head_dim': 64, 'full_attention_interval': 4}
_VISION = {'depth': 1, 'num_heads': 2, 'patch_size': 14, 'spatial_merge_size': 2, 'temporal_patch_size': 2}
_TOKENS = {'image_token_id': 250, 'video_token_id': 251, 'vision_start_token_id': 252, 'vision_end_token_id': 253}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        family: prefix of transformers' classes.
        changes: of the common configuration; of the text model's, where there is a vision model too.
        vision: configuration of the vision model; empty: there is none.
        head: suffix of transformers' model class; config: of its configuration's.
        cached: layers that keep K and V.
        finish: changes what transformers saved: (config, weights) in place.
        needs: modules without which LMDeploy does not run it on a GPU.
        loads_on_cpu: LMDeploy's loader works without CUDA.
        longest: tokens up to which LMDeploy's decoding sees what its prefill sees, see ``engines.measure``; None: any.
    """
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    head: str = 'ForCausalLM'
    config: str = 'Config'
    cached: int = 2
    finish: Callable[[dict, dict], None] | None = None
    needs: tuple[str, ...] = ()
    loads_on_cpu: bool = True
    longest: int | None = None

    @property
    def windowed(self) -> bool:
        """Whether layers of it have a sliding window."""
        return self.changes.get('sliding_window') is not None

    @property
    def text(self) -> dict[str, Any]:
        """The text model's configuration."""
        return {**_COMMON, **self.changes}


def _internlm2(config: dict, weights: dict) -> None:
    """A Llama under InternLM2's names: per KV head its queries, then K, then V, in one matrix (``wqkv``)."""
    config |= {'architectures': ['InternLM2ForCausalLM'], 'model_type': 'internlm2', 'bias': False}
    heads, dim = config['num_key_value_heads'], config.pop('head_dim')
    names = {'model.embed_tokens': 'model.tok_embeddings', 'lm_head': 'output', 'self_attn.o_proj': 'attention.wo',
             'mlp.gate_proj': 'feed_forward.w1', 'mlp.up_proj': 'feed_forward.w3', 'mlp.down_proj': 'feed_forward.w2',
             'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'ffn_norm'}
    for layer in range(config['num_hidden_layers']):
        own = f'model.layers.{layer}'
        q, k, v = (weights.pop(f'{own}.self_attn.{x}_proj.weight').unflatten(0, (heads, -1, dim)) for x in 'qkv')
        weights[f'{own}.attention.wqkv.weight'] = torch.cat([q, k, v], 1).flatten(0, 2)
    for name in list(weights):
        new = name
        for old, other in names.items():
            new = new.replace(old, other)
        weights[new] = weights.pop(name)


ARCHITECTURES: dict[str, Architecture] = {
    'llama': Architecture('Llama'),
    'mistral': Architecture('Mistral', {'sliding_window': WINDOW}),
    'mixtral': Architecture('Mixtral', {'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': None,
                                        'hidden_size': 512}),  # LMDeploy takes hidden_size / heads for head_dim
    'qwen2': Architecture('Qwen2', {'num_attention_heads': 14, 'head_dim': 64, 'hidden_size': 14 * 64}),
    'qwen3': Architecture('Qwen3'),
    'qwen3_moe': Architecture('Qwen3Moe', _MOE),
    'gemma2': Architecture('Gemma2', {'head_dim': 256, 'num_hidden_layers': 4, 'sliding_window': WINDOW,
                                      'query_pre_attn_scalar': 256, 'tie_word_embeddings': True}, cached=4,
                           longest=WINDOW),
    'gemma3': Architecture('Gemma3', {'head_dim': 256, 'num_hidden_layers': 6, 'sliding_window': WINDOW,
                                      'query_pre_attn_scalar': 256, 'tie_word_embeddings': True, 'rope_parameters': {
                                          'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
                                          'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}}},
                           cached=6, config='TextConfig', longest=WINDOW),
    'gpt_oss': Architecture('GptOss', {'head_dim': 64, 'num_attention_heads': 8, 'num_hidden_layers': 4,
                                       'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': WINDOW},
                            cached=4, loads_on_cpu=False),
    'phi3': Architecture('Phi3', {'num_attention_heads': 4, 'head_dim': 96, 'hidden_size': 384, 'sliding_window': None,
                                  'original_max_position_embeddings': 8192}),
    'internlm2': Architecture('Llama', {'head_dim': HIDDEN // 4}, finish=_internlm2),
    'qwen3_next': Architecture('Qwen3Next', {**_LINEAR, **_MOE, 'shared_expert_intermediate_size': 64}, cached=1,
                               needs=('fla', 'tilelang')),
    'qwen3_5': Architecture('Qwen3_5', {**_LINEAR, 'attn_output_gate': True, 'rope_parameters': {
        'rope_type': 'default', 'rope_theta': 1e6, 'partial_rotary_factor': 0.25, 'mrope_section': [11, 11, 10],
        'mrope_interleaved': True}}, cached=1, head='ForConditionalGeneration', needs=('fla', 'tilelang'),
                            vision={**_VISION, 'hidden_size': 64, 'intermediate_size': 64, 'out_hidden_size': HIDDEN,
                                    'num_position_embeddings': 16}),
    'qwen2_vl': Architecture('Qwen2VL', {'num_attention_heads': 14, 'head_dim': 64, 'hidden_size': 14 * 64,
                                         'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6,
                                                             'mrope_section': [8, 12, 12]}},
                             head='ForConditionalGeneration',
                             vision={**_VISION, 'embed_dim': 64, 'hidden_size': 14 * 64, 'mlp_ratio': 1}),
}


def build(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """transformers' model of an architecture, with weights, fp32 on the CPU.

    Args:
        changes: of its text model's configuration.
    """
    import transformers
    arch = ARCHITECTURES[name]
    text = {**arch.text, **changes}
    config = getattr(transformers, arch.family + arch.config)(
        **{**_TOKENS, 'text_config': text, 'vision_config': arch.vision, 'tie_word_embeddings': False}
        if arch.vision else text)
    torch.manual_seed(seed)
    model = getattr(transformers, arch.family + arch.head)(config).float().eval()
    _without_fla(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _draw(model, parameter_name, parameter)
    return model


def _draw(model: torch.nn.Module, name: str, parameter: torch.Tensor) -> None:
    """Random weights by the parameter's part in the model; linear attention and the vision model keep theirs."""
    family = type(model).__name__
    shifted = family.startswith(('Gemma', 'Qwen3Next', 'Qwen3_5'))  # norms multiply with 1 + weight
    part = name.removesuffix('.weight').removesuffix('.bias').rpartition('.')[2]
    fan_in = parameter.shape[-1]
    if 'visual' in name or 'vision' in name or 'linear_attn' in name:
        return
    if part in ('q_norm', 'k_norm'):
        parameter.fill_(SCORE - shifted)
    elif part in ('q_proj', 'k_proj', 'qkv_proj') and name.endswith('.weight'):
        parameter.normal_(0, SCORE / fan_in**.5)
    elif name.endswith('.bias') or part in ('sinks', ) or 'bias' in part:
        parameter.normal_(0, 0.3)
    elif part in ('post_attention_layernorm', 'post_feedforward_layernorm') and family.startswith('Gemma'):
        parameter.fill_(2.0)  # else what layers add is lost behind the embedding, which tied heads predict again
    elif part == 'norm' and family.startswith('Gemma'):
        parameter.fill_(1.0)  # 1 + 1: their heads are the embeddings, which are small
    elif part == 'embed_tokens':
        parameter.normal_()  # every row as long as the others: a draft model (drafts.py) goes without the first norm
        parameter.mul_((1 if family.startswith('Gemma') else fan_in**.5) / parameter.norm(dim=1, keepdim=True))
    elif part == 'lm_head':
        parameter.normal_(0, 2 / fan_in**.5)
    elif parameter.dim() > 1:
        if family.startswith('GptOss') and 'experts' in name:
            fan_in = parameter.shape[-2]  # stored the other way around
        parameter.normal_(0, (1.5 if part in ('v_proj', 'o_proj') else 0.8) / fan_in**.5)


def write(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> None:
    """Write an architecture's config.json and model.safetensors, and a tokenizer, which LMDeploy's model agent loads.

    Args:
        dtype: of the weights; LMDeploy asks the GPU about bf16, so fp16 without one.
        changes: of its text model's configuration.
    """
    from safetensors.torch import load_file, save_file
    model = build(name, seed, **changes).to(dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    finish = ARCHITECTURES[name].finish
    if finish is not None:
        config = json.loads((folder / 'config.json').read_text())
        weights = load_file(folder / 'model.safetensors')
        finish(config, weights)
        (folder / 'config.json').write_text(json.dumps(config))
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / 'model.safetensors',
                  metadata={'format': 'pt'})


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, as many as the vocabulary has."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: token for token, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0], bos_token=letters[1],
                            eos_token=letters[2]).save_pretrained(folder)


def prompts(count: int, length: int, seed: int = 0, step: int = 0) -> list[list[int]]:
    """Random tokens: ``count`` prompts of ``length`` tokens, each ``step`` longer than the one before."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length + i * step, ), generator=generator).tolist() for i in range(count)]


def _without_fla(model: torch.nn.Module) -> None:
    """transformers takes flash-linear-attention's kernels wherever they are installed, also for tensors on the CPU."""
    module = importlib.import_module(type(model).__module__)
    for name in ('torch_chunk_gated_delta_rule', 'torch_recurrent_gated_delta_rule'):
        if hasattr(module, name):
            setattr(module, name, inspect.unwrap(getattr(module, name)))


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, ids: list[int], cache: Any = None) -> torch.Tensor:
    """transformers' predictions: fp32 [tokens, vocabulary]."""
    return model(torch.tensor([ids]), past_key_values=cache).logits[0].float().log_softmax(-1)


def quantized_cache(model: torch.nn.Module, fmt: str) -> Any:
    """A cache of transformers whose layers with K and V store them in a format; the others keep their state."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from lmdeploy_kvq import get_format
    from lmdeploy_kvq.hf_cache import QuantizedLayer
    cache, one = DynamicCache(config=model.config.get_text_config()), torch.ones(())
    cache.layers = [QuantizedLayer(get_format(fmt), one, one) if isinstance(layer, DynamicLayer) else layer
                    for layer in cache.layers]
    return cache


@torch.inference_mode()
def forget(model: torch.nn.Module, ids: list[int], which: str, new: int = 8) -> float:
    """How far the predictions of the last ``new`` tokens move when what they read from the cache is ruined.

    Args:
        which: 'values' are zeroed, or 'keys' of different tokens are exchanged.

    Returns:
        Mean KL divergence in nats.
    """
    from transformers import DynamicCache
    found = []
    for ruin in (False, True):
        cache = DynamicCache(config=model.config.get_text_config())
        model(torch.tensor([ids[:-new]]), past_key_values=cache)
        for layer in cache.layers if ruin else ():
            if which == 'values' and hasattr(layer, 'values'):
                layer.values.zero_()
            elif hasattr(layer, 'keys'):
                layer.keys.copy_(layer.keys.flip(2).clone())
        found.append(model(torch.tensor([ids[-new:]]), past_key_values=cache).logits[0].float().log_softmax(-1))
    p, q = found
    return float((p.exp() * (p - q)).sum(-1).mean())
