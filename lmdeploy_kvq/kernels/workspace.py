"""How decode is launched, and the memory that a launch needs."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from .combine import FAN, STATISTICS
from .fill import DecodeInputs, TokenLayout, fill
from .launch import multiprocessors, shared_memory
from .queries import QUERY_TAIL

if TYPE_CHECKING:
    from ..paged import PagedCache


LEAD = 8
"""Programs that do not count when they are spread over multiprocessors one by one: a Hopper GPU of 132 starts the first
eight on eight of them, and then one on each in turn, these included."""

MANY = 128
"""Sequences times KV heads from which on programs of one warp are faster, where a token has less than 128 bytes; where
it has 128, four times as many."""


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters of the decode kernel; they change speed, never results beyond rounding.

    Attributes:
        block_n: tokens per step.
        occupancy: programs that a multiprocessor is given, i.e. holds at once with these registers and this shared
            memory (tests/test_aot.py checks it): all run at once, each with an equal share of the work.
        maxnreg: register limit per thread, None for the compiler's choice.
        programs: programs per KV head; None for as many as run at once.
    """
    block_n: int
    occupancy: int
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    programs: int | None = None

    @property
    def warps(self) -> int:
        """Warps that have tokens of a tile, 16 or more each."""
        return min(self.num_warps, self.block_n // 16)


def _token_bytes(cache: PagedCache) -> int:
    """Bytes that a token has in a tile of K and in one of V."""
    sizes = cache.sizes()
    return sizes['BLOCK_P'] + sizes['BLOCK_PV']


def default_config(cache: PagedCache, block_m: int, batch: int, grid_heads: int) -> DecodeConfig:
    """Launch parameters for a cache, its GPU, query rows per program, sequences, and KV heads times tiles of rows.

    The same for all numbers of sequences up to the next power of two, to which CUDA graphs pad them: other launch
    parameters would be another order of sums.

    From sweeps on an H200 (scripts/tune_decode.py, docs/performance.md): about 13 MB of tiles on their way to all of
    its multiprocessors, not more. Two warps with registers for all that combines results; with 168 or fewer it spills.
    Programs of one warp wait for nobody, but leave four times as many results, and combine few at a time: for narrow
    rows, where many sequences make good for it.
    """
    sizes, row = cache.sizes(), _token_bytes(cache)
    many = grid_heads * triton.next_power_of_2(batch)
    whole = sizes['PARTS'] * sizes['PARTSV'] == 1  # a byte is a code
    if block_m > 16:
        config = DecodeConfig(64, occupancy=4, num_warps=2, num_stages=3 if whole and row <= 256 else 2)
    elif block_m > 8:
        config = DecodeConfig(128 if row <= 256 else 64, occupancy=4, num_warps=2)
    elif row <= 128 and many >= (MANY if row < 128 else 4 * MANY):
        config = DecodeConfig(64, occupancy=12 if whole else 8, num_warps=1, num_stages=2 if whole else 3,
                              maxnreg=168 if whole or row < 128 else None)
    elif row <= 128 and whole and batch == 1:
        config = DecodeConfig(64, occupancy=6, num_warps=2, num_stages=3, maxnreg=168)
    elif row <= 256:
        config = DecodeConfig(64, occupancy=4, num_warps=2, num_stages=3)
    else:
        config = DecodeConfig(64, occupancy=3, maxnreg=168)
    # Beside tiles of K and V, scales and what crosses warps, and 1 KiB for the driver: GPUs without 228 KiB hold fewer
    # programs.
    crossing = 2560 if config.num_warps == 1 else 512 * block_m
    if block_m > 8 and sizes['PARTSV'] == 4:
        crossing += 8192
    need = (config.num_stages - 1) * config.block_n * row + crossing + 1024
    occupancy = max(1, min(config.occupancy, shared_memory(cache.k_codes.device) // need))
    return dataclasses.replace(config, occupancy=occupancy)


@dataclass(frozen=True)
class Workspace:
    """What a decode launch needs, sized by lengths of the batch that the host knows, from one allocation.

    Attributes:
        made_for: sequences, query tokens and query heads that its sizes fit.
        config, target, block_m: launch parameters, programs per KV head and tile of rows, and rows of a tile.
        division: ``each``, ``most`` and ``lead``: programs per KV head and tile of rows that make four warps on each
            multiprocessor; tiles up to which no more than twice as many work, or all of sequences of various lengths
            (:func:`~lmdeploy_kvq.kernels.tiles.program_share`); and programs that get work last, for LEAD.
        partial: fp32 [(target + batch) * kv_heads * rows + block_m, PARTIAL]; combining reads past the last row.
        counters: int32, zero before the kernel begins and after it has ended.
        rotated: the query as the fill leaves it for formats that rotate K, or None.
    """
    made_for: tuple[int, int, int]
    config: DecodeConfig
    target: int
    block_m: int
    division: tuple[int, int, int]
    partial: torch.Tensor
    counters: torch.Tensor
    rotated: torch.Tensor | None

    @classmethod
    def allocate(cls, query: torch.Tensor, cache: PagedCache, batch: int, query_len: int,
                 config: DecodeConfig | None = None) -> Workspace:
        """From PyTorch's caching allocator; reads no lengths, so that a launch can be captured in a CUDA graph."""
        kv_heads = cache.num_kv_heads
        rows = query.size(1) // kv_heads * query_len
        block_m = min(max(8, triton.next_power_of_2(rows)), 32)
        grid_heads = kv_heads * triton.cdiv(rows, block_m)
        config = config or default_config(cache, block_m, batch, grid_heads)
        sms = multiprocessors(query.device)
        target = config.programs or max(1, config.occupancy * sms // grid_heads)
        each = max(1, sms * 4 // (config.num_warps * grid_heads))
        sizes = cache.sizes()
        levels = 1
        while FAN.value**levels < target:  # of the tree in which results are combined
            levels += 1
        row = query.size(2) + QUERY_TAIL.value
        parts = [query.size(0) * query.size(1) * row // 2 if cache.k_transform is not None else 0,
                 ((target + batch) * kv_heads * rows + block_m) * (sizes['PARTSV'] * sizes['PARTV'] + STATISTICS.value),
                 levels * (target + batch) * grid_heads]
        memory = torch.empty(sum(parts), dtype=torch.float32, device=query.device)
        rotated, partial, counters = memory.split(parts)
        wide = _token_bytes(cache) >= 256 and batch > 1
        division = each, each * (64 if wide else 32), triton.cdiv(LEAD, grid_heads) % target
        return cls((batch, *query.shape[:2]), config, target, block_m, division, partial, counters.view(torch.int32),
                   rotated.view(torch.float16).view(*query.shape[:2], row) if cache.k_transform is not None else None)

    def prepare(self, query: torch.Tensor, cache: PagedCache) -> Workspace:
        """Do what :func:`~lmdeploy_kvq.kernels.fill.fill` does, where nothing is to be filled."""
        fill(None, None, cache, TokenLayout(), self.inputs(query))
        return self

    def combining(self, cache: PagedCache, rows: int) -> dict[str, int]:
        """Columns of results that a program combines, and results at a time: as many as 64 registers per lane hold.

        Half as many in programs of one warp, whose registers would spill. PIECES: results that short sequences leave at
        most.
        """
        sizes, warps = cache.sizes(), self.config.num_warps
        columns = min(self.block_m, triton.next_power_of_2(rows))
        most = 64 * 32 * warps // (columns * sizes['BLOCK_PV'] * sizes['PARTSV'])
        return {'COLUMNS': columns, 'AT_ONCE': max(1, min(FAN.value, most // 2 if warps == 1 else most)),
                'PIECES': max(2, min(FAN.value, 2 * most))}

    def inputs(self, query: torch.Tensor) -> DecodeInputs:
        """What :func:`~lmdeploy_kvq.kernels.fill.fill` has to prepare."""
        return DecodeInputs(self.counters, None if self.rotated is None else query, self.rotated)
