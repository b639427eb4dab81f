#!/usr/bin/env python3
"""What one layer's attention runs in a decode step: new tokens are written, then attention reads them all.

Ours against LMDeploy's own kernels, CUDA-graph replays of both launches; writes layer.json. Shapes and loads are those
of bench_decode.py, which times attention alone, as bench_fill.py does writing. Here attention begins when its tokens
have just been written, as it does in the engine, and memory is allocated for every step.

  scripts/bench_layer.py --shapes 28x4x128 --loads 1x512,64x4096 --contenders lmdeploy:0,kvq:fp8_per_token_head
"""
from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import torch
from bench_decode import LMDeploy, Ours, combos, compile_all, run, to_compile
from benchlib import print_table, write_results
from targets import Preset

from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.workspace import Workspace

LOADS = '1x512,1x8192,1x131072,8x512,8x2048,32x512,32x2048,64x4096,16x8192,256x1024,ragged:64'
CONTENDERS = 'lmdeploy:0,lmdeploy:16,lmdeploy:8,lmdeploy:4,kvq:fp8_per_token_head,kvq:int8_per_token_head,kvq:fp8,' \
    'kvq:k8v4_per_token_head,kvq:int4_per_token_head'
COLUMNS = ('contender', 'policy', 'shape', 'load', 'page', 'us', 'vs_bf16', 'relative_error')


@functools.lru_cache(maxsize=1)
def new_tokens(query: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """K and V rows of a query's tokens, and where they begin and how many a sequence has; made once per query."""
    tokens, _, dim = query.shape
    return (*torch.randn((2, tokens, kv_heads, dim), dtype=query.dtype, device=query.device),
            torch.arange(tokens, device=query.device), torch.ones(tokens, dtype=torch.int64, device=query.device))


class OurLayer(Ours):
    """Our two launches."""

    def workspace(self, query, table, lens, query_len) -> Workspace:
        key, value, q_start, q_lens = new_tokens(query, self.cache.num_kv_heads)
        workspace = Workspace.allocate(query, self.cache, len(lens), query_len, self.config)
        fill(key, value, self.cache, TokenLayout(q_start=q_start, q_lens=q_lens, kv_lens=lens, block_table=table,
                                                 uniform_query_len=query_len), workspace.inputs(query))
        return workspace


class LMDeployLayer(LMDeploy):
    """LMDeploy's fill, then its attention."""

    def __call__(self, query, table, lens, query_len):
        from lmdeploy.pytorch.kernels.cuda import fill_kv_cache
        key, value, q_start, q_lens = new_tokens(query, self.k.size(2))
        fill_kv_cache(key, value, self.k, self.v, q_start, q_lens, kv_seq_length=lens, max_q_seq_length=query_len,
                      block_offsets=table, k_scales_zeros=self.scales[0], v_scales_zeros=self.scales[1],
                      quant_policy=self.policy)
        return super().__call__(query, table, lens, query_len)


LAYERS = {'kvq': OurLayer, 'lmdeploy': LMDeployLayer}


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
    shapes, loads, pages, contenders = (getattr(args, name).split(',')
                                        for name in ('shapes', 'loads', 'pages', 'contenders'))
    todo = combos({'layer': Preset(shapes, loads, tuple(map(int, pages)), contenders=contenders)})
    if args.jobs:
        compile_all(to_compile(todo, LAYERS), args.jobs)
    rows = run(todo, kinds=LAYERS)
    print_table(rows, COLUMNS)
    print(write_results('layer', rows, args.out))
    if len(rows) < len(shapes) * len(loads) * len(pages) * len(contenders):
        sys.exit('some were not measured: see above')


if __name__ == '__main__':
    main()
