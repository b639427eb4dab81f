#!/usr/bin/env python3
"""How many blocks LMDeploy allocates per format, of the memory it found free, and what graphs' block tables take.

  scripts/memory_check.py [--share 0.03] [--jobs N] [--out FOLDER]

An engine per format, with a Llama of 8 KV heads of 128. What the executor divided is read from it: the bytes it had for
the cache, and those of a block. Checked: the blocks take at least 99 % of those bytes and no more; the pools that were
allocated are that large; a block is what capacity.py says; per byte, the formats hold at least as many tokens as issue
5 asks for; and the tables of all graphs stay within their bound. Writes memory.json; exit code 1 otherwise. One GPU,
about a minute.
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

from lmdeploy_kvq import FORMATS
from lmdeploy_kvq.capacity import TABLE_BYTES, CacheShape, block_bytes

LEAST = {'int8_per_token_head': 1.93, 'k8v4_per_token_head': 2.55, 'int4_per_token_head': 3.7,
         'k4v2_per_token_head': 4.9, 'int2_per_token_head': 7.0}
LAYERS, KV_HEADS, DIM, BLOCK = 2, 8, 128, 64
TOLERANCE = 0.01


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    failed = []
    for row in rows:
        used = row['num_gpu_blocks'] * row['block_bytes'] / row['budget']
        expected = block_bytes(None if row['format'] == 'none' else row['format'],
                               CacheShape(LAYERS, KV_HEADS, DIM, block_size=BLOCK))
        least = LEAST.get(row['format'], 0)
        failed += [f'{row["format"]}: {text}' for text, bad in (
            (f'{used:.4f} of the bytes are used', not 1 - TOLERANCE < used <= 1),
            (f'a block is {row["block_bytes"]} bytes, capacity.py says {expected}', row['block_bytes'] != expected),
            (f'{row["pool_bytes"]} bytes are allocated for {row["num_gpu_blocks"]} blocks',
             row['pool_bytes'] != row['num_gpu_blocks'] * row['block_bytes']),
            (f'{row["against_bf16"]:.3f} x the tokens of bf16, at least {least} are asked for',
             row['against_bf16'] < least),
            ('no graphs, so no tables to measure', not row['graphs']),
            (f'block tables of {row["table_bytes"]} bytes', row['format'] != 'none'
             and row['table_bytes'] > TABLE_BYTES)) if bad]
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--share', type=float, default=0.03, help='of the free memory, for each (default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=10)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(work, 'model')
        smollm2 = chosen_model()
        write_sharp(folder, smollm2, layers=LAYERS, heads=KV_HEADS, kv_heads=KV_HEADS, head_dim=DIM)

        def run(policy: str) -> dict:
            # one graph of many sequences: its table is the larger part of all the default graphs' together
            return probe({'model': str(folder), 'quant_policy': policy, 'scenario': 'memory',
                          'engine': {'cache_max_entry_count': args.share, 'max_batch_size': 1024, 'session_len': 8192,
                                     'cudagraph_capture_batch_sizes': [1024], 'block_size': BLOCK}}, ENV, 200, PROGRAM)

        names = ['none', *(fmt.name for fmt in FORMATS)]
        found = dict(zip(names, pool.map(run, names)))
    rows = []
    for name, done in found.items():
        row = {'format': name, **{key: done[key] for key in ('num_gpu_blocks', 'pool_bytes', 'table_bytes', 'graphs')},
               'budget': min(done['budgets']), 'block_bytes': done['block_bytes'][0]}
        row['per_byte'] = row['num_gpu_blocks'] * BLOCK / row['budget']
        rows.append(row)
    for row in rows:
        row['against_bf16'] = row['per_byte'] / rows[0]['per_byte']
    failed = verdicts(rows)
    print_table(rows, ['format', 'budget', 'block_bytes', 'num_gpu_blocks', 'against_bf16', 'pool_bytes',
                       'table_bytes'])
    print(write_results('memory', rows, args.out, share=args.share, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
