#!/usr/bin/env python3
"""Sweep the fill kernel's rows per program and warps on this GPU and print the best per shape, load and format.

  scripts/tune_fill.py --shapes 8x128,4x256 --loads decode:64,decode:256 --tiles 4x1,8x2,16x4

Shapes, loads and what is timed are bench_fill.py's. The row without a tile given is what the rule of
``lmdeploy_kvq.kernels.fill`` chooses. Writes fill_sweep.json; a tile that writes other pages than the rule's is an
error.
"""
from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from bench_fill import LAUNCHES, Ours, copy_bandwidth, make_data
from benchlib import graph_us, print_table, write_results

import lmdeploy_kvq as kvq

KERNEL = importlib.import_module('lmdeploy_kvq.kernels.fill')

Tile = tuple[int, int]


@contextmanager
def launched_with(tile: Tile | None) -> Iterator[list[Tile]]:
    """Fill with this tile (rows per program, warps), or with the rule's; yields the tiles that were used."""
    rule, used = KERNEL._tile, []

    def choose(*args: object) -> Tile:
        used.append(tile or rule(*args))
        return used[-1]

    with patch.object(KERNEL, '_tile', choose):
        yield used


def same_pages(ours: Ours, tile: Tile) -> bool:
    """Whether a tile writes the pages that the rule's tile writes, from the same rows."""
    data, first, second = ours.data[0], *ours.caches[:2]
    for cache, chosen in ((first, None), (second, tile)):
        for tensor in cache.tensors():
            if tensor is not None:
                tensor.zero_()
        with launched_with(chosen):
            KERNEL.fill(data[0], data[1], cache, ours.layout, ours.inputs[0])
    return all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors()) if a is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='8x128,2x128,8x64,4x256', help='KV heads x head size')
    parser.add_argument('--loads', default='decode:64,decode:256')
    parser.add_argument('--page', type=int, default=64)
    parser.add_argument('--formats', default=','.join(fmt.name for fmt in kvq.FORMATS))
    parser.add_argument('--tiles', default='1x1,4x1,8x1,8x2,16x4,32x4', help='rows per program x warps')
    parser.add_argument('--without-queries', action='store_true', help='K and V alone, as prompts are written')
    parser.add_argument('--out', type=Path, help='folder of the result file')
    args = parser.parse_args()
    tiles = [tuple(map(int, tile.split('x'))) for tile in args.tiles.split(',')]
    bandwidth, rows = copy_bandwidth(), []
    for shape, load in itertools.product(args.shapes.split(','), args.loads.split(',')):
        heads, dim = map(int, shape.split('x'))
        data = make_data(int(load.split(':')[1]), heads, dim)
        for name in args.formats.split(','):
            ours = Ours(name, load, args.page, heads, dim, data, queries=not args.without_queries)
            found = []
            for tile in (None, *tiles):
                try:
                    same = tile is None or same_pages(ours, tile)
                    with launched_with(tile) as used:
                        us = graph_us(ours, LAUNCHES)
                except Exception as error:  # a tile that this format or GPU cannot have; the others can
                    print(shape, load, name, tile, type(error).__name__, str(error)[:100])
                    continue
                found.append({'shape': shape, 'load': load, 'page': args.page, 'format': name,
                              'tokens_per_program': used[0][0], 'warps': used[0][1], 'rule': tile is None,
                              'queries': not args.without_queries, 'us': us,
                              'copy_fraction': (data[0].numel() * 2 + ours.written) / bandwidth / us,
                              'same_pages': same})
            rows += sorted(found, key=lambda row: row['us'])
            del ours
            torch.cuda.empty_cache()
    print_table(rows, list(rows[0]))
    print(write_results('fill_sweep', rows, args.out))
    if not all(row['same_pages'] for row in rows):
        sys.exit('some tiles write other pages: see same_pages')


if __name__ == '__main__':
    main()
