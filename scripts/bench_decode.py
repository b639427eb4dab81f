#!/usr/bin/env python3
"""Decode attention: ours against LMDeploy's own kernels (and FlashInfer where installed), CUDA-graph replays.

Writes benchmarks/results/decode.json. A shape is QUERY_HEADSxKV_HEADSxHEAD_DIM, a load SEQUENCESxTOKENS, or
``ragged:SEQUENCES`` (lengths log-uniform from 16 to 32768).

  scripts/bench_decode.py                                  the full table
  scripts/bench_decode.py --shapes 32x8x128 --loads 64x4096 --contenders kvq:fp8_per_token_head,lmdeploy:0
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from pathlib import Path

import torch
from benchlib import ROTATE_BYTES, graph_us, print_table, read_us, write_results

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels.decode import decode, default_config

SHAPES = ('32x8x128', '64x8x128', '28x4x128', '16x2x128', '9x3x64', '32x8x64', '16x4x256')
LOADS = ('64x4096', '256x1024', '16x8192', '1x131072', '1x128', '1x4096', '8x512', '64x128', 'ragged:64')
CONTENDERS = ('lmdeploy:0', 'lmdeploy:16', 'lmdeploy:8', 'lmdeploy:4', 'kvq:fp8_per_token_head',
              'kvq:int8_per_token_head', 'kvq:fp8')
COLUMNS = ('contender', 'policy', 'shape', 'load', 'page', 'query_len', 'us', 'read_fraction', 'vs_bf16',
           'relative_error')


@dataclasses.dataclass
class Load:
    """Lengths of one batch, and block tables that walk through a pool larger than the caches."""
    lens: torch.Tensor
    tables: list[torch.Tensor]
    pool_blocks: int

    @classmethod
    def build(cls, spec: str, page: int, bytes_per_token: int) -> Load:
        generator = torch.Generator().manual_seed(1)
        if spec.startswith('ragged:'):
            exponent = torch.rand(int(spec[7:]), generator=generator) * 11 + 4
            lens = (2**exponent).long()
        else:
            batch, tokens = map(int, spec.split('x'))
            lens = torch.full((batch, ), tokens)
        blocks = (lens + page - 1) // page
        used, width = int(blocks.sum()), int(blocks.max())
        copies = max(1, min(16, math.ceil(ROTATE_BYTES / (int(lens.sum()) * bytes_per_token))))
        pool = used * copies + 1
        tables = []
        order = torch.randperm(pool - 1, generator=generator).int() + 1
        for ids in order.split(used):
            table = torch.zeros(len(lens), width, dtype=torch.int32)
            for row, part in zip(table, ids.split(blocks.tolist())):
                row[:len(part)] = part
            tables.append(table.cuda())
        return cls(lens.cuda().int(), tables, pool)


def fill_random(write, pool_blocks: int, page: int, kv_heads: int, dim: int) -> None:
    """Write N(0, 1) K and V into every slot of a pool, in pieces."""
    piece = max(1, (1 << 26) // (page * kv_heads * dim))
    for start in range(0, pool_blocks, piece):
        blocks = torch.arange(start, min(start + piece, pool_blocks), device='cuda')
        tokens = len(blocks) * page
        key, value = torch.randn((2, tokens, kv_heads, dim), dtype=torch.bfloat16, device='cuda')
        write(key, value, blocks)


class Ours:
    """Our kernels on one format."""

    def __init__(self, name: str, load: Load, page: int, kv_heads: int, dim: int, config: dict):
        self.format = kvq.get_format(name)
        self.cache = kvq.PagedCache.allocate(self.format, load.pool_blocks, page, kv_heads, dim)
        self.config = dataclasses.replace(default_config(dim, 16), **config)
        offset = torch.arange(page, device='cuda')
        fill_random(lambda k, v, blocks: kvq.reshape_and_cache(
            k, v, self.cache, (blocks[:, None] * page + offset).flatten()), load.pool_blocks, page, kv_heads, dim)
        self.policy = self.format.policy
        self.bytes_per_token = self.cache.nbytes / (load.pool_blocks * page)

    def __call__(self, query, table, lens, query_len):
        out = torch.empty_like(query)
        return decode(query, self.cache, table, lens, out, query_len=query_len, sm_scale=query.size(-1)**-0.5,
                      config=self.config)

    def error(self, query, table, lens, query_len) -> float:
        ours = self(query, table, lens, query_len)[:4 * query_len].double()
        reference = kvq.reference.paged_attention(query[:4 * query_len].double(), self.cache, table[:4], lens[:4],
                                                  query_len=query_len, dtype=torch.float64)
        return float((ours - reference.to(query.dtype)).norm() / reference.norm())


class LMDeploy:
    """LMDeploy's own kernels, patched or not: they are called directly."""

    def __init__(self, policy: str, load: Load, page: int, kv_heads: int, dim: int, config: dict):
        from lmdeploy.messages import QuantPolicy
        from lmdeploy.pytorch.kernels.cuda import fill_kv_cache, flash_attn_with_kvcache
        self.kernel, self.policy = flash_attn_with_kvcache, QuantPolicy(int(policy))
        stored = {4: dim // 2}.get(int(policy), dim)
        dtype = {0: torch.bfloat16, 16: torch.float8_e4m3fn, 17: torch.float8_e5m2}.get(int(policy), torch.uint8)
        self.k, self.v = (torch.zeros((load.pool_blocks, page, kv_heads, stored), dtype=dtype, device='cuda')
                          for _ in range(2))
        self.scales = [None, None]
        if int(policy) in (4, 8):
            self.scales = [torch.zeros((load.pool_blocks, page, kv_heads, 2), dtype=torch.bfloat16, device='cuda')
                           for _ in range(2)]
        elif int(policy):
            self.scales = [torch.ones((), device='cuda') for _ in range(2)]

        def write(key, value, blocks):
            n = torch.tensor([len(key)], device='cuda')
            fill_kv_cache(key, value, self.k, self.v, torch.zeros_like(n), n, kv_seq_length=n,
                          max_q_seq_length=len(key), block_offsets=blocks[None].int(), k_scales_zeros=self.scales[0],
                          v_scales_zeros=self.scales[1], quant_policy=self.policy)

        fill_random(write, load.pool_blocks, page, kv_heads, dim)
        self.bytes_per_token = 2 * kv_heads * (stored * dtype.itemsize + (4 if int(policy) in (4, 8) else 0))

    def __call__(self, query, table, lens, query_len):
        return self.kernel(query, self.k, self.v, cache_seqlens=lens, page_table=table, max_seqlen_q=query_len,
                           softmax_scale=query.size(-1)**-0.5, softcap=-1.0, window_size=(-1, -1),
                           quant_policy=self.policy, k_scales_zeros=self.scales[0], v_scales_zeros=self.scales[1])

    def error(self, *args) -> None:
        return None


class FlashInfer:
    """FlashInfer's batch decode wrapper on a bf16 or fp8 cache."""

    def __init__(self, policy: str, load: Load, page: int, kv_heads: int, dim: int, config: dict):
        import flashinfer
        self.policy = int(policy)
        self.dtype = torch.float8_e4m3fn if self.policy else torch.bfloat16
        self.cache = torch.randn((load.pool_blocks, 2, page, kv_heads, dim), dtype=torch.bfloat16,
                                 device='cuda').to(self.dtype)
        self.bytes_per_token = 2 * kv_heads * dim * self.dtype.itemsize
        self.page, self.kv_heads, self.wrappers = page, kv_heads, {}
        self.flashinfer = flashinfer

    def __call__(self, query, table, lens, query_len):
        wrapper = self.wrappers.get(table.data_ptr())
        if wrapper is None:  # planned outside of the timed graph, by the warm-up call
            pages = (lens + self.page - 1) // self.page
            indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
            indices = torch.cat([row[:n] for row, n in zip(table, pages.tolist())])
            wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(256 << 20, dtype=torch.uint8, device='cuda'), 'NHD', use_tensor_cores=True)
            wrapper.plan(indptr, indices, (lens - 1) % self.page + 1, query.size(1), self.kv_heads, query.size(2),
                         self.page, q_data_type=query.dtype, kv_data_type=self.dtype)
            self.wrappers[table.data_ptr()] = wrapper
        return wrapper.run(query, self.cache)

    def error(self, *args) -> None:
        return None


KINDS = {'kvq': Ours, 'lmdeploy': LMDeploy, 'flashinfer': FlashInfer}


def run(shapes, loads, pages, query_lens, contenders, config=None, check=True) -> list[dict]:
    """Measure every combination; one row each."""
    rows = []
    for shape, page, spec in itertools.product(shapes, pages, loads):
        heads, kv_heads, dim = map(int, shape.split('x'))
        load = Load.build(spec, page, 2 * kv_heads * dim)
        times: dict[int, float] = {}
        for name in contenders:
            kind, _, policy = name.partition(':')
            contender = KINDS[kind](policy, load, page, kv_heads, dim, config or {})
            payload = int(contender.bytes_per_token * int(load.lens.sum()))
            read = read_us(payload)
            for query_len in query_lens:
                query = torch.randn((len(load.lens) * query_len, heads, dim), dtype=torch.bfloat16, device='cuda')
                try:
                    for table in load.tables:
                        contender(query, table, load.lens, query_len)
                    us = graph_us(lambda i: contender(query, load.tables[i % len(load.tables)], load.lens, query_len),
                                  copies=max(4, len(load.tables)))
                except Exception as error:  # a peer without this feature is a gap in the table, not the end of it
                    print(f'{name} {shape} {spec} page {page} q {query_len}: {type(error).__name__}: {error}')
                    continue
                if name == 'lmdeploy:0':
                    times[query_len] = us
                rows.append({
                    'contender': kind, 'policy': int(contender.policy), 'shape': shape, 'load': spec, 'page': page,
                    'query_len': query_len, 'us': us, 'payload_bytes': payload, 'read_us': read,
                    'read_fraction': read / us, 'vs_bf16': us / times[query_len] if query_len in times else None,
                    'relative_error': contender.error(query, load.tables[0], load.lens, query_len) if check else None,
                })
            del contender
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (('shapes', SHAPES), ('loads', LOADS), ('pages', (64, 128)), ('query-lens', (1, )),
                          ('contenders', CONTENDERS)):
        kind = type(default[0])
        parser.add_argument(f'--{flag}', type=lambda s, kind=kind: tuple(map(kind, s.split(','))), default=default)
    parser.add_argument('--name', default='decode', help='result file name')
    parser.add_argument('--out', type=Path, default=None, help='folder of the result file')
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = run(args.shapes, args.loads, args.pages, args.query_lens, args.contenders)
    print_table(rows, COLUMNS)
    print(write_results(args.name, rows, args.out))


if __name__ == '__main__':
    main()
