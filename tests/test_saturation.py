"""The saturation counter: what it counts on pages, and what the metrics endpoint shows."""
from __future__ import annotations

import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

import lmdeploy_kvq as kvq
from lmdeploy_kvq import FORMATS, reference
from lmdeploy_kvq.backends import saturation

STATIC = [fmt for fmt in FORMATS if not fmt.per_token_head]
BLOCK, HEADS, DIM, LAYERS = 16, 2, 32, 3


class Engine:
    """What a step has of LMDeploy's cache engine: pages filled by the reference, and its configuration."""

    def __init__(self, fmt, device='cpu', values=0.1):
        pages = [kvq.PagedCache.allocate(fmt, 8, BLOCK, HEADS, DIM, device=device) for _ in range(LAYERS)]
        for layer, cache in enumerate(pages):
            for codes in (cache.k_codes, cache.v_codes):
                codes.fill_(0xFF)
            key, value = (torch.full((2 * BLOCK + 4, HEADS, DIM), values, device=device) for _ in range(2))
            key[:BLOCK + 4] *= 1e6  # the first page saturates, and a little of the second
            if layer == 1:
                value[BLOCK:BLOCK + 8, 0] = -1e6
            reference.reshape_and_cache(key, value, cache, torch.arange(BLOCK, 3 * BLOCK + 4, device=device))
        self.gpu_cache = [(cache.k_codes, cache.v_codes) for cache in pages]
        self.cache_config = SimpleNamespace(quant_policy=fmt.policy, kernel_block_size=BLOCK)


def inputs(lengths, new=1, dummy=False, device='cpu'):
    """A batch whose sequences hold pages 1, 2 and 3."""
    lengths = torch.tensor(lengths, device=device)
    return SimpleNamespace(is_dummy=dummy, seq_length=torch.full_like(lengths, new), history_lengths=lengths - new,
                           num_ignored_history=torch.zeros_like(lengths),
                           block_offsets=torch.tensor([[1, 2, 3]] * len(lengths), dtype=torch.int32, device=device))


@pytest.fixture
def metrics(monkeypatch):
    found = saturation.Metrics({'model_name': 'm', 'engine': '0'})
    monkeypatch.setattr(saturation, 'METRICS', found)
    return found


def step(engine, batch, times=1):
    for _ in range(times):
        assert saturation.model_forward(lambda *args, **kwargs: 'out', None, batch, None, engine, None) == 'out'


def shown(metrics):
    return {(s.labels['layer'], s.labels['tensor']): s.value for family in metrics.collect() for s in family.samples
            if s.name.endswith('saturated_share')}


@pytest.mark.parametrize('fmt', STATIC, ids=lambda f: f.name)
def test_limits_are_the_formats(fmt):
    for codec in (fmt.key.codec, fmt.value.codec):
        values = torch.tensor([1.0, -1.0, 1e9, -1e9, codec.qmax, codec.qmax / 2])
        codes = reference.encode_codes(values, codec)
        high, low = saturation.limit_codes(codec)
        assert ((codes == high) | (codes == low)).tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize('fmt', STATIC, ids=lambda f: f.name)
def test_shares_are_those_of_the_newest_full_pages(metrics, fmt):
    """Layers take turns; only full pages count, and bytes that no token owns never do."""
    engine = Engine(fmt)
    step(engine, inputs([2 * BLOCK + 4]), times=saturation.EVERY * LAYERS)  # page 2 is the newest full one
    expected = {(str(n), 'k'): 4 / BLOCK for n in range(LAYERS)} | {(str(n), 'v'): 0.0 for n in range(LAYERS)}
    expected['1', 'v'] = 8 / BLOCK / HEADS
    assert shown(metrics) == expected
    assert metrics.sampler.latest[0].tolist() == [[4 * HEADS * DIM, BLOCK * HEADS * DIM], [0, BLOCK * HEADS * DIM]]
    step(engine, inputs([BLOCK + 4]), times=saturation.EVERY * LAYERS)  # page 1: all of K
    assert shown(metrics)['0', 'k'] == (4 / BLOCK + 1) / 2
    total = int(metrics.sampler.latest[0, 0, 1])
    step(engine, inputs([BLOCK - 1, 3]), times=saturation.EVERY * LAYERS)
    assert int(metrics.sampler.latest[0, 0, 1]) == total, 'sequences without a full page'


def test_one_sample_every_few_steps(metrics):
    engine = Engine(STATIC[0])
    step(engine, inputs([BLOCK]), times=saturation.EVERY)
    assert metrics.sampler.latest[:, :, 1].count_nonzero() == 2, 'one layer, K and V'
    step(engine, inputs([BLOCK]))
    assert metrics.sampler.latest[:, :, 1].count_nonzero() == 4


def test_many_sequences_cost_no_more(metrics):
    engine = Engine(STATIC[0])
    step(engine, inputs([BLOCK] * 64))
    assert int(metrics.sampler.latest[0, 0, 1]) == saturation.PAGES * BLOCK * HEADS * DIM


@pytest.mark.parametrize('fmt', [f for f in FORMATS if f.per_token_head], ids=lambda f: f.name)
def test_formats_whose_scales_follow_the_values_are_not_sampled(metrics, fmt):
    engine = SimpleNamespace(cache_config=SimpleNamespace(quant_policy=fmt.policy))
    step(engine, inputs([BLOCK]))
    assert metrics.sampler is None and shown(metrics) == {}


def test_nothing_is_sampled_without_metrics_or_in_warm_up(monkeypatch, metrics):
    step(Engine(STATIC[0]), inputs([BLOCK], dummy=True))
    assert metrics.sampler is None
    monkeypatch.setattr(saturation, 'METRICS', None)
    step(object(), inputs([BLOCK]))


def test_pages_of_a_sleeping_engine_are_given_back(metrics):
    """Sleep drops the cache engine; its pages must not be kept, and the next engine is sampled anew."""
    engine = Engine(STATIC[0])
    step(engine, inputs([BLOCK]))
    pages = weakref.ref(engine.gpu_cache[0][0])
    draft = Engine(STATIC[0])
    step(draft, inputs([BLOCK]))
    assert metrics.sampler.owner() is engine, 'a second cache is left alone while the first lives'
    del engine
    gc.collect()
    assert pages() is None
    step(draft, inputs([BLOCK]))
    assert metrics.sampler.owner() is draft


def test_the_endpoint_shows_it():
    """Through LMDeploy's own Prometheus logger and registry; a second engine replaces the first."""
    prometheus = pytest.importorskip('prometheus_client')
    from lmdeploy.metrics.loggers import PrometheusStatLogger
    try:
        for name in ('first', 'second'):
            PrometheusStatLogger(model_name=name, max_model_len=128)
            engine = Engine(STATIC[0])
            step(engine, inputs([BLOCK]))
            text = prometheus.generate_latest().decode()
            line = f'lmdeploy_kvq:saturated_share{{engine="0",layer="0",model_name="{name}",tensor="k"}} 1.0'
            assert line in text and 'lmdeploy_kvq:sampled_codes_total' in text and 'lmdeploy:num_requests' in text
            del engine
            gc.collect()
        assert 'model_name="first"' not in '\n'.join(x for x in text.splitlines() if 'lmdeploy_kvq' in x)
    finally:
        prometheus.REGISTRY.unregister(saturation.METRICS)
        saturation.METRICS = None


@pytest.mark.gpu
def test_it_costs_less_than_a_percent(metrics):
    """Host time of a step, averaged over samples and steps without one: below 1 % of a 3 ms step."""
    engine, batch = Engine(STATIC[0], 'cuda'), inputs([2 * BLOCK] * 64, device='cuda')
    step(engine, batch, times=10 * saturation.EVERY)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(engine, batch, times=100 * saturation.EVERY)
    torch.cuda.synchronize()
    assert (time.perf_counter() - start) / (100 * saturation.EVERY) < 30e-6
    step(engine, batch, times=2 * saturation.EVERY * LAYERS)
    torch.cuda.synchronize()
    assert shown(metrics)['0', 'k'] == 4 / BLOCK
