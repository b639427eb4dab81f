"""A Llama of Llama-3.1-8B's shape with random weights: the model of the engine benchmarks, written in seconds.

LMDeploy has no dummy weights for this: ``empty_init`` needs Ray and leaves an engine without a KV cache, asleep until
weights are pushed. So a checkpoint is written that its ordinary loader reads, at any tensor parallelism: a PyTorch
file, because that format keeps tensors which share storage. All layers are the same random layer, 2.5 GB on disk
instead of 16 GB; on the GPU every layer has weights of its own, as of any checkpoint.
"""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

import smollm2
import torch

LLAMA_8B = {'vocab_size': 128256, 'hidden_size': 4096, 'intermediate_size': 14336, 'num_attention_heads': 32,
            'num_key_value_heads': 8, 'head_dim': 128, 'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5,
            'rope_theta': 500000.0}


def find_or_write(layers: int = 32, folder: str | Path | None = None) -> Path:
    """The folder of the model, written unless it is there already (complete or not there at all).

    Args:
        layers: decoder layers. folder: default ~/models/random-llama-8b-LAYERS.

    LMDeploy wants a tokenizer: SmolLM2's. Benchmarks that pass token ids never use it.
    """
    folder = Path(folder or f'~/models/random-llama-8b-{layers}').expanduser()
    if (folder / 'config.json').exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        write(Path(unfinished, 'model'), layers, LLAMA_8B, smollm2.find_or_convert())
        os.replace(Path(unfinished, 'model'), folder)
    return folder


def write(folder: Path, layers: int, shape: dict, tokenizer_from: Path, seed: int = 0) -> None:
    """Write config, tokenizer and weights: N(0, 0.02) in bf16, norms 1, from the GPU's generator where there is one."""
    from transformers import AutoTokenizer, LlamaConfig
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    config = LlamaConfig(**shape, num_hidden_layers=layers, tie_word_embeddings=False, dtype='bfloat16',
                         architectures=['LlamaForCausalLM'], bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    torch.save(weights(config, layers, seed), folder / 'pytorch_model.bin')
    config.save_pretrained(folder)


def weights(config, layers: int, seed: int) -> dict[str, torch.Tensor]:
    """The state dict; every layer refers to the same tensors."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    layer = {'self_attn.q_proj': normal(queries, hidden), 'self_attn.k_proj': normal(keys, hidden),
             'self_attn.v_proj': normal(keys, hidden), 'self_attn.o_proj': normal(hidden, queries),
             'mlp.gate_proj': normal(inner, hidden), 'mlp.up_proj': normal(inner, hidden),
             'mlp.down_proj': normal(hidden, inner), 'input_layernorm': ones, 'post_attention_layernorm': ones}
    return {'model.embed_tokens.weight': normal(config.vocab_size, hidden), 'model.norm.weight': ones,
            'lm_head.weight': normal(config.vocab_size, hidden),
            **{f'model.layers.{i}.{name}.weight': tensor for i in range(layers) for name, tensor in layer.items()}}
