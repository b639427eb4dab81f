"""Compile what the launchers would launch on one GPU generation: ``python aot_compile.py CAPABILITY OUT.json``.

Run in a process without TRITON_INTERPRET (which changes what ``@triton.jit`` returns); test_aot.py reads the result: a
list of {format, kernel, case, ptx, num_warps, shared}.
"""
import json
import sys
from pathlib import Path

import torch
from aot import compile_launch, recorded

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.flatten import NewTokens, flatten
from lmdeploy_kvq.kernels.merge import merge
from lmdeploy_kvq.kernels.workspace import Workspace

DTYPE = torch.bfloat16


def batch(cache: kvq.PagedCache, tokens: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows."""
    heads = cache.num_kv_heads
    sizes = ((group * heads, cache.head_dim), (heads, cache.head_dim), (heads, cache.v_head_dim))
    query, key, value = (torch.zeros(tokens, *size, dtype=DTYPE) for size in sizes)
    return query, key, value


def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: kvq.PagedCache, layout: TokenLayout,
         query_len: int, **features: object) -> None:
    """The engine's two launches of a decode step."""
    workspace = Workspace.allocate(query, cache, layout.kv_lens.size(0), query_len)
    fill(key, value, cache, layout, workspace.inputs(query))
    out = query.new_empty(*query.shape[:2], cache.v_head_dim)
    decode(query, cache, layout.block_table, layout.kv_lens, out, query_len=query_len, sm_scale=0.1,
           workspace=workspace, filled=True, padded=True, **features)


def one_token(cache: kvq.PagedCache, sequences: int, group: int) -> tuple[torch.Tensor, ...]:
    """A decode step of as many sequences, with ``group`` query heads per KV head: query, key, value, lengths, table."""
    query, key, value = batch(cache, sequences, group)
    n, table = torch.ones(sequences, dtype=torch.int32), torch.zeros(sequences, 2, dtype=torch.int32)
    step(query, key, value, cache, TokenLayout(q_start=n, q_lens=n, kv_lens=n, block_table=table, uniform_query_len=1),
         1)
    return query, key, value, n, table


def plain(cache: kvq.PagedCache) -> None:
    """The engine's calls for a model with full attention: decode one token; prefill with history, in a piece."""
    query, key, value, n, table = one_token(cache, 4, 2)
    flatten(cache, table, n, key, value, 4, NewTokens(key, value, n, n))
    merge(query, torch.zeros(query.size(1), 4), query, torch.zeros(query.size(1), 4), query)


def crowded(cache: kvq.PagedCache) -> None:
    """A decode step of many sequences: narrow rows have programs of one warp."""
    one_token(cache, 64, 1)


def everything(cache: kvq.PagedCache) -> None:
    """Every feature at once: ragged prefill, a window, several new tokens, sizes that are no power of two."""
    query, key, value = batch(cache, 75, 7)
    n, table = torch.ones(25, dtype=torch.int64), torch.zeros(25, 2, dtype=torch.int32)
    slopes = torch.ones(query.size(1))
    step(query, key, value, cache, TokenLayout(q_start=n, q_lens=n, kv_lens=n, block_table=table), 3, window=100,
         softcap=30.0, sinks=slopes.bfloat16(), alibi_slopes=slopes)
    flatten(cache, table, n, key, value, 75, NewTokens(key, value, n, n), n)
    merge(value, torch.zeros(8, 75), value, torch.zeros(8, 75), value.float())


def explicit(cache: kvq.PagedCache) -> None:
    """The public calls that the engine does not make: slots, and flatten without new tokens."""
    _, key, value = batch(cache, 4, 2)
    kvq.reshape_and_cache(key, value, cache, torch.zeros(4, dtype=torch.int64))
    kvq.flatten(cache, torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32), DTYPE)


CASES = {plain: (64, (128, 128)), everything: (16, (80, 96)), explicit: (64, (64, 64)), crowded: (64, (64, 64))}
"""Page size and head sizes of each case."""

FIRST_AND_HOPPER = (80, 90)


def main(capability: int, out: Path) -> None:
    """Record and compile for every format: what engines do most for every GPU, the rest for the oldest and Hopper."""
    results, done = [], {}
    for fmt in kvq.FORMATS:
        for case, (block_size, dims) in CASES.items():
            if case is not plain and capability not in FIRST_AND_HOPPER:
                continue
            cache = kvq.PagedCache.allocate(fmt, 4, block_size, 8, *dims, device='cpu')
            with recorded(capability) as launches:
                case(cache)
            for kernel, args, kwargs in launches:
                same = (kernel.__name__, case) if kernel.__name__ == '_merge_kernel' else None  # formats do not matter
                compiled = done.get(same) or compile_launch(kernel, args, kwargs, capability)
                done[same] = compiled if same else None
                results.append({'format': fmt.name, 'case': case.__name__, 'kernel': kernel.__name__,
                                'ptx': compiled.asm['ptx'], 'shared': compiled.metadata.shared,
                                'num_warps': compiled.metadata.num_warps, 'maxnreg': kwargs.get('maxnreg'),
                                'block_m': kwargs.get('BLOCK_M'), 'cubin': len(compiled.asm['cubin'])})
    out.write_text(json.dumps(results))


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
