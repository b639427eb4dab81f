#!/usr/bin/env python3
"""Greedy text of every format through every way the engine runs it; writes engine_matrix.json.

Per policy: eager; CUDA graphs at batch 1, 7 and 64; prefix caching (the prompts twice); chunked prefill, compared with
the eager engine's tokens at batch 64. By default a prompt attends to its own tokens unquantized, so that history met in
chunks or in the prefix cache changes text a little; where prefill reads the cache (``cache``), it changes the last bits
only, as another batch does: how decode divides its work depends on the whole batch. ``equal_at_batch`` compares with
the eager engine at the same batch, whose sums have the same order. What has another order is judged by an eager engine
of the same format that reads answers in one prefill each: how far is a token from the one it finds likeliest, at most
(``worst_gap``), and how many are that one (``likeliest``); and of the eager engine's answers at batch 64 to the same
prompts (``plain_...``). bf16 is a row too.
"""
from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import probe
from features_check import judge

from lmdeploy_kvq import FORMATS

BATCHES = (1, 7, 64)
PREFIX, CHUNKED = {'enable_prefix_caching': True}, {'max_prefill_token_num': 256}
WAYS = {  # name: engine arguments, batches, what prefill reads
    'eager': ({'eager_mode': True}, BATCHES[::-1], 'raw'),
    'graph': ({}, BATCHES, 'raw'),
    'prefix': (PREFIX, (64, 64), 'raw'),
    'chunked': (CHUNKED, (64, ), 'raw'),
    'cache eager': ({'eager_mode': True}, BATCHES[::-1], 'cache'),
    'cache prefix': (PREFIX, (64, 64), 'cache'),
    'cache chunked': (CHUNKED, (64, ), 'cache'),
}
ENGINE = {'num_gpu_blocks': 1500, 'session_len': 2048, 'max_batch_size': 64}


def prompts(count: int = 64) -> list[str]:
    """Beginnings of the built-in passages, 20 to 500 words, no two alike."""
    words = files('lmdeploy_kvq').joinpath('data/prose.txt').read_text(encoding='utf-8').replace('---', '').split()
    return [' '.join(words[start:start + 20 + (start * 7) % 480])
            for start in range(0, 60 * count, 60)][:count]


def shared(a: list[list[int]], b: list[list[int]]) -> tuple[float, float]:
    """Share of equal sequences, and mean share of tokens before the first difference."""
    prefix = [sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(x, y))) / max(len(x), 1)
              for x, y in zip(a, b)]
    return sum(p == 1 for p in prefix) / len(prefix), sum(prefix) / len(prefix)


def run(model: str, jobs: int, new_tokens: int = 32) -> list[dict]:
    """One row per policy and way."""
    policies = {'none': 0, **{fmt.name: fmt.policy for fmt in FORMATS}}

    def one(item: tuple[str, str]) -> dict:
        engine, batches, prefill = WAYS[item[1]]
        return probe({'model': model, 'quant_policy': policies[item[0]], 'prompts': prompts(), 'new_tokens': new_tokens,
                      'batches': list(batches), 'engine': {**ENGINE, **engine}}, {'LMDEPLOY_KVQ_PREFILL': prefill})

    def said(name: str) -> dict[tuple[str, int], dict]:
        """What an engine that reads the cache says of all answers of those that do, by way and round."""
        rounds = {(way, number): done['tokens'] for way, (*_, prefill) in WAYS.items() if prefill == 'cache'
                  for number, done in enumerate(results[name, way]['rounds'])}
        ids = results[name, 'cache eager']['prompt_ids']
        found = judge(model, policies[name], {**ENGINE, 'eager_mode': True},
                      {key: list(zip(ids, tokens)) for key, tokens in rounds.items()}
                      | {size: list(zip(ids, rounds['cache eager', 0][:size])) for size in BATCHES[:-1]})
        found[BATCHES[-1]] = found['cache eager', 0]
        return {(way, number): {**found[way, number], **{f'plain_{key}': found[len(tokens)][key]
                                                        for key in ('worst_gap', 'likeliest')}}
                for (way, number), tokens in rounds.items()}

    # Neighbours have different policies: the first ones compile for the others, and not the same kernels at once.
    keys = [(name, way) for way, name in itertools.product(sorted(WAYS, key=lambda way: way != 'graph'), policies)]
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(keys, pool.map(one, keys)))
        scores = dict(zip(policies, pool.map(said, policies)))
    rows = []
    for name, way in itertools.product(policies, WAYS):
        result = results[name, way]
        plain = 'cache eager' if WAYS[way][2] == 'cache' else 'eager'
        base = {size: done['tokens'] for size, done in zip(WAYS[plain][1], results[name, plain]['rounds'])}
        for number, (size, done) in enumerate(zip(WAYS[way][1], result['rounds'])):
            equal, prefix = shared(done['tokens'], base[64][:size])
            rows.append({'policy': policies[name], 'format': name, 'way': way, 'round': number, 'batch': size,
                         'equal_sequences': equal, 'equal_prefix': prefix,
                         'equal_at_batch': shared(done['tokens'], base[size])[0],
                         'cached_tokens': sum(done['cached_tokens']),
                         'first_tokens': [t[:1] for t in done['tokens'][:3]],
                         **scores[name].get((way, number), {})})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='~/models/smollm2')
    parser.add_argument('--jobs', type=int, default=8)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    rows = run(args.model, args.jobs)
    print_table(rows, ['format', 'policy', 'way', 'round', 'batch', 'equal_sequences', 'equal_at_batch', 'equal_prefix',
                       'cached_tokens', 'worst_gap', 'likeliest', 'control'])
    print(write_results('engine_matrix', rows, args.out, model=args.model))


if __name__ == '__main__':
    main()
