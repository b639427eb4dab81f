"""The saturation counter: what it counts on pages, and how the counts reach the metrics endpoint."""
from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
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


class Cache:
    """What a step has of LMDeploy's cache engine: pages filled by the reference, and its configuration."""

    def __init__(self, fmt, device='cpu', values=0.1, config=None):
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
        self.cache_config = config or cache_config(fmt)


def cache_config(fmt):
    """LMDeploy's own."""
    from lmdeploy.pytorch.config import CacheConfig
    return CacheConfig(max_batches=4, block_size=BLOCK, kernel_block_size=BLOCK, num_cpu_blocks=0, num_gpu_blocks=8,
                       quant_policy=fmt.policy)


def engine_of(config, metrics=True):
    """LMDeploy's engine with its scheduler, and without a model."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.config import SchedulerConfig
    from lmdeploy.pytorch.engine.engine import Engine
    from lmdeploy.pytorch.paging import Scheduler
    engine = Engine.__new__(Engine)
    engine.engine_config, engine.cache_config = PytorchEngineConfig(enable_metrics=metrics), config
    engine.scheduler = Scheduler(SchedulerConfig(max_batches=4, max_session_len=128), config)
    return engine


def inputs(lengths, new=1, dummy=False, device='cpu'):
    """A batch whose sequences hold pages 1, 2 and 3."""
    lengths = torch.tensor(lengths, device=device)
    return SimpleNamespace(is_dummy=dummy, seq_length=torch.full_like(lengths, new), history_lengths=lengths - new,
                           num_ignored_history=torch.zeros_like(lengths),
                           block_offsets=torch.tensor([[1, 2, 3]] * len(lengths), dtype=torch.int32, device=device))


def sampled(fmt, **options):
    """A cache that is sampled: its engine has been asked for metrics."""
    cache = Cache(fmt, **options)
    engine_of(cache.cache_config).get_schedule_metrics()
    return cache


def step(cache, batch, times=1):
    for _ in range(times):
        assert saturation.model_forward(lambda *args, **kwargs: 'out', None, batch, None, cache, None) == 'out'


def counts(cache):
    """What the engine sends along with its metrics."""
    return getattr(engine_of(cache.cache_config).get_schedule_metrics(), saturation.ATTRIBUTE)


def shares(cache):
    return {(layer, tensor): hits / total for layer, pair in enumerate(counts(cache))
            for tensor, (hits, total) in zip('kv', pair) if total}


@pytest.mark.parametrize('fmt', STATIC, ids=lambda f: f.name)
def test_limits_are_the_formats(fmt):
    for codec in (fmt.key.codec, fmt.value.codec):
        values = torch.tensor([1.0, -1.0, 1e9, -1e9, codec.qmax, codec.qmax / 2])
        codes = reference.encode_codes(values, codec)
        high, low = saturation.limit_codes(codec)
        assert ((codes == high) | (codes == low)).tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize('fmt', STATIC, ids=lambda f: f.name)
def test_shares_are_those_of_the_newest_full_pages(fmt):
    """Layers take turns; only full pages count, and bytes that no token owns never do."""
    cache = sampled(fmt)
    step(cache, inputs([2 * BLOCK + 4]), times=saturation.EVERY * LAYERS)  # page 2 is the newest full one
    expected = {(n, 'k'): 4 / BLOCK for n in range(LAYERS)} | {(n, 'v'): 0.0 for n in range(LAYERS)}
    expected[1, 'v'] = 8 / BLOCK / HEADS
    assert shares(cache) == expected
    assert counts(cache)[0] == [[4 * HEADS * DIM, BLOCK * HEADS * DIM], [0, BLOCK * HEADS * DIM]]
    step(cache, inputs([BLOCK + 4]), times=saturation.EVERY * LAYERS)  # page 1: all of K
    assert shares(cache)[0, 'k'] == (4 / BLOCK + 1) / 2
    before = counts(cache)
    step(cache, inputs([BLOCK - 1, 3]), times=saturation.EVERY * LAYERS)
    assert counts(cache) == before, 'sequences without a full page'


def test_one_sample_every_few_steps():
    cache = sampled(STATIC[0])
    step(cache, inputs([BLOCK]), times=saturation.EVERY)
    assert set(shares(cache)) == {(0, 'k'), (0, 'v')}
    step(cache, inputs([BLOCK]))
    assert set(shares(cache)) == {(0, 'k'), (0, 'v'), (1, 'k'), (1, 'v')}


def test_many_sequences_cost_no_more():
    cache = sampled(STATIC[0])
    step(cache, inputs([BLOCK] * 64))
    assert counts(cache)[0][0][1] == saturation.PAGES * BLOCK * HEADS * DIM


@pytest.mark.parametrize('fmt', [f for f in FORMATS if f.per_token_head], ids=lambda f: f.name)
def test_formats_whose_scales_follow_the_values_are_not_sampled(fmt):
    config = cache_config(fmt)
    for _ in range(2):
        assert not hasattr(engine_of(config).get_schedule_metrics(), saturation.ATTRIBUTE)
    step(SimpleNamespace(cache_config=config), None)


def test_nothing_is_sampled_unasked_without_metrics_or_in_warm_up():
    fmt = STATIC[0]
    step(SimpleNamespace(cache_config=cache_config(fmt)), None)  # nobody asked
    config = cache_config(fmt)
    for _ in range(2):
        assert not hasattr(engine_of(config, metrics=False).get_schedule_metrics(), saturation.ATTRIBUTE)
    step(SimpleNamespace(cache_config=config), None)
    cache = sampled(fmt)
    step(cache, inputs([BLOCK], dummy=True))
    assert counts(cache) is None


def test_pages_of_a_sleeping_engine_are_given_back():
    """Sleep drops the cache engine; its pages must not be kept, and the next one's counts add up with its own."""
    cache = sampled(STATIC[0])
    step(cache, inputs([BLOCK]), times=saturation.EVERY)
    before, pages, config = counts(cache), weakref.ref(cache.gpu_cache[0][0]), cache.cache_config
    del cache
    gc.collect()
    assert pages() is None
    awake = Cache(STATIC[0], config=config)
    step(awake, inputs([BLOCK]))
    assert counts(awake)[0] == before[0] and counts(awake)[1] != before[1], 'the next layer takes its turn'


def test_each_engine_counts_its_own():
    first, second = sampled(STATIC[0]), sampled(STATIC[0])
    draft = Cache(STATIC[0])
    for cache in (first, draft):
        step(cache, inputs([BLOCK]))
    assert counts(first) and counts(second) is None and not hasattr(draft.cache_config, saturation.ATTRIBUTE)


def test_the_model_agent_has_the_configuration_of_the_scheduler():
    """What tells a cache to be sampled is on the CacheConfig; one copy on the way, and it would not arrive."""
    from lmdeploy.pytorch.engine.executor.uni_executor import UniExecutor
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
    config, executor = cache_config(STATIC[0]), UniExecutor.__new__(UniExecutor)
    executor.model_agent = agent = BaseModelAgent.__new__(BaseModelAgent)
    agent.spec_agent, agent.memdecode_agent = SimpleNamespace(set_cache_config=lambda config: None), None
    executor.set_cache_config(config, None)
    assert agent.cache_config is config


class Output:
    """What LMDeploy's agent waits for before it takes an output."""

    def query(self):
        return True

    def wait(self):
        pass


def output_of(cache):
    """An output of a worker's step, from LMDeploy's agent, as it arrives in the engine's process through Ray."""
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent, BatchedOutputs
    agent = BaseModelAgent.__new__(BaseModelAgent)
    agent.cache_config, agent.out_stream, agent._out_que = cache.cache_config, None, asyncio.Queue()
    agent._release_completed_h2d_transfers = lambda: None
    output = BatchedOutputs(next_token_ids=torch.tensor([3]), stopped=torch.tensor([False]))
    agent._out_que.put_nowait((output, Output()))
    assert inspect.iscoroutinefunction(BaseModelAgent.get_output_async), 'still one'
    sent = asyncio.run(agent.get_output_async())
    return pickle.loads(pickle.dumps(sent.to_numpy())).to_tensor()


def worker_of(config):
    """A worker's cache: its configuration is a pickled copy, made before there is a sampler, in another process."""
    copy = pickle.loads(pickle.dumps(config))
    assert getattr(copy, saturation.HOME) == saturation.PROCESS
    setattr(copy, saturation.HOME, 'another process')
    return Cache(STATIC[0], config=copy)


def taken(engine, output):
    """LMDeploy's engine loop is given an output; what it makes of it is not of interest here."""
    loop = SimpleNamespace(scheduler=engine.scheduler)
    return saturation.take(lambda loop, outputs, **rest: outputs, loop, output, running=[])


@pytest.mark.covers('parallel.metrics')
def test_counts_of_a_worker_come_with_its_outputs():
    """Tensor parallelism and Ray: once per sample, and the engine answers with them; other formats are not marked."""
    config = cache_config(STATIC[0])
    saturation.mark(config)
    engine, worker = engine_of(config), worker_of(config)
    engine.get_schedule_metrics()  # the server asks: here, nothing runs that could be sampled
    step(worker, inputs([BLOCK]))
    before = time.time()
    output = taken(engine, output_of(worker))
    assert type(output.new_token_timestamp) is float and before <= output.new_token_timestamp <= time.time()
    assert counts(SimpleNamespace(cache_config=config)) == worker.cache_config.lmdeploy_kvq_saturation.latest
    assert shares(SimpleNamespace(cache_config=config))[0, 'k'] == 1.0
    assert type(output_of(worker).new_token_timestamp) is float, 'nothing new'
    step(worker, inputs([BLOCK]), times=saturation.EVERY)
    assert isinstance(output_of(worker).new_token_timestamp, saturation.Stamp)
    other = cache_config(next(fmt for fmt in FORMATS if fmt.per_token_head))
    saturation.mark(other)
    assert not hasattr(other, saturation.HOME)


def test_the_first_rank_alone_samples():
    """Outputs of the others are not read; what a configuration brings along from the engine is not taken for one."""
    from lmdeploy.pytorch.distributed import DistContext, DistGroup, get_dist_manager
    config = cache_config(STATIC[0])
    saturation.mark(config)
    setattr(config, saturation.ATTRIBUTE, saturation.Relay([]))
    for rank in (0, 1):
        worker = worker_of(config)
        with get_dist_manager().context(DistContext(rank=rank, attn_tp_group=DistGroup(rank=rank))):
            step(worker, inputs([BLOCK]), times=2)
        assert isinstance(getattr(worker.cache_config, saturation.ATTRIBUTE), saturation.Sampler) is (rank == 0)
        assert isinstance(output_of(worker).new_token_timestamp, saturation.Stamp) is (rank == 0)


def test_an_engine_in_the_same_process_is_asked():
    """One GPU without Ray: marked too, and sampled only once somebody asks; counts do not travel with outputs."""
    config = cache_config(STATIC[0])
    saturation.mark(config)
    cache = Cache(STATIC[0], config=config)
    step(cache, inputs([BLOCK]))
    assert getattr(config, saturation.ATTRIBUTE, None) is None
    engine_of(config).get_schedule_metrics()
    step(cache, inputs([BLOCK]))
    assert counts(cache)[0][0][0] and type(output_of(cache).new_token_timestamp) is float


async def _ask_over_zmq(engine, ask):
    """``ask(engine as the server sees it)``, between LMDeploy's RPC server and client as its worker sets them up."""
    from lmdeploy.pytorch.engine.mp_engine.base_worker import EngineWorkerBase
    from lmdeploy.pytorch.engine.mp_engine.zmq_engine import ZMQMPEngine
    from lmdeploy.pytorch.engine.mp_engine.zmq_rpc import AsyncRPCClient, AsyncRPCServer
    worker, remote = EngineWorkerBase.__new__(EngineWorkerBase), ZMQMPEngine.__new__(ZMQMPEngine)
    worker.engine = engine
    server = AsyncRPCServer()
    server.register_method('get_schedule_metrics', worker.get_schedule_metrics)
    running = asyncio.create_task(server.run())
    remote.rpc_client = AsyncRPCClient(port=server.port)
    try:
        return await asyncio.wait_for(ask(remote), 30)
    finally:
        remote.rpc_client.stop()
        server.stop()
        await running


async def _ask_here(engine, ask):
    return await ask(engine)


@pytest.fixture
def endpoint():
    prometheus = pytest.importorskip('prometheus_client')
    from lmdeploy.metrics.metrics_processor import metrics_processor
    loggers = metrics_processor.stat_loggers
    yield lambda: prometheus.generate_latest().decode()
    metrics_processor.stat_loggers = loggers
    if saturation.METRICS is not None:
        prometheus.REGISTRY.unregister(saturation.METRICS)
        saturation.METRICS = None


@pytest.mark.parametrize('ask', [_ask_here, _ask_over_zmq])
def test_the_endpoint_shows_what_the_engine_sends(endpoint, ask):
    """The server's path: AsyncEngine asks, MetricsProcessor takes, Prometheus shows; a second engine replaces it."""
    from lmdeploy.metrics.loggers import PrometheusStatLogger
    from lmdeploy.metrics.metrics_processor import metrics_processor
    from lmdeploy.serve.core.async_engine import AsyncEngine

    async def poll(engine):
        server = AsyncEngine.__new__(AsyncEngine)
        server.engine = engine
        await metrics_processor.update_schedule_stats(await server.get_schedule_metrics())

    for name in ('first', 'second'):
        metrics_processor.stat_loggers = [PrometheusStatLogger(model_name=name, max_model_len=128)]
        cache = Cache(STATIC[0])
        engine = engine_of(cache.cache_config)
        asyncio.run(ask(engine, poll))
        step(cache, inputs([BLOCK]))
        assert 'lmdeploy_kvq:saturated_share{' not in endpoint(), 'not asked for yet'
        asyncio.run(ask(engine, poll))
        text = endpoint()
        labels = f'{{engine="0",layer="0",model_name="{name}",tensor="k"}}'
        assert f'lmdeploy_kvq:saturated_share{labels} 1.0' in text
        assert f'lmdeploy_kvq:sampled_codes_total{labels} {BLOCK * HEADS * DIM:.1f}' in text
        assert 'lmdeploy:num_requests' in text
    assert 'model_name="first"' not in '\n'.join(x for x in text.splitlines() if 'lmdeploy_kvq' in x)


@pytest.mark.gpu
def test_it_costs_less_than_a_percent_alone():
    """Host time of a step, averaged over samples and steps without one: below 1 % of a 3 ms step."""
    cache, batch = sampled(STATIC[0], device='cuda'), inputs([2 * BLOCK] * 64, device='cuda')
    step(cache, batch, times=10 * saturation.EVERY)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(cache, batch, times=100 * saturation.EVERY)
    torch.cuda.synchronize()
    assert (time.perf_counter() - start) / (100 * saturation.EVERY) < 30e-6
    step(cache, batch, times=2 * saturation.EVERY * LAYERS)
    torch.cuda.synchronize()
    assert shares(cache)[0, 'k'] == 4 / BLOCK
