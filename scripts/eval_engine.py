#!/usr/bin/env python3
"""Accuracy of every cache format through the real engine, against the bf16 cache; writes accuracy_engine.json.

`lmdeploy-kvq eval` on all of the built-in texts, with LMDeploy's own policies beside ours (run by LMDeploy alone), one
row per text. A second bf16 run gives the floor: differences of bf16 to itself.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchlib import print_table, write_results

from lmdeploy_kvq import texts
from lmdeploy_kvq.evaluation.through_engine import probe

__all__ = ['PROMPTS', 'passages', 'probe']  # for the other scripts

PROMPTS = ['The capital of France is', 'Water boils when', 'def fibonacci(n):\n', 'The three primary colours are']
FIGURES = ('tokens', 'perplexity', 'mean_kl', 'p99_kl', 'top1_agreement')


def passages(tokenizer, length: int) -> list[tuple[str, list[int]]]:
    """(domain, token ids) pieces of the built-in texts, all of one length."""
    out = []
    for domain, text in texts.built_in().items():
        ids = tokenizer.encode(text)
        out += [(domain, ids[i:i + length]) for i in range(0, len(ids) - length + 1, length)]
    return out


def flat(row: dict) -> list[dict]:
    """A row of `lmdeploy-kvq eval` as one per text; the last one has what is not of one text."""
    name = f'{row["format"].removeprefix("lmdeploy:")} (LMDeploy)' if row['stock'] else row['format']
    common = {'policy': row['policy'], 'format': name, 'bytes_per_token': row['bytes_per_token']}
    if row['error'] is not None:
        return [{**common, 'error': row['error']}]
    rows = [{**common, 'domain': domain, **{key: figures[key] for key in FIGURES}}
            for domain, figures in row['domains'].items()]
    rows[-1] |= {key: value for key, value in row.items()
                 if key.startswith(('greedy', 'needle_', 'decode_against_prefill'))}
    return rows


def main() -> int:
    from lmdeploy_kvq.backends.policies import lmdeploy_policies
    from lmdeploy_kvq.eval import Settings, evaluate
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='~/models/smollm2')
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--jobs', type=int, default=5)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    formats = ('all', *(f'lmdeploy:{name}' for name in lmdeploy_policies()))
    found = evaluate(os.path.expanduser(args.model), Settings(
        formats=formats, tokens=1 << 20, length=args.length, new_tokens=48, engine='lmdeploy', jobs=args.jobs))
    rows = [line for row in found.rows for line in flat(row)]
    print_table(rows, ['format', 'policy', 'domain', *FIGURES, 'greedy_agreement', f'needle_{found.needle_measure}',
                       'decode_against_prefill_agreement', 'decode_against_prefill_worst_gap', 'error'])
    print(write_results('accuracy_engine', rows, args.out, model=args.model, settings=found.settings))
    return int(any(row['error'] is not None for row in found.rows))


if __name__ == '__main__':
    raise SystemExit(main())
