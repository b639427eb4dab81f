#!/usr/bin/env python3
"""An engine's decode step, millions of times, every bit compared: what a sanitizer's timing would hide.

  scripts/repeat_steps.py --formats fp8_per_token_head,int4_per_token_head --seconds 60

Beside other processes that use the same GPU, or several of these at a time. CUDA graphs of a few layers each: what a
layer writes is poisoned, its queries, keys and values are copied by another kernel, as an engine's rotary embedding
does, then fill and decode follow, and output and new rows are compared with the first ones, which are compared with
the reference. Graphs share their memory and are replayed in random order, batches of 1 to 64, padded as LMDeploy pads
them; between them come prefills: a fill of many tokens, and flatten. Writes repeat_steps.json; exit code 1 if one bit
differs.
"""
from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchlib import print_table, write_results

from lmdeploy_kvq import FORMATS, KVFormat, get_format, reference
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.flatten import NewTokens, flatten
from lmdeploy_kvq.kernels.workspace import Workspace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from helpers import Problem, frobenius, problem

LAYERS = 4
SHAPES = {'9x3x64': (9, 3, 64), '32x8x128': (32, 8, 128)}
BATCHES = ((1, 1), (2, 2), (7, 8), (24, 32), (40, 64))
"""Sequences, and what they are padded to."""


def lengths(rng: random.Random, count: int, longest: int) -> list[int]:
    """Log-uniform, from 2 to ``longest``."""
    return [max(2, int(longest**rng.random())) for _ in range(count)]


class Wrong:
    """How many elements differed, on the device."""

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device='cuda')

    def compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        self.count += (found != expected).sum()  # NaN is never equal


def rows_of(p: Problem, slots: torch.Tensor) -> list[torch.Tensor]:
    """Codes and scales of these slots."""
    block, offset = slots // p.cache.block_size, slots % p.cache.block_size
    return [x[block, :, offset] for x in (p.cache.k_codes, p.cache.v_codes, p.cache.k_scales, p.cache.v_scales)
            if x is not None]


def poison(p: Problem, slots: torch.Tensor) -> None:
    """All ones in every bit of these slots."""
    block, offset = slots // p.cache.block_size, slots % p.cache.block_size
    for x, ones in ((p.cache.k_codes, 255), (p.cache.v_codes, 255), (p.cache.k_scales, float('nan')),
                    (p.cache.v_scales, float('nan'))):
        if x is not None:
            x[block, :, offset] = torch.full((), ones, dtype=x.dtype, device=x.device)  # no copy from the host


def step(fmt: KVFormat, shape: tuple[int, int, int], lens: list[int], padded: int, seed: int,
         wrong: Wrong) -> Callable[[], None]:
    """A function that does LAYERS layers of a decode step and compares; capturable once it has run."""
    heads, kv_heads, dim = shape
    p = problem(fmt, [*lens, *[0] * (padded - len(lens))], device='cuda', kv_heads=kv_heads, head_dim=dim,
                block_size=64, pooled=True, dtype=torch.bfloat16, seed=seed)
    kv_lens, newest = p.kv_lens.clone(), p.kv_lens[:len(lens)].cumsum(0) - 1
    kv_lens[len(lens):] = 1
    pad = (0, 0, 0, 0, 0, padded - len(lens))
    sources = [torch.nn.functional.pad(x[newest], pad) for x in (p.key, p.value)]
    generator = torch.Generator(device='cuda').manual_seed(seed)
    sources.append(torch.randn(padded, heads, dim, device='cuda', dtype=torch.bfloat16, generator=generator))
    own = [torch.empty_like(x) for x in sources]
    slots = p.slots[newest]
    layout = TokenLayout(q_start=torch.arange(padded, device='cuda'), q_lens=torch.ones_like(kv_lens), kv_lens=kv_lens,
                         block_table=p.block_table, uniform_query_len=1)
    expected: list[torch.Tensor] = []

    def layer() -> None:
        for x in own:
            x.fill_(float('nan'))
        poison(p, slots)
        key, value, query = own
        workspace = Workspace.allocate(query, p.cache, padded, 1)
        workspace.partial.fill_(float('nan'))
        out = torch.full_like(query, float('nan'))
        torch._foreach_copy_(own, sources)  # one kernel, the one before the fill
        fill(key, value, p.cache, layout, workspace.inputs(query))
        decode(query, p.cache, p.block_table, kv_lens, out, query_len=1, sm_scale=dim**-0.5, workspace=workspace,
               filled=True, padded=True)
        found = [out, *rows_of(p, slots)]
        if expected:
            for x, y in zip(found, expected, strict=True):
                wrong.compare(x, y)
        else:
            expected.extend(found)

    layer()
    attended = reference.paged_attention(sources[2][:len(lens)].float(), p.cache, p.block_table[:len(lens)],
                                         kv_lens[:len(lens)], query_len=1, sm_scale=dim**-0.5)
    assert frobenius(expected[0][:len(lens)], attended) < 5e-3, 'not what the reference attends to'
    return lambda: [layer() for _ in range(LAYERS)]


def prefill(fmt: KVFormat, shape: tuple[int, int, int], lens: list[int], seed: int,
            wrong: Wrong) -> Callable[[], None]:
    """A function that fills the second half of every sequence, decodes all of it but that half, and compares."""
    _, kv_heads, dim = shape
    p = problem(fmt, lens, device='cuda', kv_heads=kv_heads, head_dim=dim, block_size=64, pooled=True,
                dtype=torch.bfloat16, seed=seed)
    q_lens = (p.kv_lens + 1) // 2
    q_start = q_lens.cumsum(0, dtype=torch.int32) - q_lens
    ends = p.kv_lens.cumsum(0).tolist()
    new = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, q_lens.tolist())]).cuda()
    key, value, slots = p.key[new], p.value[new], p.slots[new]
    layout = TokenLayout(q_start=q_start, q_lens=q_lens, kv_lens=p.kv_lens, block_table=p.block_table)
    outs = [torch.empty_like(x) for x in (p.key, p.value)]
    total = sum(lens)
    expected: list[torch.Tensor] = []

    def once() -> None:
        poison(p, slots)
        for out in outs:
            out.fill_(float('nan'))
        fill(key, value, p.cache, layout)
        flatten(p.cache, p.block_table, p.kv_lens, *outs, total, NewTokens(key, value, q_start, q_lens))
        found = [*outs, *rows_of(p, slots)]
        if expected:
            for x, y in zip(found, expected, strict=True):
                wrong.compare(x, y)
        else:
            expected.extend(x.clone() for x in found)

    once()
    for x, raw in zip(expected, (p.key, p.value)):
        assert frobenius(x, raw) <= 1.2 * fmt.max_error, 'not what was given'
    return once


def captured(function: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """``function`` as a CUDA graph, whose memory others with the same pool use, too."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        function()

    def replay(kept: Callable[[], None] = function) -> None:  # the graph does not own what the function does
        graph.replay()

    return replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', default=','.join(fmt.name for fmt in FORMATS))
    parser.add_argument('--shapes', default=','.join(SHAPES))
    parser.add_argument('--seconds', type=float, default=30.0, help='per format and shape')
    parser.add_argument('--longest', type=int, default=4096, help='tokens of a sequence')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    rng, rows = random.Random(args.seed), []
    for name, shape in itertools.product(args.formats.split(','), args.shapes.split(',')):
        fmt, wrong, pool = get_format(name), Wrong(), torch.cuda.graph_pool_handle()
        scenes = [(f'step {batch}', captured(step(fmt, SHAPES[shape], lengths(rng, batch, args.longest), padded,
                                                  rng.randrange(1 << 30), wrong), pool), LAYERS)
                  for batch, padded in BATCHES for _ in range(2)]
        scenes += [(f'prefill {batch}', prefill(fmt, SHAPES[shape], lengths(rng, batch, args.longest),
                                                rng.randrange(1 << 30), wrong), 1) for batch in (1, 3)]
        torch.cuda.synchronize()
        assert int(wrong.count) == 0, 'differs before anything was repeated'
        launches, bad, end = 0, {}, time.monotonic() + args.seconds
        while time.monotonic() < end:
            what, run, count = rng.choice(scenes)
            for _ in range(40):
                run()
            launches += 40 * count
            seen = int(wrong.count)
            if seen:
                bad.setdefault(what, []).append(seen)
                wrong.count.zero_()
                print(f'{fmt.name} {shape}: {seen} elements differ in 40 of {what}', flush=True)
        rows.append({'format': fmt.name, 'shape': shape, 'launches': launches, 'wrong': sum(map(len, bad.values())),
                     'scenes': bad})
        print_table(rows[-1:], ['format', 'shape', 'launches', 'wrong'])
        del scenes
    print(write_results('repeat_steps', rows, args.out, seconds=args.seconds))
    return int(any(row['wrong'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
