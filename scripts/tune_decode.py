#!/usr/bin/env python3
"""Sweep the decode kernel's launch parameters on this GPU and print the best per shape, load and page."""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from bench_decode import CHECKED_TOKENS, Load, Ours, make_query, measure
from benchlib import print_table, read_us, write_results

from lmdeploy_kvq.kernels.workspace import DecodeConfig

PARAMETERS = ('block_n', 'occupancy', 'num_warps', 'num_stages', 'maxnreg', 'programs')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--shapes', default='32x8x128')
    parser.add_argument('--loads', default='64x4096')
    parser.add_argument('--pages', default='64,128')
    parser.add_argument('--formats', default='fp8_per_token_head')
    parser.add_argument('--block-n', default='64,128')
    parser.add_argument('--occupancy', default='2,3,4')
    parser.add_argument('--num-warps', default='4')
    parser.add_argument('--num-stages', default='2,3')
    parser.add_argument('--maxnreg', default='0', help='register limits, 0 for none')
    parser.add_argument('--programs', default='0', help='programs per KV head, 0 for as many as run at once')
    parser.add_argument('--out', type=Path, default=None, help='folder of the result file')
    parser.add_argument('--top', type=int, default=3)
    parser.add_argument('--all', action='store_true', help='print every measurement')
    args = parser.parse_args()
    rows: list[dict] = []
    for shape, page, fmt in itertools.product(args.shapes.split(','), map(int, args.pages.split(',')),
                                              args.formats.split(',')):
        heads, kv_heads, dim = map(int, shape.split('x'))
        loads = Load.build_all(args.loads.split(','), page, 2 * kv_heads * dim)
        ours = Ours(fmt, next(iter(loads.values())), page, kv_heads, dim, {})
        for spec, load in loads.items():
            read = read_us(int(ours.bytes_per_token * int(load.lens.sum())))
            query = make_query(load, heads, dim, 1)
            found = []
            for values in itertools.product(*(map(int, getattr(args, name).split(',')) for name in PARAMETERS)):
                chosen = dict(zip(PARAMETERS, values))
                ours.config = DecodeConfig(**{name: value or None for name, value in chosen.items()})
                try:
                    us = measure(ours, load, query, 1)
                except Exception as error:
                    print(shape, spec, page, ours.config, type(error).__name__, str(error)[:100])
                    continue
                checked = int(load.lens[:4].sum()) <= CHECKED_TOKENS
                found.append({'shape': shape, 'load': spec, 'page': page, 'format': fmt, **chosen, 'us': us,
                              'read_fraction': read / us,
                              'error': ours.error(query, load.tables[0], load.lens, 1) if checked else None})
            found.sort(key=lambda row: row['us'])
            rows += found if args.all else found[:args.top]
        del ours
        torch.cuda.empty_cache()
    print_table(rows, list(rows[0]))
    print(write_results('decode_sweep', rows, args.out))


if __name__ == '__main__':
    main()
