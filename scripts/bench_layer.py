#!/usr/bin/env python3
"""What one layer's attention runs in a decode step: new tokens are written, then attention reads them all.

Ours against LMDeploy's own kernels, CUDA-graph replays of both launches; writes layer.json. Shapes and loads are those
of bench_decode.py, which times attention alone, as bench_fill.py does writing. Here attention begins while tokens are
still being written, as it does in the engine, and memory is allocated for every step.

  scripts/bench_layer.py --shapes 28x4x128 --loads 1x512,64x4096 --contenders lmdeploy:0,kvq:fp8_per_token_head
"""
from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from bench_decode import CHECKED_TOKENS, LMDeploy, Load, Ours, make_query, measure
from benchlib import add_vs_bf16, print_table, write_results

from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.workspace import Workspace

LOADS = '1x512,1x8192,1x131072,8x512,8x2048,32x512,32x2048,64x4096,16x8192,256x1024,ragged:64'
CONTENDERS = 'lmdeploy:0,lmdeploy:16,lmdeploy:8,lmdeploy:4,kvq:fp8_per_token_head,kvq:int8_per_token_head,kvq:fp8,' \
    'kvq:k8v4_per_token_head,kvq:int4_per_token_head'
COLUMNS = ('contender', 'policy', 'shape', 'load', 'page', 'us', 'vs_bf16', 'relative_error')


def new_tokens(query: torch.Tensor, kv_heads: int, made: dict) -> tuple[torch.Tensor, ...]:
    """K and V rows of a query's tokens, and where they begin and how many a sequence has; made once per query."""
    key = query.data_ptr(), query.shape
    if key not in made:
        tokens, _, dim = query.shape
        made.clear()
        made[key] = (*torch.randn((2, tokens, kv_heads, dim), dtype=query.dtype, device=query.device),
                     torch.arange(tokens, device=query.device),
                     torch.ones(tokens, dtype=torch.int64, device=query.device))
    return made[key]


class OurLayer(Ours):
    """Our two launches."""

    def __call__(self, query, table, lens, query_len):
        made = self.__dict__.setdefault('made', {})
        key, value, q_start, q_lens = new_tokens(query, self.cache.num_kv_heads, made)
        workspace = Workspace.allocate(query, self.cache, len(lens), query_len, self.config)
        fill(key, value, self.cache, TokenLayout(q_start=q_start, q_lens=q_lens, kv_lens=lens, block_table=table,
                                                 uniform_query_len=query_len), workspace.inputs(query))
        return decode(query, self.cache, table, lens, torch.empty_like(query), query_len=query_len,
                      sm_scale=query.size(-1)**-0.5, workspace=workspace, filled=True)


class LMDeployLayer(LMDeploy):
    """LMDeploy's fill, then its attention."""

    def __call__(self, query, table, lens, query_len):
        from lmdeploy.pytorch.kernels.cuda import fill_kv_cache
        made = self.__dict__.setdefault('made', {})
        key, value, q_start, q_lens = new_tokens(query, self.k.size(2), made)
        fill_kv_cache(key, value, self.k, self.v, q_start, q_lens, kv_seq_length=lens, max_q_seq_length=query_len,
                      block_offsets=table, k_scales_zeros=self.scales[0], v_scales_zeros=self.scales[1],
                      quant_policy=self.policy)
        return super().__call__(query, table, lens, query_len)


KINDS = {'kvq': OurLayer, 'lmdeploy': LMDeployLayer}


def compile_layer(name: str, shape: str, page: int, loads: list[str]) -> None:
    """Launch once what will be measured, on a pool of a few pages, so that Triton's cache on disk has it."""
    heads, kv_heads, dim = map(int, shape.split('x'))
    kind, _, policy = name.partition(':')
    contender = None
    for spec in loads:
        load = Load.small(spec, page)
        contender = contender or KINDS[kind](policy, load, page, kv_heads, dim, {})
        contender(make_query(load, heads, dim, 1), load.tables[0], load.lens, 1)
    torch.cuda.synchronize()


def run(shape: str, page: int, specs: list[str], contenders: list[str]) -> list[dict]:
    """A row per contender and load."""
    heads, kv_heads, dim = map(int, shape.split('x'))
    loads, rows = Load.build_all(specs, page, 2 * kv_heads * dim), []
    for name in contenders:
        kind, _, policy = name.partition(':')
        contender = KINDS[kind](policy, next(iter(loads.values())), page, kv_heads, dim, {})
        for spec, load in loads.items():
            query = make_query(load, heads, dim, 1)
            us = measure(contender, load, query, 1)
            checked = int(load.lens[:4].sum()) <= CHECKED_TOKENS
            rows.append({'contender': kind, 'policy': int(contender.policy), 'shape': shape, 'load': spec, 'page': page,
                         'us': us, 'relative_error':
                         contender.error(query, load.tables[0], load.lens, 1) if checked else None})
        del contender
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='32x8x128,28x4x128')
    parser.add_argument('--loads', default=LOADS)
    parser.add_argument('--pages', default='64')
    parser.add_argument('--contenders', default=CONTENDERS)
    parser.add_argument('--jobs', type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)),
                        help='processes that compile first, 0: none')
    parser.add_argument('--out', type=Path, help='folder of the result file')
    args = parser.parse_args()
    torch.manual_seed(0)
    loads, contenders = args.loads.split(','), args.contenders.split(',')
    pools = list(itertools.product(args.shapes.split(','), map(int, args.pages.split(','))))
    if args.jobs:
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context('spawn')) as executor:
            for task in [executor.submit(compile_layer, name, *pool, loads)
                         for pool in pools for name in contenders]:
                task.result()
    rows = [row for pool in pools for row in run(*pool, loads, contenders)]
    add_vs_bf16(rows, 'us', ('shape', 'load', 'page'))
    print_table(rows, COLUMNS)
    print(write_results('layer', rows, args.out))


if __name__ == '__main__':
    main()
