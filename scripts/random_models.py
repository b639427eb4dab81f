"""Small models with random weights whose answers depend on what they attend to, written in a second.

With the usual initialization every score is near zero: attention averages over all tokens, and a wrong page would
hardly show. Here scores have a standard deviation of ``sharpness``, so that a query finds a few keys among thousands,
and what it finds decides the next token.
"""
from __future__ import annotations

import math
from pathlib import Path

import torch


def write_sharp(folder: Path, tokenizer_from: Path | str, kind: str = 'llama', vocabulary: int | None = 2048,
                layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, positions: int = 32_768,
                sharpness: float = 3.0, seed: int = 0) -> None:
    """Write a model with another one's tokenizer.

    Args:
        kind: ``llama``, or ``qwen3`` (queries and keys are normalized; LMDeploy 0.18 captures its prefill).
        vocabulary: tokens; fewer than the tokenizer's where requests are token ids, None for as many.
        sharpness: standard deviation of the scores of the first layer.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    hidden, tokenizer = heads * head_dim, AutoTokenizer.from_pretrained(tokenizer_from)
    make_config, make_model = {'llama': (LlamaConfig, LlamaForCausalLM), 'qwen3': (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(seed)
    config = make_config(vocab_size=vocabulary or len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=head_dim, max_position_embeddings=positions, rope_theta=5e6,
                         tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id)
    model = make_model(config)
    spread = {'q_proj': sharpness / hidden, 'k_proj': sharpness / hidden, 'v_proj': 1 / hidden, 'o_proj': 1 / hidden,
              'gate_proj': 1 / hidden, 'up_proj': 1 / hidden, 'down_proj': 0.1 / hidden, 'lm_head': 9 / hidden,
              'embed_tokens': 0.25}  # variances; rows behind a norm have mean square 1
    for name, parameter in model.named_parameters():
        part = name.split('.')[-2]
        if part in spread:
            parameter.data.normal_(0, math.sqrt(spread[part]))
        elif part in ('q_norm', 'k_norm'):
            parameter.data.fill_(math.sqrt(sharpness))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def spread_heads(folder: Path, kv_heads: int, head_dim: int) -> None:
    """Give every KV head of a saved Llama a magnitude of its own, in place; scores and outputs stay as they are.

    Powers of two, exact in bf16, from 2^-8 to 2^6, taken back in queries and in the output projection.
    """
    from safetensors.torch import load_file, save_file
    steps = torch.linspace(-8, 6, kv_heads).round() if kv_heads > 1 else torch.tensor([6.0])
    factor = torch.exp2(steps).repeat_interleave(head_dim)
    path = folder / 'model.safetensors'
    weights = load_file(path)
    for name, weight in weights.items():
        if 'k_proj' in name or 'v_proj' in name:
            weights[name] = (weight.float() * factor[:, None]).to(weight.dtype)
        elif 'q_proj' in name or 'o_proj' in name:
            group = (weight.size(0) if 'q_proj' in name else weight.size(1)) // len(factor)
            wide = factor.view(kv_heads, 1, head_dim).expand(-1, group, -1).reshape(-1)
            weights[name] = (weight.float() / (wide[:, None] if 'q_proj' in name else wide)).to(weight.dtype)
    save_file(weights, path, metadata={'format': 'pt'})


def reverse_heads(source: Path, target: Path) -> None:
    """The same scale file with the heads' scales, or transforms, in the opposite order."""
    from lmdeploy_kvq.scales import read_file, write_file
    file = read_file(source)
    scales = {n: tuple(x.flip(0) for x in layer.resolved('')[:2]) for n, layer in file.layers.items()}
    transforms = {n: {'k_transform': matrix.flip(0)} for n, matrix in file.transforms.items()}
    write_file(target, scales, {}, transforms or None)
