"""Static scales found while serving: the first tokens are attended to as they came, then the scales are set for good.

While scales are pending, nothing is written to the pages. Every layer keeps K and V of the tokens served so far in a
log, in the model's dtype, and a table says which row of the log a slot of the pages stands for: attention gathers its
history from there, in prefill and decoding alike. The step that no longer fits the log sets the scales, one layer after
the other, from all that was seen, its own tokens included; the log's rows are encoded into the slots they stand for,
and the layer goes on as ever. So no page is read with another scale than it was written with: sequences in flight and
the prefix cache stay as they are, and the scheduler need not know. CUDA graphs are captured when the engine starts and
read the scales from buffers that are filled in place; until then they are not replayed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..formats import KVFormat
from ..kernels.fill import TokenLayout, fill
from ..kvstats import METHODS, LayerStatistics
from ..paged import PagedCache
from ..scales import ScaleError
from .asked import Request
from .prefill import PIECE_BYTES, dense_attention

ATTRIBUTE = 'lmdeploy_kvq_pending'
"""What we add to an attention implementation: its :class:`PendingLayer`. And to a step's metadata: its plan."""

METHOD = METHODS[0]
"""How scales follow from what was seen: the largest value; fp8 loses nothing to a scale that is too large."""

T = TypeVar('T')


# ---- what the layers of a step share


@dataclass(frozen=True)
class _Part:
    """Some sequences of a step; in the place of a prefill's metadata for the engine's dense attention.

    Attributes:
        queries: the sequences' new tokens.
        rows: [tokens] rows of the log that are their K and V; None: the new tokens alone, as they came.
        cu_seqlens_q, cu_seqlens_k: int32 offsets of the sequences.
    """
    queries: slice
    rows: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q_seqlen: int
    max_kv_seqlen: int
    is_decoding: bool = False


@dataclass(frozen=True)
class _Plan:
    """What all layers of a step do.

    Attributes:
        new: tokens; rows of Q, K and V behind them are padding.
        first: bool [new], the first token of a sequence.
        base: row of the log for the first new token; None: they do not fit, and scales are set.
        parts: how to attend.
        slots, rows: [logged] slots of the pages that the log has rows for, and the rows, when scales are set.
    """
    new: int
    first: torch.Tensor
    base: int | None = None
    parts: tuple[_Part, ...] = ()
    slots: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def _cumulative(lens: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lens], device=device).cumsum(0, dtype=torch.int32)


def _groups(kv_lens: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences, as many at a time as have at most ``limit`` cached tokens, and one at least."""
    first, total = 0, 0
    for last, length in enumerate(kv_lens):
        if last > first and total + length > limit:
            yield first, last
            first, total = last, 0
        total += length
    yield first, len(kv_lens)


def _parts(q_lens: list[int], kv_lens: list[int], rows: torch.Tensor, limit: int) -> Iterator[_Part]:
    """A step's sequences in parts of at most ``limit`` gathered rows; rows: [sum(kv_lens)] of the log."""
    if q_lens == kv_lens:  # nobody has a history
        cu_seqlens = _cumulative(q_lens, rows.device)
        yield _Part(slice(0, sum(q_lens)), None, cu_seqlens, cu_seqlens, max(q_lens), max(kv_lens))
        return
    for first, last in _groups(kv_lens, limit):
        (q, q_start), (kv, kv_start) = ((lens[first:last], sum(lens[:first])) for lens in (q_lens, kv_lens))
        yield _Part(slice(q_start, q_start + sum(q)), rows[kv_start:kv_start + sum(kv)], _cumulative(q, rows.device),
                    _cumulative(kv, rows.device), max(q), max(kv))


# ---- layers


class PendingLayer:
    """One attention layer whose scales are pending.

    Attributes:
        key, value: the log, [capacity, kv_heads, head_dim or v_head_dim] in the model's dtype.
        seen: statistics of this rank's heads.
    """

    def __init__(self, owner: Calibration, name: str, module: Any, dtype: torch.dtype):
        impl, device = module.impl, module.k_scale.device
        self.owner, self.name, self.module = owner, name, module
        self.key, self.value = (torch.empty((owner.request.tokens, impl.num_kv_heads, dim), dtype=dtype, device=device)
                                for dim in (impl.head_size, impl.v_head_size))
        self.seen = LayerStatistics.empty(impl.num_kv_heads, impl.head_size, device)
        setattr(impl, ATTRIBUTE, self)

    def drop(self) -> None:
        """Give the log back; the layer's attention is as ever."""
        delattr(self.module.impl, ATTRIBUTE)
        for log in (self.key, self.value):
            if log.is_cuda:  # it was made on another stream, which must not have it back before this one has read it
                log.record_stream(torch.cuda.current_stream(log.device))
        del self.key, self.value

    @torch.inference_mode()
    def forward(self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, cache: PagedCache,
                meta: Any, sink: torch.Tensor | None) -> torch.Tensor | None:
        """Attention of a step to what was served so far, as it came.

        Args:
            query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim or v_head_dim].
            cache: the layer's pages, written when the scales are set.
            meta: LMDeploy's metadata of the step.
            sink: [heads] one extra logit per head, or None.

        Returns:
            [tokens, heads, v_head_dim]; None once the scales are set: the new tokens are still to be written, and
            attention is the usual one.
        """
        if key is None or value is None:
            raise RuntimeError(f'{self.name} attends to the cache of another layer, which --kv-calibrate does not '
                               'support; run lmdeploy-kvq calibrate before serving')
        plan = self.owner.plan(meta, cache, query.element_size())
        rows = query.size(0)
        query, key, value = (x[:plan.new] for x in (query, key, value))
        # one request's NaN is its own affair
        self.seen.update(query.nan_to_num(0.0), key.nan_to_num(0.0), value.nan_to_num(0.0), plan.first)
        if plan.base is None:
            self._settle(cache, plan)
            return None
        self.key[plan.base:plan.base + plan.new] = key
        self.value[plan.base:plan.base + plan.new] = value
        out = query.new_zeros((rows, query.size(1), value.size(2)))
        for part in plan.parts:
            k, v = (key, value) if part.rows is None else (self.key[part.rows], self.value[part.rows])
            out[part.queries] = dense_attention(self.module.impl, query[part.queries], k, v, part, part.cu_seqlens_k,
                                                sink)
        return out

    def _settle(self, cache: PagedCache, plan: _Plan) -> None:
        """Set this layer's scales and encode the log into the pages."""
        self.owner.settle(self)
        fill(self.key[plan.rows], self.value[plan.rows], cache, TokenLayout(slots=plan.slots))
        self.drop()


@dataclass
class Found:
    """What a layer's scales are, of the whole model, on the CPU.

    Attributes:
        key, value: fp32 scale, [] or [kv_heads].
        statistics: what a scale file keeps beside them, see :meth:`LayerStatistics.tensors`.
        tokens: seen.
    """
    key: torch.Tensor
    value: torch.Tensor
    statistics: dict[str, torch.Tensor]
    tokens: int


class Calibration:
    """The pending scales of a model, on one rank.

    Attributes:
        active: a step of the engine is running that is no warm-up.
        tokens: in the log.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module], fmt: KVFormat, request: Request, dtype: torch.dtype,
                 apply: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], None],
                 finish: Callable[[dict[str, Found]], None], group: dist.ProcessGroup | None = None,
                 replicas: int = 1):
        """Allocate the logs; the model's attention is watched from now on.

        Args:
            layers: attention modules by name.
            fmt: the format served.
            request: what is asked for.
            dtype: the model's.
            apply: fills a module's buffers with a K and a V scale of the whole model.
            finish: is told what was found, at the end of the step that sets the scales.
            group: the ranks among which heads are split, or None.
            replicas: ranks that have the same KV head.

        Raises:
            ScaleError: the logs do not fit the GPU.
        """
        self.fmt, self.request, self.apply, self.finish = fmt, request, apply, finish
        self.group, self.replicas = group, replicas
        self.active, self.tokens = False, 0
        self.place: torch.Tensor | None = None  # [slots of the pages] row of the log, -1: none
        self.settled: list[PendingLayer] = []
        self.scales: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.layers: list[PendingLayer] = []
        try:
            for name, module in layers.items():
                self.layers.append(PendingLayer(self, name, module, dtype))
        except torch.OutOfMemoryError as error:
            self.drop()
            raise ScaleError(f'--kv-calibrate {request.tokens}: K and V of as many tokens do not fit the GPU beside '
                             'the model; lower it') from error

    @property
    def nbytes(self) -> int:
        """Bytes of the logs."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.key, layer.value))

    def drop(self) -> None:
        """Give all logs back without scales."""
        for layer in self.layers:
            if layer not in self.settled:
                layer.drop()
        self.layers = []

    def step(self, forward: Callable[[], T]) -> T:
        """Run a step of the engine; the one that sets the scales tells ``finish``."""
        self.active = True
        try:
            output = forward()
        finally:
            self.active = False
        if self.settled:
            self.finish(self._found())
            self.drop()
        return output

    def plan(self, meta: Any, cache: PagedCache, element_size: int) -> _Plan:
        """A step's plan, made by the first layer that asks, and kept with the step's metadata.

        Args:
            meta: LMDeploy's metadata of the step, a new one per step.
            cache: a layer's pages.
            element_size: bytes of an element of K and V.
        """
        kept = getattr(meta, ATTRIBUTE, None)
        if kept is None:
            kept = self._plan(meta, cache, element_size)
            setattr(meta, ATTRIBUTE, kept)
        return kept

    def _plan(self, meta: Any, cache: PagedCache, element_size: int) -> _Plan:
        page, device = cache.block_size, meta.kv_seqlens.device
        q_lens, kv_lens = meta.q_seqlens.tolist(), meta.kv_seqlens.tolist()
        new, starts = sum(q_lens), _cumulative(q_lens, device)[:-1].long()
        first = torch.zeros(new, dtype=torch.bool, device=device)
        first[starts[meta.kv_seqlens == meta.q_seqlens]] = True
        if self.place is None:
            self.place = torch.full((cache.num_blocks * page, ), -1, dtype=torch.int32, device=device)
        if self.tokens + new > self.request.tokens:
            slots = (self.place >= 0).nonzero()[:, 0]
            return _Plan(new, first, slots=slots, rows=self.place[slots].long())
        base, self.tokens = self.tokens, self.tokens + new
        sequence = torch.arange(len(kv_lens), device=device).repeat_interleave(meta.kv_seqlens)
        position = torch.arange(sum(kv_lens), device=device) - _cumulative(kv_lens, device)[sequence]
        slots = meta.block_offsets[sequence, position // page].long() * page + position % page
        is_new = position >= (meta.kv_seqlens - meta.q_seqlens)[sequence]
        self.place[slots[is_new]] = torch.arange(base, base + new, dtype=torch.int32, device=device)
        rows = self.place[slots].long()
        if bool((rows < 0).any()):
            raise RuntimeError('a sequence has pages that were not written in this engine since it started; run '
                               'lmdeploy-kvq calibrate before serving, and serve without --kv-calibrate')
        limit = PIECE_BYTES // (cache.num_kv_heads * (cache.head_dim + cache.v_head_dim) * element_size)
        return _Plan(new, first, base, tuple(_parts(q_lens, kv_lens, rows, limit)))

    def settle(self, layer: PendingLayer) -> None:
        """Set one layer's scales from what it has seen: the same on every rank, or those of its heads."""
        found = layer.seen.scales(self.fmt, METHOD, self.request.granularity, 100.0)
        k, v = (self._heads(x) if x.dim() else self._largest(x) for x in found)
        self.apply(layer.module, k, v)
        self.scales[layer.name] = k.cpu(), v.cpu()
        self.settled.append(layer)

    def _largest(self, x: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[heads of this rank, ...] to [heads of the model, ...]."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts[::self.replicas])

    def _found(self) -> dict[str, Found]:
        return {layer.name: Found(*self.scales[layer.name],
                                  {name: self._heads(x).cpu() for name, x in layer.seen.tensors().items()},
                                  layer.seen.tokens)
                for layer in self.settled}
