#!/usr/bin/env python3
"""Writing new tokens into the cache: ours against LMDeploy's own fill kernels, CUDA-graph replays; writes fill.json.

A load ``decode:N`` is one new token of each of N sequences of about 2,000 tokens; ``prefill:N`` is one prompt of N
tokens. ``copy_fraction``: bytes read and written at the bandwidth of a device-to-device copy measured in the same run,
over the kernel's time. For decode, ours also prepares attention: it zeroes its counters, and of formats with a rotation
it rotates the queries (GROUP per KV head): rows with ``queries``, which have others without beside them.
"""
from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from benchlib import graph_us, print_table, write_results
from targets import VERDICT, verdicts

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.workspace import Workspace

COPIES = 8
LAUNCHES = 64  # of a timed graph: a launch takes 2 us, and events are exact to half of one
GROUP = 4


def copy_bandwidth() -> float:
    """Bytes per microsecond, read plus written, of a large copy."""
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device='cuda') for _ in range(2))
    return 2 * a.numel() / graph_us(lambda i: b.copy_(a), 4)


def batch(load: str, page: int, device: str = 'cuda') -> tuple[torch.Tensor, ...]:
    """q_start, q_lens, kv_lens, block table, pool blocks and query length (0: ragged) of a load."""
    kind, count = load.split(':')
    n = int(count)
    if kind == 'decode':
        lens = 2000 + torch.arange(n) % page
        q_start, q_lens, query_len = torch.arange(n), torch.ones(n, dtype=torch.int64), 1
    else:
        lens, q_start, q_lens, query_len = torch.tensor([n]), torch.tensor([0]), torch.tensor([n]), 0
    width = int(lens.max() + page - 1) // page
    table = (torch.randperm(len(lens) * width) + 1).int().reshape(len(lens), width)
    return *(x.to(device) for x in (q_start, q_lens, lens, table)), len(lens) * width + 1, query_len


def make_data(tokens: int, heads: int, dim: int, device: str = 'cuda') -> list[torch.Tensor]:
    """COPIES of new K and V, bf16 [2, tokens, heads, dim]."""
    return [torch.randn((2, tokens, heads, dim), dtype=torch.bfloat16, device=device) for _ in range(COPIES)]


class Ours:
    """Our kernel on one format: COPIES of the cache, so that a write never finds the last one's lines.

    Attributes:
        rotates: whether there are queries to rotate.
    """

    def __init__(self, name: str, load: str, page: int, heads: int, dim: int,
                 data: list[torch.Tensor] | None = None, device: str = 'cuda', queries: bool = True) -> None:
        q_start, q_lens, lens, table, blocks, query_len = batch(load, page, device)
        tokens = int(q_lens.sum())
        self.data = make_data(tokens, heads, dim, device) if data is None else data
        self.caches = [kvq.PagedCache.allocate(name, blocks, page, heads, dim, device=device) for _ in range(COPIES)]
        self.layout = TokenLayout(q_start=q_start, q_lens=q_lens, kv_lens=lens, block_table=table,
                                  uniform_query_len=query_len)
        self.inputs: list = [None] * COPIES
        self.rotates = bool(query_len) and self.caches[0].k_transform is not None
        if query_len:
            query = torch.randn((tokens, GROUP * heads, dim), dtype=torch.bfloat16, device=device)
            self.inputs = [Workspace.allocate(query, cache, tokens, 1).inputs(query) for cache in self.caches]
        if not queries:
            self.inputs = [inputs and dataclasses.replace(inputs, query=None, rotated=None) for inputs in self.inputs]
        self.policy = self.caches[0].format.policy
        self.written = tokens * self.caches[0].nbytes // (blocks * page)

    def __call__(self, i: int) -> None:
        i %= COPIES
        fill(self.data[i][0], self.data[i][1], self.caches[i], self.layout, self.inputs[i])


def main() -> None:
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch.kernels.cuda import fill_kv_cache
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='8x128,2x128,8x64,4x256', help='KV heads x head size')
    parser.add_argument('--loads', default='decode:64,decode:256,prefill:8192')
    parser.add_argument('--pages', default='64')
    parser.add_argument('--formats', default=','.join(fmt.name for fmt in kvq.FORMATS))
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = []
    for shape in args.shapes.split(','):
        heads, dim = map(int, shape.split('x'))
        for load in args.loads.split(','):
            for page in map(int, args.pages.split(',')):
                q_start, q_lens, lens, table, blocks, query_len = batch(load, page)
                tokens = int(q_lens.sum())
                data = make_data(tokens, heads, dim)
                read = data[0].numel() * 2

                def add(contender: str, policy: int, us: float, written: int, queries=False, shape=shape, load=load,
                        page=page, read=read) -> None:
                    base = next((r['us'] for r in rows if (r['contender'], r['policy'], r['shape'], r['load'],
                                                           r['page']) == ('lmdeploy', 0, shape, load, page)), us)
                    rows.append({'contender': contender, 'policy': policy, 'shape': shape, 'load': load, 'page': page,
                                 'queries': queries, 'us': us, 'copy_fraction': (read + written) / bandwidth / us,
                                 'vs_bf16': us / base})

                for policy, dtype in ((0, torch.bfloat16), (16, torch.float8_e4m3fn), (8, torch.uint8)):
                    caches = [torch.zeros((2, blocks, page, heads, dim), dtype=dtype, device='cuda')
                              for _ in range(COPIES)]
                    scales = torch.zeros((2, blocks, page, heads, 2), dtype=torch.bfloat16, device='cuda') \
                        if policy == 8 else torch.ones(2, device='cuda')
                    us = graph_us(lambda i: fill_kv_cache(
                        *data[i % COPIES], *caches[i % COPIES], q_start, q_lens, kv_seq_length=lens,
                        max_q_seq_length=query_len or tokens, block_offsets=table,
                        k_scales_zeros=scales[0] if policy else None, v_scales_zeros=scales[1] if policy else None,
                        quant_policy=QuantPolicy(policy)), LAUNCHES)
                    add('lmdeploy', policy, us, data[0].numel() * dtype.itemsize)
                for name in args.formats.split(','):
                    ours = Ours(name, load, page, heads, dim, data, queries=False)
                    add('kvq', ours.policy, graph_us(ours, LAUNCHES), ours.written)
                    if ours.rotates:
                        ours = Ours(name, load, page, heads, dim, data)
                        add('kvq', ours.policy, graph_us(ours, LAUNCHES), ours.written, queries=True)
    print_table(rows, list(rows[0]))
    print_table(verdicts('fill', rows), VERDICT)
    print(write_results('fill', rows, args.out, copy_gb_per_s=bandwidth / 1e3))


if __name__ == '__main__':
    main()
