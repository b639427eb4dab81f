"""Shared by the benchmarks: timing through CUDA graphs, the read ceiling, environment, result files, tables."""
from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl

from lmdeploy_kvq.console import replacing
from lmdeploy_kvq.environment import version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
ROTATE_BYTES = 512 << 20  # data a timed loop walks through: several times any L2, so that nothing stays cached


def environment() -> dict[str, str]:
    """GPU, versions, commit and date, as every result file carries them.

    The commit is marked "-dirty" where tracked files differ from it, result files aside: a run that writes several of
    them is of one commit. ``KVQ_COMMIT`` names it where the tree is a copy, whose git, if any, does not know it.
    """
    def git(*args: str) -> str:
        return subprocess.run(['git', *args], cwd=ROOT, text=True, capture_output=True).stdout.strip()

    commit = os.environ.get('KVQ_COMMIT')
    if not commit:
        changed = git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!benchmarks/results')
        commit = (git('describe', '--always', '--abbrev=12') or 'unknown') + '-dirty' * bool(changed)
    return {
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or 'cpu',
        'gpus': str(torch.cuda.device_count()), 'cuda': torch.version.cuda or 'none',
        'python': platform.python_version(),
        **{name: version(name) or 'not installed'
           for name in ('torch', 'triton', 'lmdeploy', 'transformers', 'flashinfer-python')},
        'commit': commit, 'date': time.strftime('%Y-%m-%d', time.gmtime()),
    }


def graph_us(step: Callable[[int], object], copies: int, replays: int = 7) -> float:
    """Median microseconds of one call: ``step(i)`` for i < copies captured in one CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            step(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


@triton.jit
def _read_kernel(x_ptr, out_ptr, words, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < words, other=0)
    total = tl.sum(x, 0)
    if total == -1234567:  # keeps the loads; practically never stores
        tl.store(out_ptr, total)


@functools.lru_cache(maxsize=1)
def _random_words(count: int) -> torch.Tensor:
    return torch.randint(0, 1 << 30, (count, ), dtype=torch.int32, device='cuda')


@functools.cache
def read_us(nbytes: int) -> float:
    """Microseconds of a pure read of ``nbytes``, rotating through more data than the caches hold; once per size."""
    words = -(-nbytes // 256) * 64  # every piece begins where wide loads can
    copies = rotations(nbytes)
    data = _random_words(max(ROTATE_BYTES // 4, 1 << (copies * words - 1).bit_length()))
    out = torch.zeros(1, dtype=torch.int32, device='cuda')
    best = float('inf')
    for block in (4096, 16384):
        grid = (triton.cdiv(words, block), )
        best = min(best, graph_us(lambda i: _read_kernel[grid](data[i % copies * words:], out, words, BLOCK=block,
                                                               num_warps=8), max(4, copies), replays=15))
    return best


def rotations(nbytes: int) -> int:
    """How many pieces of ``nbytes`` a timed loop walks through: ROTATE_BYTES together, as far as 256 pieces reach."""
    return max(1, min(256, -(-ROTATE_BYTES // max(nbytes, 1))))


def write_results(name: str, rows: Sequence[dict], folder: Path | None = None, **extra: object) -> Path:
    """Write ``NAME.json`` with the environment."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{name}.json'
    text = json.dumps({'environment': environment(), **extra, 'rows': list(rows)}, indent=1) + '\n'
    with replacing(path) as unfinished:
        unfinished.write_text(text)
    return path


def add_vs_bf16(rows: Sequence[dict], measure: str, keys: Sequence[str]) -> None:
    """Give every row ``vs_bf16``: its ``measure`` over that of LMDeploy's bf16 row of the same ``keys``, else None."""
    base = {tuple(row[k] for k in keys): row.get(measure) for row in rows
            if (row['contender'], row['policy']) == ('lmdeploy', 0)}
    for row in rows:
        bf16, own = base.get(tuple(row[k] for k in keys)), row.get(measure)
        row['vs_bf16'] = own / bf16 if own and bf16 else None


def print_table(rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Print rows as an aligned table."""

    def cell(value: object) -> str:
        return f'{value:.3g}' if isinstance(value, float) and abs(value) < 10 else \
            f'{value:.1f}' if isinstance(value, float) else '' if value is None else str(value)

    table = [list(columns), *[[cell(row.get(c)) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print('  '.join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), flush=True)
