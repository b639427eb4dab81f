"""Small launches of every kernel, for sanitize.py: compared with the reference, and with themselves.

Pages that nobody owns, the ends of block tables and the rows behind the last token are 0xFF, as in the tests.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from lmdeploy_kvq import KVFormat, flatten, reference
from lmdeploy_kvq.kernels.combine import FAN
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.fill import DecodeInputs, TokenLayout, fill
from lmdeploy_kvq.kernels.flatten import NewTokens
from lmdeploy_kvq.kernels.flatten import flatten as flatten_into
from lmdeploy_kvq.kernels.merge import merge
from lmdeploy_kvq.kernels.queries import QUERY_TAIL
from lmdeploy_kvq.kernels.workspace import DecodeConfig, Workspace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from helpers import frobenius, problem

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LENS = [37, 0, 130, 1, 64]
SHAPES = {'64': (64, None, 64), '128/64 pages of 16': (128, 64, 16), '80': (80, None, 32), '256': (256, None, 64)}
"""Name: head size of K, of V (None: the same), tokens of a page."""

TREES = {'one program': (1, 700), 'one level': (FAN.value // 2, 700), 'two levels': (FAN.value * 3 // 2, 700),
         'three levels': (FAN.value**2 + 44, 9000)}
"""Name: programs per KV head, tokens of the longest sequence; FAN results are combined at a time."""


def launches(fmt: KVFormat) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Name and function of every launch; the function takes how often it is repeated, where its timing matters."""
    for name, shape in SHAPES.items():
        yield f'fill, heads of {name}', partial(_fill, fmt, *shape)
        yield f'flatten, heads of {name}', partial(_flatten, fmt, *shape)
        yield f'decode, heads of {name}', partial(_decode, fmt, *shape)
        yield f'step, heads of {name}', partial(_decode, fmt, *shape, behind_fill=True)
    yield 'decode of 5 tokens, window, softcap, sinks', partial(_decode_features, fmt)
    for name, (programs, longest) in TREES.items():
        yield f'decode, {name}', partial(_decode, fmt, 64, None, 64, programs=programs, longest=longest)
    yield 'decode of 3 tokens, two levels', partial(_decode, fmt, 64, None, 64, programs=24, query_len=3)
    yield 'merge', partial(_merge, fmt)


def _problem(fmt: KVFormat, dim: int, v_dim: int | None, page: int, **changes):
    return problem(fmt, LENS, device=DEVICE, head_dim=dim, v_head_dim=v_dim, block_size=page, pooled=True,
                   dtype=torch.bfloat16, **changes)


def _fill(fmt: KVFormat, dim: int, v_dim: int | None, page: int, repeats: int) -> None:
    """A prefill's, by LMDeploy's description of a batch, with queries to rotate; then tokens with given slots."""
    p = _problem(fmt, dim, v_dim, page, fill=False)
    lens = p.kv_lens
    query = torch.randn(p.key.size(0), 6, dim, device=DEVICE, dtype=torch.bfloat16)
    rotated = torch.empty((*query.shape[:2], query.size(2) + QUERY_TAIL.value), dtype=torch.float16, device=DEVICE) \
        if p.cache.k_transform is not None else None
    counters = torch.full((300, ), 7, dtype=torch.int32, device=DEVICE)
    inputs = DecodeInputs(counters, query if rotated is not None else None, rotated)
    layout = TokenLayout(q_start=lens.cumsum(0) - lens, q_lens=lens, kv_lens=lens, block_table=p.block_table)
    fill(p.key, p.value, p.cache, layout, inputs)
    assert not counters.any(), 'counters are not zeroed'
    for x, raw in zip(reference.flatten(p.cache, p.block_table, lens, torch.float32), (p.key, p.value)):
        assert frobenius(x, raw) <= 1.2 * fmt.max_error, 'what was written is not what was given'
    slots = p.slots.clone()
    slots[::3] = -1
    fill(p.key, p.value, p.cache, TokenLayout(slots=slots))


def _flatten(fmt: KVFormat, dim: int, v_dim: int | None, page: int, repeats: int) -> None:
    """All of it; then parts, with new tokens as they came."""
    p = _problem(fmt, dim, v_dim, page)
    found, expected = (f(p.cache, p.block_table, p.kv_lens, torch.float32) for f in (flatten, reference.flatten))
    assert all(frobenius(x, y) < 2e-3 for x, y in zip(found, expected)), 'not what the reference decodes'
    q_lens = p.kv_lens.clamp(max=5)
    new = NewTokens(*(torch.randn(int(q_lens.sum()), 2, x.size(2), device=DEVICE, dtype=torch.bfloat16)
                      for x in (p.key, p.value)), q_lens.cumsum(0) - q_lens, q_lens)
    total = int(p.kv_lens.sum()) + 7
    outs = [torch.empty(total, 2, x.size(2), device=DEVICE, dtype=torch.bfloat16) for x in (p.key, p.value)]
    flatten_into(p.cache, p.block_table, p.kv_lens, *outs, total, new=new, first=(p.kv_lens - 40).clamp(min=0))
    assert not outs[0][int(p.kv_lens.clamp(max=40).sum()):].any(), 'rows behind the last token are not zeros'


def _repeat(repeats: int, launch: Callable[[], tuple[torch.Tensor, ...]], expected: Callable[[], torch.Tensor],
            bound: float, what: str) -> None:
    """Launch again and again: the first result against the expected one, every other against the first, bit by bit."""
    first = launch()
    assert frobenius(first[0], expected()) < bound, what
    for _ in range(repeats - 1):
        assert all(torch.equal(x, y) for x, y in zip(launch(), first, strict=True)), 'two launches differ'


def _decode(fmt: KVFormat, dim: int, v_dim: int | None, page: int, repeats: int, *, programs: int | None = None,
            query_len: int = 1, longest: int = 700, behind_fill: bool = False, **features) -> None:
    """Attention to prepared queries; or an engine's step, which begins when a fill has ended, and reads its tokens."""
    p = problem(fmt, [max(n, query_len) if n else 0 for n in (longest, 0, 130, 1, 64)], device=DEVICE, head_dim=dim,
                v_head_dim=v_dim, block_size=page, pooled=True, dtype=torch.bfloat16)
    batch = p.kv_lens.numel()
    query = torch.randn(batch * query_len, 6, dim, device=DEVICE, dtype=torch.float16)
    config = None if programs is None else DecodeConfig(32, 1, num_warps=2, programs=programs)
    how = {'query_len': query_len, 'sm_scale': dim**-0.5, **features}
    newest, ones = p.kv_lens.cumsum(0) - 1, torch.ones_like(p.kv_lens)
    key, value = p.key[newest], p.value[newest]  # of one token; nothing is written for an empty sequence
    layout = TokenLayout(q_start=ones.cumsum(0) - 1, q_lens=ones, kv_lens=p.kv_lens, block_table=p.block_table,
                         uniform_query_len=1)

    def launch() -> tuple[torch.Tensor]:
        out = torch.full((*query.shape[:2], v_dim or dim), float('nan'), device=DEVICE, dtype=torch.float16)
        workspace = Workspace.allocate(query, p.cache, batch, query_len, config)
        for memory in (workspace.partial, workspace.rotated):
            if memory is not None:
                memory.fill_(float('nan'))  # what nobody leaves must not be read
        workspace.counters.fill_(7)
        if behind_fill:
            fill(-key, -value, p.cache, layout)
            fill(key, value, p.cache, layout, workspace.inputs(query))
        else:
            workspace.prepare(query, p.cache)
        decode(query, p.cache, p.block_table, p.kv_lens, out, workspace=workspace, filled=behind_fill,
               padded=behind_fill, **how)
        assert not workspace.counters.any(), 'counters are not as they were'
        return (out, )

    _repeat(repeats, launch, lambda: reference.paged_attention(query.float(), p.cache, p.block_table, p.kv_lens, **how),
            2e-3, 'not what the reference attends to')


def _decode_features(fmt: KVFormat, repeats: int) -> None:
    sinks = torch.linspace(-1, 1, 6, device=DEVICE)
    _decode(fmt, 64, None, 64, repeats, query_len=5, window=50, softcap=20.0, sinks=sinks)


def _merge(fmt: KVFormat, repeats: int) -> None:
    """Attention over two sets of keys, beside them and in place; it knows no formats."""
    lse = torch.randn(2, 6, 245, device=DEVICE)
    lse[0, :, 3], lse[1, :, 4] = float('-inf'), float('inf')
    parts = torch.randn(2, 245, 6, 64, device=DEVICE, dtype=torch.bfloat16)
    weights = torch.where(lse == float('inf'), -lse, lse).softmax(0).transpose(1, 2)[..., None]
    expected = (weights * parts.float()).sum(0)

    def launch(in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
        running, running_lse = parts[0].clone(), lse[0].clone()
        out = running if in_place else torch.empty(expected.shape, device=DEVICE)
        merge(running, running_lse, parts[1], lse[1], out)
        return out, running_lse

    for in_place, bound in ((False, 1e-5), (True, 2**-8)):  # out is fp32, or bf16
        _repeat(repeats, partial(launch, in_place), lambda: expected, bound, 'not the attention over both')
