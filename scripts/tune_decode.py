#!/usr/bin/env python3
"""Sweep the decode kernel's launch parameters on this GPU and print the best per shape, load, page and format.

  scripts/tune_decode.py --loads 64x4096,1x8192 --block-n 64,128 --occupancy 2,3 --num-stages 2,3
  scripts/tune_decode.py --configs default,64:3:4:3:168,128:2:8:3:128

The first takes every combination, the second those listed, BLOCK_N:OCCUPANCY:WARPS:STAGES:REGISTERS:PROGRAMS (0, or
left out, for none) or "default", what serving takes. Other processes compile first. Writes decode_sweep.json.

Attention alone begins on an empty GPU. In an engine it follows the fill, so that a choice is to be confirmed with
--behind-fill, which times both.
"""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from bench_decode import CHECKED_TOKENS, KINDS, Kinds, Load, compile_all, make_query, measure
from bench_layer import LAYERS
from benchlib import print_table, read_us, write_results

from lmdeploy_kvq.kernels.workspace import DecodeConfig, Workspace

PARAMETERS = ('block_n', 'occupancy', 'num_warps', 'num_stages', 'maxnreg', 'programs')

Chosen = dict[str, int]  # of PARAMETERS, 0 for none; empty: what serving takes


def parse(text: str) -> Chosen:
    """One of ``--configs``."""
    return {} if text == 'default' else dict(zip(PARAMETERS, [*map(int, text.split(':')), 0, 0]))


def options(chosen: Chosen) -> dict[str, int | None]:
    """Of DecodeConfig."""
    return {name: value or None for name, value in chosen.items()}


def sweep(fmt: str, shape: str, page: int, loads: list[str], configs: list[Chosen],
          kinds: Kinds = KINDS) -> list[list[dict]]:
    """Of every load: a row per configuration, the fastest first."""
    heads, kv_heads, dim = map(int, shape.split('x'))
    built = Load.build_all(loads, page, 2 * kv_heads * dim)
    ours = kinds['kvq'](fmt, next(iter(built.values())), page, kv_heads, dim, {})
    tables = []
    for spec, load in built.items():
        read = read_us(int(ours.bytes_per_token * int(load.lens.sum())))
        query = make_query(load, heads, dim, 1)
        found = []
        for chosen in configs:
            ours.config = DecodeConfig(**options(chosen)) if chosen else None
            try:
                us = measure(ours, load, query, 1)
            except Exception as error:
                print(shape, spec, page, chosen, type(error).__name__, str(error)[:100])
                continue
            used = Workspace.allocate(query, ours.cache, len(load.lens), 1, ours.config).config
            checked = int(load.lens[:4].sum()) <= CHECKED_TOKENS
            found.append({'shape': shape, 'load': spec, 'page': page, 'format': fmt,
                          **{name: getattr(used, name) or 0 for name in PARAMETERS}, 'default': not chosen,
                          'behind_fill': kinds is LAYERS, 'us': us, 'read_fraction': read / us,
                          'error': ours.error(query, load.tables[0], load.lens, 1) if checked else None})
        tables.append(sorted(found, key=lambda row: row['us']))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='32x8x128')
    parser.add_argument('--loads', default='64x4096')
    parser.add_argument('--pages', default='64,128')
    parser.add_argument('--formats', default='fp8_per_token_head')
    parser.add_argument('--configs', help='in place of the next six')
    parser.add_argument('--block-n', default='64,128')
    parser.add_argument('--occupancy', default='2,3,4')
    parser.add_argument('--num-warps', default='4')
    parser.add_argument('--num-stages', default='2,3')
    parser.add_argument('--maxnreg', default='0', help='register limits, 0 for none')
    parser.add_argument('--programs', default='0', help='programs per KV head, 0 for as many as run at once')
    parser.add_argument('--behind-fill', action='store_true', help='time the fill and the attention behind it')
    parser.add_argument('--jobs', type=int, default=12, help='processes that compile first, 0: none')
    parser.add_argument('--out', type=Path, default=None, help='folder of the result file')
    parser.add_argument('--top', type=int, default=3)
    parser.add_argument('--all', action='store_true', help='print every measurement')
    args = parser.parse_args()
    if args.configs:
        configs = [parse(text) for text in args.configs.split(',')]
    else:
        values = itertools.product(*(map(int, getattr(args, name).split(',')) for name in PARAMETERS))
        configs = [dict(zip(PARAMETERS, chosen)) for chosen in values]
    loads, pools = args.loads.split(','), list(itertools.product(
        args.formats.split(','), args.shapes.split(','), map(int, args.pages.split(','))))
    kinds = LAYERS if args.behind_fill else KINDS
    if args.jobs:
        compiled = {tuple({**chosen, 'programs': 0}.items()): chosen for chosen in configs}.values()
        compile_all([(f'kvq:{fmt}', shape, page, [(load, 1) for load in loads], options(chosen), kinds)
                     for fmt, shape, page in pools for chosen in compiled], args.jobs)
    rows: list[dict] = []
    for pool in pools:
        for found in sweep(*pool, loads, configs, kinds):
            rows += found if args.all else found[:args.top]
        torch.cuda.empty_cache()
    print_table(rows, list(rows[0]))
    print(write_results('decode_sweep', rows, args.out))


if __name__ == '__main__':
    main()
