"""Random paged problems with poisoned memory, error measures, and LMDeploy in a fresh process."""
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import torch

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.formats import Codec, Encoding, KVFormat, page_shape
from lmdeploy_kvq.kernels.launch import interpreted
from lmdeploy_kvq.transforms import Transform, hadamard

MODEL = os.path.expanduser(os.environ.get('KVQ_MODEL', '~/models/smollm2'))
"""The real model of GPU tests: a folder; SmolLM2-135M-Instruct, unless ``KVQ_MODEL`` names another."""

POISON = 0xFF
"""Fills every unused byte: NaN as fp8 code (e4m3, e5m2) and as fp32 scale."""

RUN_CLI = """
from lmdeploy.cli.entrypoint import run
run()
"""
"""The command ``lmdeploy``, its arguments behind it."""


def by_name(value: object) -> str | None:
    """Test ids of formats."""
    return value.name if isinstance(value, KVFormat) else None


def covering() -> list[KVFormat]:
    """Formats that between them have every kind of encoding, which differ in what kernels do; all formats on a GPU.

    For tests of features, of which there are many: Triton's interpreter is slow. The first test of each kernel takes
    every format everywhere.
    """
    if not interpreted():
        return list(kvq.FORMATS)

    def kinds(fmt: KVFormat) -> set[tuple]:
        return {(which, e.codec.bits, e.codec.offset > 0, e.per_token_head, e.rotation is not None, e.statistic, e.rule)
                for which, e in (('key', fmt.key), ('value', fmt.value))}

    chosen: list[KVFormat] = []
    missing = set().union(*map(kinds, kvq.FORMATS))
    while missing:
        chosen.append(max(kvq.FORMATS, key=lambda fmt: len(kinds(fmt) & missing)))
        missing -= kinds(chosen[-1])
    return chosen


@dataclass
class Problem:
    """A batch of sequences in a paged cache, and the dense rows that were written.

    Attributes:
        cache: pages; every byte that holds no token is 0xFF.
        block_table: [batch, max_blocks] int32, shuffled; entries without a page name page 0, which is poisoned.
        kv_lens: [batch].
        key, value: [sum(kv_lens), kv_heads, dim], sequences one after another.
        slots: [sum(kv_lens)] int64.
        pool: [blocks, bytes] uint8 where the cache is a set of views into one pool, else None.
    """
    cache: kvq.PagedCache
    block_table: torch.Tensor
    kv_lens: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    pool: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor a write could change, scales as bytes; the whole pool where there is one."""
        if self.pool is not None:
            return [self.pool]
        scales = [s.view(torch.uint8) for s in (self.cache.k_scales, self.cache.v_scales) if s is not None]
        return [self.cache.k_codes, self.cache.v_codes, *scales]

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of :meth:`tensors`."""
        return [x.clone() for x in self.tensors()]

    def same_bytes(self, before: list[torch.Tensor]) -> bool:
        """True if no byte differs from the snapshot."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors(), before, strict=True))


def poisoned_cache(fmt: KVFormat, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, v_head_dim: int,
                   device: str, pooled: bool) -> tuple[kvq.PagedCache, torch.Tensor | None]:
    """A cache full of 0xFF: separate tensors, or views into one pool like LMDeploy's PackedBlockCacheLayout."""
    shapes = [((kv_heads, *page_shape(block_size, dim, encoding)), torch.uint8)
              for dim, encoding in ((head_dim, fmt.key), (v_head_dim, fmt.value))]
    for encoding in (fmt.key, fmt.value):
        shapes.append(((kv_heads, block_size if encoding.per_token_head else 0), torch.float32))
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
    if pooled:
        aligned = [(size + 255) // 256 * 256 for size in sizes]
        pool = torch.full((num_blocks, sum(aligned)), POISON, dtype=torch.uint8, device=device)
        starts = [sum(aligned[:i]) for i in range(len(aligned))]
        views = [pool[:, start:start + size].view(dtype).view(num_blocks, *shape)
                 for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=True)]
    else:
        pool = None
        views = [torch.empty((num_blocks, *shape), dtype=dtype, device=device) for shape, dtype in shapes]
        for view in views:
            view.view(torch.uint8).fill_(POISON)
    k_codes, v_codes, k_scales, v_scales = views
    static_k = None if fmt.key.per_token_head else torch.tensor(0.0213, device=device)
    static_v = None if fmt.value.per_token_head else torch.tensor(0.0161, device=device)
    cache = kvq.PagedCache(fmt, k_codes, v_codes, head_dim, v_head_dim, k_scales if fmt.key.per_token_head else None,
                           v_scales if fmt.value.per_token_head else None, static_k, static_v)
    return cache, pool


def problem(fmt: KVFormat, lens: list[int], *, device: str, block_size: int = 16, kv_heads: int = 2, head_dim: int = 64,
            v_head_dim: int | None = None, pooled: bool = False, k_std: float = 1.0, v_std: float = 1.0,
            dtype: torch.dtype = torch.float32, lens_dtype: torch.dtype = torch.int32, per_head_static: bool = False,
            extra_columns: int = 2, fill: bool = True, seed: int = 0) -> Problem:
    """Random sequences of the given lengths, written into a poisoned cache by the reference.

    Static scales are 0.0213 and 0.0161 times the standard deviations, or differ per head with ``per_head_static``.
    ``extra_columns`` columns of the block table belong to nobody, and its rows are strided.
    """
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    pages = [-(-n // block_size) for n in lens]
    num_blocks = sum(pages) + 3
    cache, pool = poisoned_cache(fmt, num_blocks, block_size, kv_heads, head_dim, v_head_dim, device, pooled)
    heads = torch.linspace(0.7, 1.9, kv_heads, device=device) if per_head_static else torch.ones((), device=device)
    if cache.k_static_scale is not None:
        cache.k_static_scale = cache.k_static_scale * k_std * heads
    if cache.v_static_scale is not None:
        cache.v_static_scale = cache.v_static_scale * v_std * heads.flip(0) if per_head_static else (
            cache.v_static_scale * v_std)

    order = torch.randperm(num_blocks - 1, generator=generator) + 1  # page 0 is nobody's, as in LMDeploy
    width = max(pages, default=0) + extra_columns
    table = torch.zeros((len(lens), width + 1), dtype=torch.int32)
    slots, used = [], 0
    for row, (n, count) in enumerate(zip(lens, pages, strict=True)):
        table[row, :count] = order[used:used + count]
        position = torch.arange(n)
        slots.append(table[row, position // block_size].long() * block_size + position % block_size)
        used += count
    key = (torch.randn(sum(lens), kv_heads, head_dim, generator=generator) * k_std).to(dtype).to(device)
    value = (torch.randn(sum(lens), kv_heads, v_head_dim, generator=generator) * v_std).to(dtype).to(device)
    slot_mapping = torch.cat(slots).to(device) if slots else torch.empty(0, dtype=torch.int64, device=device)
    if fill:
        reference.reshape_and_cache(key, value, cache, slot_mapping)
    return Problem(cache, table.to(device)[:, :width], torch.tensor(lens, dtype=lens_dtype, device=device), key, value,
                   slot_mapping, pool)


def frobenius(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error."""
    x, expected = x.double(), expected.double()
    return ((x - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def finite(x: torch.Tensor) -> bool:
    """True if no element is NaN or infinite."""
    return bool(x.isfinite().all())


def default_transform(encoding: Encoding, dim: int) -> Transform | None:
    """What an encoding multiplies rows of ``dim`` elements with if nothing else is given: Hadamard, or None."""
    return None if encoding.rotation is None else hadamard(dim)


def grid(codec: Codec) -> torch.Tensor:
    """Every finite value codes of ``codec`` stand for within its range, ascending, without repetition."""
    values = reference.decode_codes(torch.arange(2**codec.bits, dtype=torch.int32).to(torch.uint8), codec)
    return values[values.isfinite() & (values.abs() <= codec.qmax)].unique()


def steps_apart(codes: torch.Tensor, others: torch.Tensor, codec: Codec) -> torch.Tensor:
    """How many representable values lie between two sets of codes (0: the same value). All must be finite."""
    values = grid(codec)
    first, second = (reference.decode_codes(c.cpu(), codec) for c in (codes, others))
    assert torch.isin(first, values).all() and torch.isin(second, values).all(), 'a code stands for no finite value'
    return (torch.searchsorted(values, first) - torch.searchsorted(values, second)).abs()


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (fp32) as a kernel stores it: rounded to nearest, but cut to bf16 in Triton's interpreter, which has no
    rounding there (``InterpreterBuilder.cast_impl`` calls ``_convert_float`` without a rounding mode)."""
    if dtype == torch.bfloat16 and interpreted():
        return (x.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return x.to(dtype)


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables of this suite and of lmdeploy_kvq."""
    return {k: v for k, v in os.environ.items() if not k.startswith(('LMDEPLOY_KVQ', 'TRITON_INTERPRET'))}


def python(code: str, *argv: str, timeout: float = 120, check: bool = True, cwd: str | None = None,
           **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, without this suite's Triton and lmdeploy_kvq environment.

    Raises:
        AssertionError: it exited with an error (``check`` only); carries what it printed.
    """
    done = subprocess.run([sys.executable, '-c', code, *argv], check=False, capture_output=True, text=True,
                          timeout=timeout, cwd=cwd, env={**clean_environment(), **env})
    assert not check or done.returncode == 0, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done
