"""How often static scales are too small: the share of codes at the format's limit, sampled while serving.

Every few steps the newest full pages of some sequences are read for one layer, after the step, on its stream and not in
its CUDA graphs, and counted on the device. The server asks its engine for the scheduler's metrics every ten seconds,
in its own process or across to the engine's; the counts travel with the answer, and LMDeploy's metrics endpoint shows
them. Where nobody asks (metrics are off, a pipeline), nothing is sampled.

Models that run in processes of their own (tensor parallelism, Ray) cannot be asked. There the first rank samples its
own heads, asked or not, and its counts reach the engine with the output of a step.
"""
from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import Codec, KVFormat, find_format
from ..reference import encode_codes

EVERY = 64
"""Steps from one sample to the next. A sample is of one layer, all layers take turns."""

PAGES = 4
"""Pages in a sample: the newest full one of as many sequences."""

ATTRIBUTE = 'lmdeploy_kvq_saturation'
"""What we add to two objects of LMDeploy: the sampler of a cache to its CacheConfig (the scheduler and the cache engine
share it where they share the process, a draft model's cache has another), the counts to each ScheduleMetrics (pickled
with everything it has on its way to the server)."""

HOME = 'lmdeploy_kvq_home'
"""What we add to the CacheConfig of a format with static scales, before workers get copies of it: its PROCESS."""

PROCESS = uuid.uuid4().hex
"""This process, as no other calls itself."""

Counts = list[list[list[int]]]
"""Per layer, of K and of V: codes at the limit, and codes in all."""


def limit_codes(codec: Codec) -> tuple[int, int]:
    """Codes of the largest and of the smallest value that a format stores."""
    high, low = encode_codes(torch.tensor([codec.qmax, -codec.qmax]), codec).tolist()
    return high, low


class _Tally:
    """Counts on the device, and what of them has arrived on the host.

    Attributes:
        counts: int64 [layers, 2 (K, V), 2 (at the limit, in all)] on the device.
        latest: the same on the host, a little behind.
    """

    def __init__(self, num_layers: int, device: torch.device):
        self.counts = torch.zeros(num_layers, 2, 2, dtype=torch.int64, device=device)
        self.host = torch.zeros(self.counts.shape, dtype=torch.int64, pin_memory=device.type == 'cuda')
        self.copied = torch.cuda.Event() if device.type == 'cuda' else None
        self.latest = self.host.clone()

    def copy(self) -> None:
        """Take what the last copy brought, and start the next; nothing waits."""
        if self.copied is None:
            self.latest = self.counts.clone()
        elif self.copied.query():  # also before the first one
            self.latest = self.host.clone()
            self.host.copy_(self.counts, non_blocking=True)
            self.copied.record()


class Sampler:
    """Counts the codes of one engine's cache, of which it keeps nothing: a sleeping engine gives its pages back."""

    def __init__(self, fmt: KVFormat, remote: bool = False):
        self.remote = remote  # the engine is in another process
        self.limits = [limit_codes(encoding.codec) for encoding in (fmt.key, fmt.value)]
        self.step_number = 0
        self.fresh = False  # there are counts that nobody has sent
        self.tally: _Tally | None = None  # until the first step, which knows layers and device

    @property
    def latest(self) -> Counts | None:
        """Counts since the first step, a little behind the device; None before it."""
        return None if self.tally is None else self.tally.latest.tolist()

    def due(self) -> bool:
        """Whether the step that has just been done is one of those that are sampled. To be asked once per step."""
        self.step_number += 1
        return (self.step_number - 1) % EVERY == 0

    @torch.inference_mode()
    def sample(self, caches: Sequence[Sequence[torch.Tensor]], block_offsets: torch.Tensor, kv_lens: torch.Tensor,
             block_size: int) -> None:
        """After a step of the engine that is :meth:`due`; on its stream.

        Args:
            caches: per layer K pages and V pages, uint8 [blocks, ...], and what else a layer has.
            block_offsets: [batch, max_blocks] page ids, on the device.
            kv_lens: [batch] tokens in the cache, on the device.
            block_size: tokens per page.
        """
        if self.tally is None:
            self.tally = _Tally(len(caches), caches[0][0].device)
        layer, counts = (self.step_number - 1) // EVERY % len(caches), self.tally.counts
        full = (kv_lens[:PAGES] // block_size).clamp(max=block_offsets.size(1))
        page = block_offsets[:PAGES].gather(1, (full - 1).clamp(min=0)[:, None].long())[:, 0].long()
        for which, limits in enumerate(self.limits):
            codes = caches[layer][which][page].flatten(1)
            hits = ((codes == limits[0]) | (codes == limits[1])).sum(1)
            counts[layer, which, 0] += (hits * (full > 0)).sum()
            counts[layer, which, 1] += (full > 0).sum() * codes.size(1)
        self.tally.copy()
        self.fresh = True


def _counted(cache_config: Any) -> KVFormat | None:
    """A cache's format if its codes are counted: where scales follow the values, a code per row is at the limit."""
    fmt = find_format(cache_config.quant_policy)
    return fmt if fmt is not None and fmt.needs_scales else None


# In the process of the model.

class Stamp(float):
    """The time of an output, and counts: of all that an output has, only plain values cross processes as they are."""
    counts: Counts | None = None


def _worker(cache_config: Any) -> Sampler | None:
    """The sampler of a model in a process of its own; None on ranks whose outputs nobody reads."""
    from lmdeploy.pytorch.distributed import get_dist_manager
    fmt, context = _counted(cache_config), get_dist_manager().current_context()
    first = not getattr(context.attn_tp_group, 'rank', context.rank)
    sampler = Sampler(fmt, remote=True) if fmt is not None and first else None
    setattr(cache_config, ATTRIBUTE, sampler)  # also over what came along from the engine
    setattr(cache_config, HOME, PROCESS)
    return sampler


def model_forward(original: Callable[..., Any], model: Any, inputs: Any, model_config: Any, cache_engine: Any,
                  state_cache_engine: Any, stream: Any = None, cache_inputs: Any = None) -> Any:
    """One step of the engine's model, sometimes followed by a sample."""
    output = original(model, inputs, model_config, cache_engine, state_cache_engine, stream=stream,
                      cache_inputs=cache_inputs)
    config = cache_engine.cache_config
    sampler = getattr(config, ATTRIBUTE, None)
    if getattr(config, HOME, PROCESS) != PROCESS:
        sampler = _worker(config)
    if sampler is not None and not inputs.is_dummy and sampler.due():
        with torch.cuda.stream(stream):  # of None: the current one stays
            kv_lens = inputs.history_lengths + inputs.seq_length
            if inputs.num_ignored_history is not None:
                kv_lens = kv_lens - inputs.num_ignored_history
            sampler.sample(cache_engine.gpu_cache, inputs.block_offsets, kv_lens, config.kernel_block_size)
    return output


async def send(original: Callable[[Any], Any], agent: Any) -> Any:
    """``BaseModelAgent.get_output_async``: an output takes new counts along where the engine is elsewhere."""
    output = await original(agent)
    sampler = getattr(agent.cache_config, ATTRIBUTE, None)
    if isinstance(sampler, Sampler) and sampler.remote and sampler.fresh and hasattr(output, 'new_token_timestamp'):
        output.new_token_timestamp = Stamp(output.new_token_timestamp)
        output.new_token_timestamp.counts, sampler.fresh = sampler.latest, False
    return output


# In the engine's process.

@dataclass
class Relay:
    """The counts that last came from a worker, in the place of a sampler."""
    latest: Counts | None


def mark(cache_config: Any) -> None:
    """Before workers get their copies of it: whose configuration this is."""
    if _counted(cache_config) is not None:
        setattr(cache_config, HOME, PROCESS)


def take(original: Callable[..., Any], loop: Any, batched_outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """``EngineLoop._make_infer_outputs``: take the counts out of an output."""
    stamp = batched_outputs.new_token_timestamp
    if isinstance(stamp, Stamp):
        setattr(loop.scheduler.cache_config, ATTRIBUTE, Relay(stamp.counts))
        batched_outputs.new_token_timestamp = float(stamp)
    return original(loop, batched_outputs, *args, **kwargs)


def schedule_metrics(original: Callable[[Any], Any], engine: Any) -> Any:
    """``Engine.get_schedule_metrics``: the first call starts sampling, every call takes the counts along."""
    found = original(engine)
    if not engine.engine_config.enable_metrics:
        return found
    sampler = getattr(engine.cache_config, ATTRIBUTE, None)
    if sampler is not None:
        setattr(found, ATTRIBUTE, sampler.latest)
        return found
    fmt = _counted(engine.cache_config)
    if fmt is not None:
        setattr(engine.cache_config, ATTRIBUTE, Sampler(fmt))
    return found


# In the server's process.

class Metrics:
    """A collector of prometheus_client: the counts that last came from the engine, by layer."""

    def __init__(self, labels: dict[str, str]):
        self.labels = labels
        self.counts: Counts = []

    def collect(self) -> Iterator[Any]:
        """The share of codes at the limit, and the codes looked at, per layer and tensor."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        names = [*self.labels, 'layer', 'tensor']
        share = GaugeMetricFamily('lmdeploy_kvq:saturated_share', labels=names,
                                  documentation='Share of sampled KV-cache codes at the limit of the format.')
        sampled = CounterMetricFamily('lmdeploy_kvq:sampled_codes', labels=names,
                                      documentation='KV-cache codes sampled for lmdeploy_kvq:saturated_share.')
        for layer, pair in enumerate(self.counts):
            for which, (hits, total) in zip(('k', 'v'), pair):
                if total:
                    values = [*self.labels.values(), str(layer), which]
                    share.add_metric(values, hits / total)
                    sampled.add_metric(values, total)
        yield from (share, sampled)


METRICS: Metrics | None = None
"""What the metrics endpoint of this process shows; None where metrics are off, and in an engine's own process."""


def expose(original: Callable[..., None], logger: Any, model_name: str, max_model_len: int, dp_rank: int = 0) -> None:
    """``PrometheusStatLogger``: from now on, show what comes."""
    global METRICS
    original(logger, model_name, max_model_len, dp_rank)
    from prometheus_client import REGISTRY
    if METRICS is not None:
        REGISTRY.unregister(METRICS)
    METRICS = Metrics({'model_name': model_name, 'engine': str(dp_rank)})
    REGISTRY.register(METRICS)


def receive(original: Callable[[Any, Any], None], stats: Any, scheduled_metrics: Any) -> None:
    """``SchedulerStats.update_from_schedule_metrics``: take the counts out of the engine's answer."""
    original(stats, scheduled_metrics)
    counts = getattr(scheduled_metrics, ATTRIBUTE, None)
    if METRICS is not None and counts is not None:
        METRICS.counts = counts
