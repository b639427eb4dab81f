#!/usr/bin/env python3
"""Tensor parallelism: tp=2 through Ray and through mp against tp=1, on a random-weight Llama; writes tp.json.

SmolLM2's three KV heads do not split by two, so a small Llama with its tokenizer is written first. Tokens are greedy;
log-probabilities of built-in passages are compared too (prefill reads the cache), because random weights make close
calls: bf16 is a row, as the floor.
"""
from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import PROMPTS, passages, probe

WAYS = {'tp=1': {}, 'tp=2 ray': {'tp': 2}, 'tp=2 mp': {'tp': 2, 'distributed_executor_backend': 'mp'}}


def write_llama(folder: str, tokenizer_from: str, layers: int = 4, seed: int = 0, decisive: bool = True) -> None:
    """A random Llama (16 query and 8 KV heads of 128) in bf16, with another model's tokenizer.

    Decisive: its greedy tokens do not depend on rounding, and hardly on attention.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
                         initializer_range=0.02, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(config)
    if decisive:
        # Random weights alone decide between near ties, which any change of summation order flips. The head answers
        # each token with another fixed one, far enough ahead that rounding does not matter.
        model.model.embed_tokens.weight.data.mul_(15)
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data[torch.randperm(len(tokenizer))])
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    import torch
    import transformers
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--tokenizer', default='~/models/smollm2')
    parser.add_argument('--policies', default='none,fp8_per_token_head,int8_per_token_head,fp8')
    parser.add_argument('--keep', default=os.path.expanduser('~/models/random-llama'),
                        help='where the Llama is written')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    tokenizer_from = os.path.expanduser(args.tokenizer)
    if not os.path.exists(f'{args.keep}/config.json'):
        write_llama(args.keep, tokenizer_from)
    texts = [ids for _, ids in passages(transformers.AutoTokenizer.from_pretrained(tokenizer_from), 256)][:8]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for policy in args.policies.split(','):

            def run(way: str, policy: str = policy) -> dict:
                return probe({'model': args.keep, 'quant_policy': policy, 'prompts': PROMPTS, 'new_tokens': 16,
                              'passages': texts, 'out': f'{folder}/{way}.pt',
                              'engine': {'num_gpu_blocks': 300, 'session_len': 2048, 'max_batch_size': 8,
                                         **WAYS[way]}}, {'LMDEPLOY_KVQ_PREFILL': 'cache'})

            with ThreadPoolExecutor(len(WAYS)) as pool:
                results = dict(zip(WAYS, pool.map(run, WAYS)))
            base = torch.cat(torch.load(f'{folder}/tp=1.pt')).float().log_softmax(-1)
            for way, result in results.items():
                scores = torch.cat(torch.load(f'{folder}/{way}.pt')).float().log_softmax(-1)
                tokens = [r['rounds'][0]['tokens'] for r in (result, results['tp=1'])]
                rows.append({'policy': policy, 'way': way, 'equal_sequences': sum(a == b for a, b in zip(*tokens)),
                             'sequences': len(PROMPTS), 'distinct_tokens': len({t for s in tokens[0] for t in s}),
                             'mean_kl': float((base.exp() * (base - scores)).sum(-1).mean()),
                             'start_seconds': result['start_seconds']})
    print_table(rows, list(rows[0]))
    print(write_results('tp', rows, args.out))


if __name__ == '__main__':
    main()
