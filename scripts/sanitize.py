#!/usr/bin/env python3
"""Every kernel with every format under compute-sanitizer: memcheck, racecheck, initcheck and synccheck, on one GPU.

  scripts/sanitize.py [--tools memcheck,racecheck] [--formats fp8,int4_per_token_head] [--log FOLDER]

Runs itself again under the tool with ``--launch``, a format at a time, each bounded in time. Prints a row per tool and
format; exit code 1 if one reports an error, was not finished, or differs from the reference. An interrupt leaves the
rows there are, and is no pass. compute-sanitizer is part of the CUDA toolkit; it is also in the wheel
nvidia-cuda-sanitizer-api (14 MB), whose version should be CUDA's.

What it does not see: racecheck looks at shared memory alone. Decode programs that share a sequence leave their results
in global memory and count, by an acquire-release atomic, who comes last (kernels/combine.py); decode begins before what
the fill wrote has arrived, and waits for it; merging replaces what it reads. --launch therefore runs every decode shape
several times over more programs than sequences, with one, two and three levels of that tree, over results poisoned with
NaN, then behind a fill, then merging, and compares each output bit by bit with the first: a result that was read before
it was written, or twice, would show. ``--launch --repeats 2000`` does so without a sanitizer, at the kernels' real
timing; it is part of every run, before the tools.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from lmdeploy_kvq import FORMATS, get_format

TOOLS = {'memcheck': ['--leak-check', 'no'], 'racecheck': [], 'synccheck': [], 'initcheck': []}
REPEATS, STRESS = 3, 300
LIMIT = 200  # seconds of one tool over one format, unless --limit says otherwise; racecheck takes longest
COMPILE_LIMIT = 280  # of one format without a tool: kernels are compiled then, and kept in Triton's cache
LAUNCHED = re.compile(r'^\w+: .*: \d+\.\d s$', re.MULTILINE)
ERRORS = re.compile(r'(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)')


def find_sanitizer() -> str | None:
    """The program: on the PATH, in a CUDA toolkit, or in the wheel."""
    found = shutil.which('compute-sanitizer')
    if found:
        return found
    roots = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda', '/opt/cuda']
    places = [Path(root) / folder / 'compute-sanitizer' for root in roots if root
              for folder in ('bin', 'compute-sanitizer')]
    try:
        files = metadata.files('nvidia-cuda-sanitizer-api') or []
    except metadata.PackageNotFoundError:
        files = []
    places += [Path(str(file.locate())) for file in files if file.name == 'compute-sanitizer']
    for place in places:
        if place.is_file():
            if not os.access(place, os.X_OK):  # a wheel that was unpacked by hand
                place.chmod(0o755)
            return str(place)
    return None


# ---- the launches


def launch(names: list[str], repeats: int) -> int:
    """Run all launches of some formats; prints one line each."""
    import sanitize_launches
    import torch
    for name in names:
        for what, run in sanitize_launches.launches(get_format(name)):
            started = time.monotonic()
            run(repeats)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f'{name}: {what}: {time.monotonic() - started:.1f} s', flush=True)
    print('all launches done', flush=True)
    return 0


def check(program: str, tool: str, name: str, repeats: int, folder: Path,
          limit: float = LIMIT) -> dict[str, object]:
    """One tool over the launches of one format."""
    log = folder / f'{tool}-{name}.log'
    command = [program, '--tool', tool, *TOOLS[tool], '--error-exitcode', '86', '--print-limit', '20', sys.executable,
               str(Path(__file__).resolve()), '--launch', '--formats', name, '--repeats', str(repeats)]
    # The allocator's pieces would hide what is out of bounds of a tensor but inside its segment.
    env = {**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}
    started = time.monotonic()
    with log.open('w') as out:
        try:
            code: int | None = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit,
                                              env=env).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text(errors='replace')
    counts = [int(a or b) for a, b in ERRORS.findall(text)]
    done = 'all launches done' in text
    return {'tool': tool, 'format': name, 'launches': len(LAUNCHED.findall(text)),
            'errors': sum(counts) if counts else None, 'exit': code, 'finished': done,
            'seconds': time.monotonic() - started, 'ok': done and code == 0 and bool(counts) and not any(counts),
            'log': str(log)}


def launch_alone(name: str) -> int:
    """The launches of a format without a tool, hence at their real timing; the exit status, 124: it took too long."""
    command = [sys.executable, str(Path(__file__).resolve()), '--launch', '--formats', name, '--repeats', str(STRESS)]
    try:
        return subprocess.run(command, timeout=COMPILE_LIMIT).returncode
    except subprocess.TimeoutExpired:
        return 124


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tools', default='memcheck,racecheck', help=f'of {", ".join(TOOLS)}')
    parser.add_argument('--formats', default=','.join(fmt.name for fmt in FORMATS))
    parser.add_argument('--jobs', type=int, default=9, help='programs at a time on the GPU')
    parser.add_argument('--repeats', type=int, default=REPEATS, help='of each decode, step and merge')
    parser.add_argument('--limit', type=float, default=LIMIT, help='seconds of one tool over one format')
    parser.add_argument('--launch', action='store_true', help='run the launches in this process, without a tool')
    parser.add_argument('--log', type=Path, default=Path('/tmp/sanitize'), help='folder for the logs')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args(argv)
    names = [get_format(name).name for name in args.formats.split(',')]
    unknown = set(args.tools.split(',')) - TOOLS.keys()
    if unknown:
        parser.error(f'--tools: {", ".join(sorted(unknown))}: known are {", ".join(TOOLS)}')
    if args.launch:
        return launch(names, args.repeats)
    program = find_sanitizer()
    if program is None:
        print('there is no compute-sanitizer: it comes with the CUDA toolkit, or with `pip install '
              'nvidia-cuda-sanitizer-api==13.0.*` (the version of CUDA)', file=sys.stderr)
        return 2
    from concurrent.futures import ThreadPoolExecutor, wait

    from benchlib import print_table, write_results
    args.log.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        # Without a tool first: kernels are compiled once, and under a tool the compiler is slow.
        wrong = [name for name, code in zip(names, pool.map(launch_alone, names)) if code]
        if wrong:
            print(f'without a tool, these fail already: {", ".join(wrong)}')
            return 1
        jobs = [pool.submit(check, program, tool, name, args.repeats, args.log, args.limit)
                for tool in args.tools.split(',') for name in names]
        try:
            wait(jobs)
        except KeyboardInterrupt:
            print('interrupted: what has not begun is left out, what has not ended did not finish')
            pool.shutdown(wait=True, cancel_futures=True)
    rows = [job.result() for job in jobs if not job.cancelled()]
    print_table(rows, ['tool', 'format', 'launches', 'errors', 'exit', 'finished', 'seconds', 'log'])
    for row in rows:
        if not row['ok']:
            print(f'--- {row["log"]}\n' + Path(str(row['log'])).read_text(errors='replace')[-3000:])
    version = subprocess.run([program, '--version'], text=True, capture_output=True).stdout.strip().splitlines()
    failed = [f'{row["tool"]}: {row["format"]}' for row in rows if not row['ok']]
    failed += [f'{len(jobs) - len(rows)} were left out'] if len(rows) < len(jobs) else []
    print(write_results('sanitize', rows, args.out, sanitizer=version[-1] if version else program, failed=failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
