#!/usr/bin/env python3
"""Device memory over 10,000 requests, per cache: what an engine holds after a tenth of them is what it holds at last.

  scripts/growth_check.py [--requests 10000] [--formats NAME,...] [--out FOLDER]

Requests of 1 to 512 tokens at random, 64 at once, of a small random model. What PyTorch has allocated may not grow by
more than a megabyte, what it keeps in reserve not by more than 64 MiB above what it grows by with LMDeploy's bf16 cache
(new shapes find other holes), and every block comes back. Writes growth.json; exit code 1 otherwise. One GPU, about a
minute and a half.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import probe
from features_check import ENV, PROGRAM
from random_models import write_sharp
from smollm2 import chosen_model

from lmdeploy_kvq import get_format

BATCH, LONGEST, NEW_TOKENS = 64, 512, 4
ALLOCATED, RESERVED = 1 << 20, 64 << 20


def row(policy: str, done: dict) -> dict:
    """How much more one engine holds at last than after a tenth of its requests, in bytes."""
    grown = {key: done[key][-1] - done[key][0] for key in ('allocated', 'reserved')}
    return {'format': policy, **grown, 'lost_blocks': done['free'][0] - done['free'][1], 'seconds': done['seconds']}


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be. The first row is bf16's."""
    most = {'allocated': ALLOCATED, 'reserved': RESERVED + max(rows[0]['reserved'], 0), 'lost_blocks': 0}
    return [f'{found["format"]}: {key} grew by {found[key]}, the limit is {limit}' for found in rows[1:]
            for key, limit in most.items() if found[key] > limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--requests', type=int, default=10_240)
    parser.add_argument('--formats', default='fp8_per_token_head,int4_per_token_head')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.requests % (10 * BATCH):
        parser.error(f'--requests {args.requests}: a multiple of {10 * BATCH}')
    policies = ['none', *(get_format(name).name for name in args.formats.split(','))]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(len(policies)) as pool:
        folder = Path(work, 'model')
        write_sharp(folder, chosen_model())

        def run(policy: str) -> dict:
            return probe({'model': str(folder), 'quant_policy': policy, 'scenario': 'many', 'requests': args.requests,
                          'batch': BATCH, 'longest': LONGEST, 'new_tokens': NEW_TOKENS,
                          'engine': {'num_gpu_blocks': 1000, 'session_len': 1024, 'max_batch_size': BATCH}}, ENV, 300,
                         PROGRAM)

        rows = [row(policy, done) for policy, done in zip(policies, pool.map(run, policies))]
    failed = verdicts(rows)
    print_table(rows, list(rows[0]))
    print(write_results('growth', rows, args.out, requests=args.requests, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
