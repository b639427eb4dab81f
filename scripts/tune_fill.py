#!/usr/bin/env python3
"""Sweep the fill kernel's launch parameters on this GPU and print the best per shape, load and format.

Timed as bench_fill.py does, what decode needs included. Writes fill_sweep.json.
"""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from bench_fill import COPIES, Ours
from benchlib import graph_us, print_table, write_results

from lmdeploy_kvq.kernels.fill import FillConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='8x128,2x128,8x64,4x256', help='KV heads x head size')
    parser.add_argument('--loads', default='decode:64,decode:256')
    parser.add_argument('--formats', default='fp8_per_token_head,int8_per_token_head,int4_per_token_head')
    parser.add_argument('--rows', default='1,2,4,8,16')
    parser.add_argument('--num-warps', default='1,2,4')
    parser.add_argument('--page', type=int, default=64)
    parser.add_argument('--out', type=Path, help='folder of the result file')
    parser.add_argument('--top', type=int, default=4, help='how many to keep of each, beside the default')
    args = parser.parse_args()
    rows: list[dict] = []
    for shape, load, name in itertools.product(*(text.split(',') for text in (args.shapes, args.loads, args.formats))):
        heads, dim = map(int, shape.split('x'))
        ours, found = Ours(name, load, args.page, heads, dim), []
        for config in (None, *(FillConfig(*values) for values in itertools.product(
                *(map(int, text.split(',')) for text in (args.rows, args.num_warps))))):
            ours.config = config
            try:
                us = graph_us(ours, COPIES)
            except Exception as error:  # a layout that does not compile is none of the best
                print(shape, load, name, config, type(error).__name__, str(error)[:100])
                continue
            found.append({'shape': shape, 'load': load, 'format': name, 'rows': config and config.rows,
                          'num_warps': config and config.num_warps, 'us': us})
        rows += found[:1] + sorted(found[1:], key=lambda row: row['us'])[:args.top]
    print_table(rows, list(rows[0]))
    print(write_results('fill_sweep', rows, args.out))


if __name__ == '__main__':
    main()
