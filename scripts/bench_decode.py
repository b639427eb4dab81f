#!/usr/bin/env python3
"""Decode attention: ours against LMDeploy's own kernels (and FlashInfer where installed), CUDA-graph replays.

Writes benchmarks/results/decode.json. A shape is QUERY_HEADSxKV_HEADSxHEAD_DIM, a load SEQUENCESxTOKENS, or
``ragged:SEQUENCES`` (lengths log-uniform from 16 to 32768). A preset is a list of them from scripts/targets.py,
which also knows the targets; the last table says which are met. Every contender has one pool of pages per shape and
page size, large enough for all loads; a timed loop walks through more of it than the caches hold. Other processes
compile the kernels first, several at a time.

  scripts/bench_decode.py --preset all                     everything the targets are about
  scripts/bench_decode.py --preset targets,cliff           a part; --append keeps the file's other rows of this build
  scripts/bench_decode.py --shapes 32x8x128 --loads 64x4096 --contenders kvq:fp8_per_token_head,lmdeploy:0
  scripts/bench_decode.py --preset peers --name decode_peers   FlashInfer, which compiles for a minute first
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from benchlib import (
    RESULTS,
    add_vs_bf16,
    environment,
    graph_us,
    print_table,
    read_us,
    rotations,
    write_results,
)
from targets import EVERY, KNOWN, PRESETS, VERDICT, Preset, verdicts

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.workspace import DecodeConfig, Workspace

SHAPES = ('32x8x128', '64x8x128', '28x4x128', '16x2x128', '9x3x64', '32x8x64', '16x4x256')
LOADS = ('64x4096', '256x1024', '16x8192', '1x131072', '1x128', '1x4096', '8x512', '64x128', 'ragged:64')
COLUMNS = ('contender', 'policy', 'shape', 'load', 'page', 'query_len', 'us', 'read_fraction', 'vs_bf16',
           'relative_error')
KEY = ('contender', 'policy', 'shape', 'load', 'page', 'query_len')
CHECKED_TOKENS = 150_000  # of at most four sequences; the reference works in float64

Launches = dict[tuple[str, int], str]  # {(load, query length): preset}
Combos = dict[tuple[str, int], dict[str, Launches]]  # {(shape, page): {contender: ...}}


@dataclasses.dataclass
class Load:
    """Lengths of one batch, and block tables that walk through a pool larger than the caches."""
    lens: torch.Tensor
    tables: list[torch.Tensor]
    pool_blocks: int

    @staticmethod
    def lengths(spec: str) -> torch.Tensor:
        """Tokens per sequence, int64 on the CPU: ``40x4096``, ``40x4096+24`` (and 24 of a token in page 0, as LMDeploy
        pads the batch of a CUDA graph), or ``ragged:64`` of 16 to 32k tokens."""
        if spec.startswith('ragged:'):
            generator = torch.Generator().manual_seed(1)
            return (2**(torch.rand(int(spec[7:]), generator=generator) * 11 + 4)).long()
        batch, tokens = map(int, spec.partition('+')[0].split('x'))
        return torch.tensor([tokens] * batch + [1] * Load.padding(spec))

    @staticmethod
    def padding(spec: str) -> int:
        """How many sequences, the last ones, only pad the batch."""
        return int(spec.partition('+')[2] or 0)

    @classmethod
    def build(cls, spec: str, page: int, bytes_per_token: int, pool_blocks: int = 0, device: str = 'cuda') -> Load:
        """Tables of random pages; the pool has ``pool_blocks`` or as many pages as the load needs."""
        lens = cls.lengths(spec)
        blocks = (lens + page - 1) // page
        blocks[len(lens) - cls.padding(spec):] = 0
        used, width = int(blocks.sum()), int(blocks.max())
        copies = rotations(int(lens.sum()) * bytes_per_token)
        pool = max(used * copies + 1, pool_blocks)
        order = torch.randperm(pool - 1, generator=torch.Generator().manual_seed(2)).int() + 1  # page 0 is LMDeploy's
        tables = torch.zeros((copies, len(lens), width), dtype=torch.int32)
        tables[(torch.arange(width) < blocks[:, None]).expand(copies, -1, -1)] = order[:used * copies]
        return cls(lens.int().to(device), list(tables.to(device)), pool)

    @classmethod
    def build_all(cls, specs: list[str], page: int, bytes_per_token: int, device: str = 'cuda') -> dict[str, Load]:
        """Loads that share a pool."""
        pool = max(cls.build(spec, page, bytes_per_token, device='cpu').pool_blocks for spec in specs)
        return {spec: cls.build(spec, page, bytes_per_token, pool, device) for spec in specs}

    @classmethod
    def small(cls, spec: str, page: int) -> Load:
        """The same launch with every table entry 0, over a pool of 16 pages: all that compiling needs."""
        lens = cls.lengths(spec)
        table = torch.zeros(len(lens), (int(lens.max()) + page - 1) // page, dtype=torch.int32)
        return cls(lens.int().cuda(), [table.cuda()], 16)


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
    padded = True  # as the engine calls them: what pads a batch does not count

    def __init__(self, name: str, load: Load, page: int, kv_heads: int, dim: int, config: dict):
        self.format = kvq.get_format(name)
        device = load.lens.device
        self.cache = kvq.PagedCache.allocate(self.format, load.pool_blocks, page, kv_heads, dim, device=device)
        self.config = DecodeConfig(**config) if config else None  # None: what serving takes
        self.workspaces: dict[tuple, Workspace] = {}
        offset = torch.arange(page, device=device)
        fill_random(lambda k, v, blocks: kvq.reshape_and_cache(
            k, v, self.cache, (blocks[:, None] * page + offset).flatten()), load.pool_blocks, page, kv_heads, dim)
        self.policy = self.format.policy
        self.bytes_per_token = self.cache.nbytes / (load.pool_blocks * page)

    def workspace(self, query, table, lens, query_len) -> Workspace:
        """What a fill leaves: prepared once for a query (bench_fill.py has the time of that)."""
        key = (query, query_len, self.config)  # kept, so that its memory does not come back as another batch's
        if key not in self.workspaces:
            self.workspaces = {key: Workspace.allocate(query, self.cache, len(lens), query_len,
                                                       self.config).prepare(query, self.cache)}
        return self.workspaces[key]

    def __call__(self, query, table, lens, query_len):
        # As the engine calls it, after the fill.
        return decode(query, self.cache, table, lens, torch.empty_like(query), query_len=query_len,
                      sm_scale=query.size(-1)**-0.5, workspace=self.workspace(query, table, lens, query_len),
                      filled=True, padded=self.padded)

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
        self.workspace = torch.empty(256 << 20, dtype=torch.uint8, device='cuda')  # one call runs at a time

    def __call__(self, query, table, lens, query_len):
        wrapper = self.wrappers.get(table.data_ptr())
        if wrapper is None:  # planned outside of the timed graph, by the warm-up call
            pages = (lens + self.page - 1) // self.page
            indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
            indices = torch.cat([row[:n] for row, n in zip(table, pages.tolist())])
            wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self.workspace, 'NHD', use_tensor_cores=True)
            wrapper.plan(indptr, indices, (lens - 1) % self.page + 1, query.size(1), self.kv_heads, query.size(2),
                         self.page, q_data_type=query.dtype, kv_data_type=self.dtype)
            self.wrappers[table.data_ptr()] = wrapper
        return wrapper.run(query, self.cache)

    def error(self, *args) -> None:
        return None


Kinds = dict[str, type]

KINDS: Kinds = {'kvq': Ours, 'lmdeploy': LMDeploy, 'flashinfer': FlashInfer}


def combos(presets: dict[str, Preset]) -> Combos:
    """Everything to measure, each once, under the first preset that asks for it."""
    found: Combos = {}
    for name, preset in presets.items():
        for shape, page, contender, load, query_len in itertools.product(
                preset.shapes, preset.pages, preset.contenders, preset.loads, preset.query_lens):
            found.setdefault((shape, page), {}).setdefault(contender, {}).setdefault((load, query_len), name)
    return found


def make_query(load: Load, heads: int, dim: int, query_len: int) -> torch.Tensor:
    return torch.randn((len(load.lens) * query_len, heads, dim), dtype=torch.bfloat16, device='cuda')


def compile_kernels(name: str, shape: str, page: int, launches: list[tuple[str, int]], config: dict | None = None,
                    kinds: Kinds = KINDS) -> None:
    """Launch once what will be measured, on a pool of a few pages, so that Triton's cache on disk has it."""
    heads, kv_heads, dim = map(int, shape.split('x'))
    kind, _, policy = name.partition(':')
    contender = None
    for spec, query_len in launches:
        load = Load.small(spec, page)
        contender = contender or kinds[kind](policy, load, page, kv_heads, dim, config or {})
        contender(make_query(load, heads, dim, query_len), load.tables[0], load.lens, query_len)
    torch.cuda.synchronize()


def compile_all(calls: list[tuple], jobs: int) -> None:
    """:func:`compile_kernels` with each of these arguments, in ``jobs`` processes. What fails here fails again, and is
    told, later."""
    start = time.monotonic()
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        tasks: list[Future] = [pool.submit(compile_kernels, *arguments) for arguments in calls]
        failed = [task.exception() for task in tasks if task.exception()]
    print(f'{len(tasks)} sets of kernels compiled in {time.monotonic() - start:.0f} s by {jobs} processes'
          + (f', {len(failed)} failed, the first with {failed[0]!r}' if failed else ''), flush=True)


def to_compile(todo: Combos, kinds: Kinds = KINDS) -> list[tuple]:
    """Arguments of :func:`compile_kernels` for all of ``todo`` that Triton compiles."""
    return [(name, shape, page, list(launches), None, kinds) for (shape, page), contenders in todo.items()
            for name, launches in contenders.items() if not name.startswith('flashinfer')]


def measure(contender, load: Load, query: torch.Tensor, query_len: int) -> float:
    """Microseconds of one call."""
    for table in load.tables:
        contender(query, table, load.lens, query_len)
    return graph_us(lambda i: contender(query, load.tables[i % len(load.tables)], load.lens, query_len),
                    copies=max(4, len(load.tables)))


def run(todo: Combos, config: dict | None = None, check: bool = True, kinds: Kinds = KINDS) -> list[dict]:
    """Measure every combination; one row each."""
    rows = []
    for (shape, page), contenders in todo.items():
        heads, kv_heads, dim = map(int, shape.split('x'))
        specs = dict.fromkeys(spec for launches in contenders.values() for spec, _ in launches)
        loads = Load.build_all(list(specs), page, 2 * kv_heads * dim)
        for name, launches in contenders.items():
            kind, _, policy = name.partition(':')
            try:
                contender = kinds[kind](policy, next(iter(loads.values())), page, kv_heads, dim, config or {})
            except ImportError as error:
                print(f'{name}: {error}')
                continue
            for (spec, query_len), preset in launches.items():
                load = loads[spec]
                payload = int(contender.bytes_per_token * int(load.lens.sum()))
                query = make_query(load, heads, dim, query_len)
                try:
                    us = measure(contender, load, query, query_len)
                except Exception as error:  # a peer without this feature is a gap in the table, not the end of it
                    print(f'{name} {shape} {spec} page {page} q {query_len}: {type(error).__name__}: {error}')
                    continue
                checked = check and int(load.lens[:4].sum()) <= CHECKED_TOKENS
                rows.append({
                    'contender': kind, 'policy': int(contender.policy), 'shape': shape, 'load': spec, 'page': page,
                    'query_len': query_len, 'preset': preset, 'us': us, 'payload_bytes': payload,
                    'read_us': read_us(payload), 'read_fraction': read_us(payload) / us,
                    'relative_error': contender.error(query, load.tables[0], load.lens, query_len) if checked else None,
                })
            del contender
            torch.cuda.empty_cache()
    add_vs_bf16(rows, 'us', ('shape', 'load', 'page', 'query_len'))
    return rows


def earlier_rows(path: Path, rows: list[dict]) -> list[dict]:
    """Rows of a result file that are not measured anew.

    Raises:
        SystemExit: the file is of another GPU, build or commit; such rows do not belong into one table.
    """
    if not path.exists():
        return []
    data, now = json.loads(path.read_text()), environment()
    different = sorted(key for key in now if key != 'date' and data['environment'].get(key) != now[key])
    if different:
        raise SystemExit(f'{path} was measured with another {", ".join(different)}: leave out --append')
    measured = {tuple(row[k] for k in KEY) for row in rows}
    return [row for row in data['rows'] if tuple(row[k] for k in KEY) not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind in (('shapes', str), ('loads', str), ('pages', int), ('query-lens', int), ('contenders', str)):
        parser.add_argument(f'--{flag}', type=lambda s, kind=kind: tuple(map(kind, s.split(','))))
    parser.add_argument('--preset',
                        help=f'{", ".join(KNOWN)}, several with commas, or all that targets are about')
    parser.add_argument('--jobs', type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)),
                        help='processes that compile first, 0: none')
    parser.add_argument('--padding-counts', action='store_true',
                        help='attend to the sequences, too, that pad a batch: what it would cost')
    parser.add_argument('--append', action='store_true', help="keep the file's rows that are not measured anew")
    parser.add_argument('--name', default='decode', help='result file name')
    parser.add_argument('--out', type=Path, default=None, help='folder of the result file')
    args = parser.parse_args()
    torch.manual_seed(0)
    Ours.padded = not args.padding_counts
    if args.preset:
        names = list(PRESETS) if args.preset == 'all' else args.preset.split(',')
        if unknown := set(names) - set(KNOWN):
            parser.error(f'no preset {", ".join(sorted(unknown))}; there are {", ".join(KNOWN)}, all')
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Preset)
                 if getattr(args, field.name)}
        presets = {name: dataclasses.replace(KNOWN[name], **given) for name in names}
    else:
        presets = {'table': Preset(args.shapes or SHAPES, args.loads or LOADS, args.pages or (64, 128),
                                   args.query_lens or (1, ), args.contenders or EVERY)}
    todo = combos(presets)
    if args.jobs:
        compile_all(to_compile(todo), args.jobs)
    rows = run(todo)
    if args.append:
        rows += earlier_rows((args.out or RESULTS) / f'{args.name}.json', rows)
    print_table(rows, COLUMNS)
    print_table(verdicts('decode', rows), VERDICT)
    print(write_results(args.name, rows, args.out))


if __name__ == '__main__':
    main()
