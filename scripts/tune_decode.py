#!/usr/bin/env python3
"""Sweep the decode kernel's launch parameters on this GPU and print the best per shape, load and page."""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from bench_decode import Load, Ours
from benchlib import graph_us, print_table, read_us, write_results

from lmdeploy_kvq.kernels.decode import DecodeConfig

PARAMETERS = ('block_n', 'occupancy', 'num_warps', 'num_stages', 'maxnreg')


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
    parser.add_argument('--out', type=Path, default=None, help='folder of the result file')
    parser.add_argument('--top', type=int, default=3)
    parser.add_argument('--all', action='store_true', help='print every measurement')
    args = parser.parse_args()
    rows = []
    for shape, spec, page, fmt in itertools.product(args.shapes.split(','), args.loads.split(','),
                                                    map(int, args.pages.split(',')), args.formats.split(',')):
        heads, kv_heads, dim = map(int, shape.split('x'))
        load = Load.build(spec, page, 2 * kv_heads * dim)
        ours = Ours(fmt, load, page, kv_heads, dim, {})
        read = read_us(int(ours.bytes_per_token * int(load.lens.sum())))
        query = torch.randn((len(load.lens), heads, dim), dtype=torch.bfloat16, device='cuda')
        found = []
        for values in itertools.product(*(map(int, getattr(args, name).split(',')) for name in PARAMETERS)):
            chosen = dict(zip(PARAMETERS, values))
            ours.config = DecodeConfig(**{**chosen, 'maxnreg': chosen['maxnreg'] or None})
            try:
                us = graph_us(lambda i: ours(query, load.tables[i % len(load.tables)], load.lens, 1), 8)
            except Exception as error:
                print(shape, spec, page, ours.config, type(error).__name__, str(error)[:100])
                continue
            found.append({'shape': shape, 'load': spec, 'page': page, 'format': fmt, **chosen, 'us': us,
                          'read_fraction': read / us, 'error': ours.error(query, load.tables[0], load.lens, 1)})
        found.sort(key=lambda row: row['us'])
        rows += found if args.all else found[:args.top]
        del ours
        torch.cuda.empty_cache()
    print_table(rows, list(rows[0]))
    print(write_results('decode_sweep', rows, args.out))


if __name__ == '__main__':
    main()
