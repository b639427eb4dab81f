"""Small models with random weights whose answers depend on what they attend to, written in a second.

With the usual initialization every score is near zero: attention averages over all tokens, and a wrong page would
hardly show. Here scores have a standard deviation of ``sharpness``, so that a query finds a few keys among thousands,
and what it finds decides the next token.
"""
from __future__ import annotations

import math
from pathlib import Path

import torch


def write_sharp(folder: Path, tokenizer_from: Path | str, kind: str = 'llama', vocabulary: int = 2048, layers: int = 2,
                heads: int = 4, kv_heads: int = 2, head_dim: int = 64, positions: int = 32_768, sharpness: float = 3.0,
                seed: int = 0) -> None:
    """Write a model and another one's tokenizer, which only has to be there: requests are token ids.

    Args:
        kind: ``llama``, or ``qwen3`` (queries and keys are normalized; LMDeploy 0.18 captures its prefill).
        sharpness: standard deviation of the scores of the first layer.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    hidden, tokenizer = heads * head_dim, AutoTokenizer.from_pretrained(tokenizer_from)
    make_config, make_model = {'llama': (LlamaConfig, LlamaForCausalLM), 'qwen3': (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(seed)
    config = make_config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
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
