#!/usr/bin/env python3
"""Where a decode program's time goes: the multiprocessor's clock, read between the stages of the kernel.

  scripts/decode_clocks.py [--shapes 32x8x128,...] [--loads 1x512,...] [--formats NAME,...] [--page 64] [--out FOLDER]

Runs a copy of the package whose decode kernel leaves a clock after each stage, one launch at a time, over pages
that are not in the caches. Of the programs that combine results (or, where nothing is divided, of all), the median per
launch, then over launches. Clocks cost time themselves: what a stage takes beside another counts, not the sum. Writes
decode_clocks.json, in cycles.
"""
from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = ('division', 'queries', 'tiles', 'sums', 'leaving', 'counting', 'combining', 'finishing')
SLOTS, LAUNCHES, FIRST = 16, 40, 5  # clocks of a program; launches, and how many of them do not count
PACKAGE = Path(__file__).resolve().parent.parent / 'lmdeploy_kvq'

STAMP = '''CLOCKS = [None]


@triton.jit
def _stamp(ptr, index: tl.constexpr, behind):
    """Leave the clock, once ``behind`` (int32) is known."""
    clock = tl.inline_asm_elementwise('mov.u64 $0, %clock64;', '=l,r', [behind], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(ptr + index, clock)


'''
BEFORE = (  # (what stands in kernels/decode.py once, what is put before it)
    ('@triton.jit\ndef _reduce_tree(', STAMP),
    ('        if arrived == children:\n', '        _stamp(clocks_ptr, 6, arrived)\n'),
    ('            if count > FAN:\n',
     '            _stamp(clocks_ptr, 7, tl.max(tl.max(acc, 0), 0).to(tl.int32, bitcast=True))\n'),
    ('    if PDL and WAIT == WAIT_FIRST:\n',
     f'    clocks_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * {SLOTS}\n'
     '    _stamp(clocks_ptr, 0, tl.program_id(0))\n'),
    ('    row = (tl.program_id(0) % ROW_TILES) * BLOCK_M', '    _stamp(clocks_ptr, 1, remaining)\n'),
    ('        for step in range(tile, stop):\n',
     '        _stamp(clocks_ptr, 2, tl.max(row_scale, 0).to(tl.int32, bitcast=True))\n'),
    ('        total_l = tl.sum(l, 0)\n', '        _stamp(clocks_ptr, 3, tl.max(m, 0).to(tl.int32, bitcast=True))\n'),
    ("        # Numbers of the sequence's first",
     '        _stamp(clocks_ptr, 4, tl.max(total_l, 0).to(tl.int32, bitcast=True))\n'),
    ('            pieces, some_m, some_l, some = _reduce_tree(', '            _stamp(clocks_ptr, 5, pieces)\n'),
    ('        remaining -= (stop', '            _stamp(clocks_ptr, 8, pieces)\n'),
)
INSTEAD = (  # (what stands there once, what takes its place)
    ('def _reduce_tree(ptr,', 'def _reduce_tree(clocks_ptr, ptr,'),
    ('some = _reduce_tree(\n', 'some = _reduce_tree(clocks_ptr,\n'),
    ('kv_lens_ptr, table_ptr, batch, target,', 'kv_lens_ptr, table_ptr, clocks_ptr, batch, target,'),
    ('alibi_slopes, kv_lens, block_table, batch,', 'alibi_slopes, kv_lens, block_table, CLOCKS[0], batch,'),
)


def with_clocks(source: str) -> str:
    """kernels/decode.py with a clock after every stage.

    Raises:
        ValueError: it is not the file that this script knows.
    """
    for anchor, new in [*((anchor, before + anchor) for anchor, before in BEFORE), *INSTEAD]:
        if source.count(anchor) != 1:
            raise ValueError(f'{anchor!r} is {source.count(anchor)} times in the kernel')
        source = source.replace(anchor, new)
    return source


def copy_package(folder: Path) -> None:
    """The package with clocks, as ``folder``/lmdeploy_kvq."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
    kernel = copy / 'kernels' / 'decode.py'
    kernel.write_text(with_clocks(kernel.read_text(encoding='utf-8')), encoding='utf-8')


def measure(shape: str, loads: list[str], formats: list[str], page: int) -> list[dict]:
    """A row per load and format; in a process that imports the copy."""
    import importlib

    import torch
    from bench_decode import KINDS, Load, make_query

    from lmdeploy_kvq import get_format
    kernel = importlib.import_module('lmdeploy_kvq.kernels.decode')
    clocks = kernel.CLOCKS[0] = torch.zeros(1 << 16, dtype=torch.int64, device='cuda')
    heads, kv_heads, dim = map(int, shape.split('x'))
    built, rows = Load.build_all(loads, page, 2 * kv_heads * dim), []
    for name in formats:
        ours = KINDS['kvq'](name, next(iter(built.values())), page, kv_heads, dim, {})
        for spec, load in built.items():
            query, found = make_query(load, heads, dim, 1), []
            for table in itertools.islice(itertools.cycle(load.tables), LAUNCHES):
                clocks.zero_()
                ours(query, table, load.lens, 1)
                ended = clocks.view(-1, SLOTS)
                ended = ended[ended[:, 8] > 0]
                combined = ended[ended[:, 7] > 0]
                ended = combined if len(combined) else ended
                found.append((ended[:, 1:9] - ended[:, :8]).double().median(0).values)
            cycles = torch.stack(found[FIRST:]).median(0).values.tolist()
            rows.append({'shape': shape, 'load': spec, 'page': page, 'policy': int(get_format(name).policy),
                         'contender': 'kvq', **dict(zip(STAGES, cycles))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='32x8x128,16x2x128')
    parser.add_argument('--loads', default='1x512,1x2048,ragged:4')
    parser.add_argument('--formats', default='fp8_per_token_head,int8_per_token_head,int4_per_token_head,'
                        'k4v2_per_token_head')
    parser.add_argument('--page', type=int, default=64)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        with tempfile.TemporaryDirectory() as folder:
            copy_package(Path(folder))
            path = os.pathsep.join(filter(None, (folder, os.environ.get('PYTHONPATH'))))
            sys.exit(subprocess.run([sys.executable, *sys.argv, '--inside'],
                                    env={**os.environ, 'PYTHONPATH': path}).returncode)
    from benchlib import print_table, write_results
    rows = [row for shape in args.shapes.split(',')
            for row in measure(shape, args.loads.split(','), args.formats.split(','), args.page)]
    print_table(rows, list(rows[0]))
    print(write_results('decode_clocks', rows, args.out))


if __name__ == '__main__':
    main()
