#!/usr/bin/env python3
"""What holds the decode and fill kernels, by the GPU's own counters: Nsight Compute (ncu) on one launch per row.

  scripts/profile_kernels.py                                         rows that miss their targets, and one that meets it
  scripts/profile_kernels.py --rows fp8_per_token_head:32x8x128:64x4096,int8_per_token_head:8x128:decode:256

A row is FORMAT:SHAPE:LOAD, as bench_decode.py names them (FORMAT:SHAPE:LOAD:qN for N query tokens per sequence), or as
bench_fill.py does. Prints and writes profile.json: time, bytes that came from memory, sectors that were written, share
of memory's peak bandwidth, issue slots in use, and for what a warp waited, in cycles per instruction it issued. Times
are longer than those of the benchmarks, for ncu empties the caches and launches the kernel alone. Clocks are left
alone. Needs ncu on the PATH, and leave to read counters.
"""
from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

from benchlib import print_table, write_results

ROWS = ('fp8_per_token_head:32x8x128:64x4096', 'fp8_per_token_head:28x4x128:16x8192',
        'fp8_per_token_head:16x2x128:16x8192', 'int8_per_token_head:32x8x128:1x4096',
        'int8_per_token_head:32x8x128:1x512', 'int4_per_token_head:32x8x128:64x4096',
        'fp8_per_token_head:28x4x128:64x4096:q4', 'fp8_per_token_head:8x128:decode:64',
        'fp8_per_token_head:8x128:decode:256', 'int8_per_token_head:8x128:decode:256',
        'int8_per_token_head:4x256:decode:256', 'int8_per_token_head:2x128:prefill:8192')
WARM = 2  # launches before the one that is measured
STALLS = ('long_scoreboard', 'barrier', 'short_scoreboard', 'mio_throttle', 'math_pipe_throttle', 'wait', 'membar')
METRICS = {
    'us': 'gpu__time_duration.sum', 'bytes_read': 'dram__bytes_read.sum',
    'sectors_written': 'lts__t_sectors_op_write.sum',
    'memory_percent': 'dram__throughput.avg.pct_of_peak_sustained_elapsed',
    'issue_percent': 'smsp__issue_active.avg.pct_of_peak_sustained_active',
    'warps_percent': 'sm__warps_active.avg.pct_of_peak_sustained_active',
    'instructions': 'smsp__inst_executed.sum', 'registers': 'launch__registers_per_thread',
    **{f'stall_{name}': f'smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio' for name in STALLS}}
UNITS = {'nsecond': 1e-3, 'ns': 1e-3, 'usecond': 1.0, 'us': 1.0, 'msecond': 1e3, 'ms': 1e3, 'second': 1e6, 's': 1e6,
         'byte': 1, 'Kbyte': 1e3, 'Mbyte': 1e6, 'Gbyte': 1e9}


def launch(row: str, page: int) -> None:
    """Run the kernel a few times in this process."""
    import torch
    name, shape, spec = row.split(':', 2)
    if is_fill(row):
        from bench_fill import Ours as Filling
        heads, dim = map(int, shape.split('x'))
        filling = Filling(name, spec, page, heads, dim)
        for i in range(WARM + 1):
            filling(i)
    else:
        from bench_decode import Load, Ours, make_query
        heads, kv_heads, dim = map(int, shape.split('x'))
        spec, _, query = spec.partition(':q')
        load = Load.build(spec, page, 2 * kv_heads * dim)
        ours = Ours(name, load, page, kv_heads, dim, {})
        for i in range(WARM + 1):
            ours(make_query(load, heads, dim, int(query or 1)), load.tables[i % len(load.tables)], load.lens,
                 int(query or 1))
    torch.cuda.synchronize()


def is_fill(row: str) -> bool:
    """Whether a row is of the fill kernel: its shape has no query heads."""
    return row.split(':')[1].count('x') == 1


def parse(text: str) -> dict[str, float]:
    """Figures of the one kernel in what ``ncu --csv --page raw`` printed, in the units of METRICS' names.

    Raises:
        ValueError: there is no such table in it.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError('ncu printed no table:\n' + '\n'.join(lines[-15:]))
    names, units, values = list(csv.reader(io.StringIO('\n'.join(lines[first:first + 3]))))
    found = {name: (unit, value) for name, unit, value in zip(names, units, values)}
    return {short: float(found[metric][1].replace(',', '')) * UNITS.get(found[metric][0], 1)
            for short, metric in METRICS.items() if metric in found and found[metric][1] not in ('', 'n/a')}


def profile(row: str, page: int) -> dict:
    """One row's figures, or what went wrong as ``error``."""
    kernel = '_fill_kernel' if is_fill(row) else '_decode_kernel'
    command = ['ncu', '--csv', '--page', 'raw', '--clock-control', 'none', '--kernel-name', f'regex:{kernel}',
               '--launch-skip', str(WARM), '--launch-count', '1', '--metrics', ','.join(METRICS.values()),
               sys.executable, __file__, '--launch', row, '--page', str(page)]
    done = subprocess.run(command, text=True, capture_output=True)
    name, shape, load = row.split(':', 2)
    columns = {'format': name, 'shape': shape, 'load': load, 'page': page}
    try:
        return {**columns, **parse(done.stdout)}
    except ValueError as error:
        return {**columns, 'error': f'{error}\n{done.stderr[-500:]}'}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default=','.join(ROWS))
    parser.add_argument('--page', type=int, default=64)
    parser.add_argument('--launch', metavar='ROW', help='only launch the kernel: what ncu runs')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.launch:
        launch(args.launch, args.page)
        return 0
    if shutil.which('ncu') is None:
        print('ncu (Nsight Compute) is not on the PATH', file=sys.stderr)
        return 1
    rows = [profile(row, args.page) for row in args.rows.split(',')]
    print_table([row for row in rows if 'error' not in row], ['format', 'shape', 'load', *METRICS])
    failed = [f'{row["format"]} {row["shape"]} {row["load"]}: {row["error"]}' for row in rows if 'error' in row]
    print(*failed, write_results('profile', rows, args.out), sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
