"""Calibration while serving: exact while scales are pending, right pages afterwards, through LMDeploy's own classes."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import fa3
import pytest
import torch
from helpers import by_name, frobenius, python
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import DIM, HEADS, KV_HEADS, V_DIM, metadata
from test_prefill import fa3_layer, triton_layer

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq._autoload import CALIBRATE, SCALES
from lmdeploy_kvq.backends import asked, attention, calibrating
from lmdeploy_kvq.backends.calibrating import ATTRIBUTE, Calibration
from lmdeploy_kvq.reference import MAX_INPUT

STATIC = [fmt for fmt in kvq.FORMATS if not fmt.per_token_head]
PAGE, BLOCKS, LAYERS = 16, 24, 2


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The hook, and none of our variables, whatever this process's environment says."""
    for name in (CALIBRATE, SCALES, 'LMDEPLOY_KVQ_PREFILL'):
        monkeypatch.delenv(name, raising=False)
    kvq.install()


# ---- layers


class Layers:
    """Attention layers over pages that a small scheduler hands out, newest first; it keeps all K and V as they came."""

    def __init__(self, fmt, capacity, granularity='tensor', make=triton_layer, device='cpu'):
        self.fmt, self.device, self.random = fmt, device, torch.Generator().manual_seed(0)
        self.caches = [kvq.PagedCache.allocate(fmt, BLOCKS, PAGE, KV_HEADS, DIM, V_DIM, device) for _ in range(LAYERS)]
        for cache in self.caches:
            cache.k_codes.fill_(0xFF)
            cache.v_codes.fill_(0xFF)
            if granularity == 'head':  # as settle() makes them
                cache.k_static_scale, cache.v_static_scale = torch.ones(2, KV_HEADS, device=device)
        self.modules = {f'layers.{n}': SimpleNamespace(impl=make(), k_scale=cache.k_static_scale,
                                                       v_scale=cache.v_static_scale)
                        for n, cache in enumerate(self.caches)}
        self.found = None
        self.calibration = Calibration(self.modules, fmt, asked.Request(capacity, granularity), torch.float32,
                                       self.apply, self.finish)
        self.free = list(range(1, BLOCKS))
        self.sequences: list[SimpleNamespace] = []
        self.absmax = torch.zeros(LAYERS, 2, KV_HEADS)
        self.served = 0

    @staticmethod
    def apply(module, k, v):
        module.k_scale.copy_(k)
        module.v_scale.copy_(v)

    def finish(self, found):
        self.found = found

    def start(self, prefix=None):
        """A new sequence, perhaps with another one's full pages in front (the prefix cache); returns it."""
        pages = 0 if prefix is None else len(prefix.k[0]) // PAGE
        sequence = SimpleNamespace(blocks=[] if prefix is None else prefix.blocks[:pages], own=pages, **{
            name: [torch.empty(0, KV_HEADS, dim) if prefix is None else getattr(prefix, name)[n][:pages * PAGE]
                   for n in range(LAYERS)] for name, dim in (('k', DIM), ('v', V_DIM))})
        self.sequences.append(sequence)
        return sequence

    def end(self, sequence):
        """Free its pages, unless another sequence shares them."""
        self.sequences.remove(sequence)
        kept = {block for other in self.sequences for block in other.blocks}
        self.free = [block for block in sequence.blocks if block not in kept] + self.free

    def step(self, batch, decoding=False, padding=0):
        """Serve new tokens of some sequences; returns per layer what attention gave and what is exact."""
        q_lens = [new for _, new in batch]
        for sequence, new in batch:
            while len(sequence.blocks) * PAGE < len(sequence.k[0]) + new:
                sequence.blocks.append(self.free.pop(0))
        table = torch.zeros(len(batch), BLOCKS, dtype=torch.int32)
        for row, (sequence, _) in enumerate(batch):
            table[row, :len(sequence.blocks)] = torch.tensor(sequence.blocks)
        lens = torch.tensor([len(sequence.k[0]) + new for sequence, new in batch])
        problem = SimpleNamespace(kv_lens=lens.to(self.device), block_table=table.to(self.device), cache=self.caches[0])
        meta, self.served = metadata(problem, q_lens, decoding), self.served + sum(q_lens)

        def forward():
            return [self._layer(n, batch, meta, padding) for n in range(LAYERS)]

        return self.calibration.step(forward)

    def _layer(self, n, batch, meta, padding):
        tokens = sum(new for _, new in batch)
        q, k, v = (torch.randn(tokens + padding, heads, dim, generator=self.random) * (n + 1)
                   for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM)))
        k[:, 0] *= 1000  # beyond fp8's range, and not alike; scores stay
        q[:, :HEADS // KV_HEADS] /= 1000
        for which, x in enumerate((k, v) if self.found is None else ()):
            self.absmax[n, which] = x[:tokens].abs().amax((0, 2)).maximum(self.absmax[n, which]).clamp(max=MAX_INPUT)
        cache, module = self.caches[n], self.modules[f'layers.{n}']
        out = module.impl.forward(*(x.to(self.device) for x in (q, k, v)), cache.k_codes, cache.v_codes, meta,
                                  k_scales_zeros=module.k_scale, v_scales_zeros=module.v_scale)
        exact, start = [], 0
        for sequence, new in batch:
            part = slice(start, start + new)
            sequence.k[n], sequence.v[n] = (torch.cat([old, x[part]]) for old, x in
                                            ((sequence.k[n], k), (sequence.v[n], v)))
            exact.append(reference.attention(q[part].double(), sequence.k[n].double(), sequence.v[n].double()))
            start += new
        return out[:tokens].cpu(), torch.cat(exact)

    def check_pages(self):
        """Every token of every living sequence is in its slot, encoded once, with the scales that are served."""
        for n, (cache, module) in enumerate(zip(self.caches, self.modules.values())):
            scales = [x.cpu() for x in (module.k_scale, module.v_scale)]
            for which, (scale, encoding) in enumerate(zip(scales, (self.fmt.key, self.fmt.value))):
                expected = self.absmax[n, which] / encoding.codec.qmax
                torch.testing.assert_close(scale, expected if scale.dim() else expected.max())
            clean = kvq.PagedCache.allocate(self.fmt, BLOCKS, PAGE, KV_HEADS, DIM, V_DIM, 'cpu')
            clean.k_static_scale, clean.v_static_scale = scales
            for sequence in self.sequences:
                position = torch.arange(len(sequence.k[n]))
                slots = torch.tensor([*sequence.blocks, 0])[position // PAGE] * PAGE + position % PAGE
                reference.reshape_and_cache(sequence.k[n], sequence.v[n], clean, slots)
                table = torch.tensor([[*sequence.blocks, 0]], dtype=torch.int32)
                lens = torch.tensor([len(position)])
                pages = kvq.PagedCache(self.fmt, cache.k_codes.cpu(), cache.v_codes.cpu(), DIM, V_DIM, None, None,
                                       *scales)
                for x, y in zip(reference.flatten(pages, table, lens, torch.float32),
                                reference.flatten(clean, table, lens, torch.float32)):
                    torch.testing.assert_close(x, y, rtol=0, atol=0)


def is_exact(results):
    for out, exact in results:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def write(key, value, cache, layout, inputs=None):
    """In the place of the fill kernel, which takes the interpreter minutes: the reference, with the same arguments."""
    slots = layout.slots
    if slots is None:
        positions = [torch.arange(kv - q, kv) for q, kv in zip(layout.q_lens.tolist(), layout.kv_lens.tolist())]
        slots = torch.cat([layout.block_table[row, position // PAGE].long() * PAGE + position % PAGE
                           for row, position in enumerate(positions)])
    reference.reshape_and_cache(key, value, cache, slots)


def without_kernels(patch):
    for module in (calibrating, attention):
        patch.setattr(module, 'fill', write)
    for name in ('decode', 'prefill'):  # of the step that sets the scales; its pages are what counts then
        patch.setattr(attention, name, lambda *args, **kwargs: torch.zeros(10**4))


OPERATIONS = st.lists(st.one_of(
    st.tuples(st.just('prefill'), st.lists(st.integers(1, 37), min_size=1, max_size=3)),
    st.tuples(st.just('share'), st.integers(0, 9), st.integers(1, 20)),
    st.tuples(st.just('chunk'), st.integers(0, 9), st.integers(1, 20)),
    st.tuples(st.just('decode'), st.integers(1, 3)),
    st.tuples(st.just('end'), st.integers(0, 9))), min_size=1, max_size=10)


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, capacity=st.integers(20, 130), fmt=st.sampled_from(STATIC),
       granularity=st.sampled_from(['tensor', 'head']), piece_rows=st.sampled_from([1, 30, 10**6]))
def test_pending_is_exact_and_then_every_page_is_right(operations, capacity, fmt, granularity, piece_rows):
    """Whatever the scheduler does: chunks, shared prefixes, pages of ended sequences used again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, 'PIECE_BYTES', piece_rows * KV_HEADS * (DIM + V_DIM) * 4)
        without_kernels(patch)
        layers = Layers(fmt, capacity, granularity)
        for name, *rest in [*operations, ('prefill', [capacity + 1 if capacity < 60 else 60] * 3)]:
            living = layers.sequences
            room = len(layers.free) * PAGE
            if name == 'prefill' and room >= sum(-(-n // PAGE) * PAGE for n in rest[0]):
                batch = [(layers.start(), n) for n in rest[0]]
            elif name in ('share', 'chunk') and living and room >= 48:
                chosen = living[rest[0] % len(living)]
                batch = [(chosen if name == 'chunk' else layers.start(chosen), rest[1])]
            elif name == 'decode' and living and room >= PAGE * len(living):
                batch = [(sequence, rest[0]) for sequence in living]
            else:
                if name == 'end' and living:
                    layers.end(living[rest[0] % len(living)])
                continue
            fits = layers.served + sum(n for _, n in batch) <= capacity
            results = layers.step(batch, decoding=name == 'decode')
            assert (layers.found is None) == fits
            if not fits:
                break
            is_exact(results)
            assert all((cache.k_codes == 0xFF).all() for cache in layers.caches), 'pages are left alone'
        if layers.found is None:
            return
        layers.check_pages()
        assert {found.tokens for found in layers.found.values()} == {layers.served}
        assert not any(hasattr(module.impl, ATTRIBUTE) for module in layers.modules.values()), 'the logs are gone'


@pytest.mark.parametrize('fmt', STATIC, ids=by_name)
def test_serving_goes_on_with_the_scales_found(fmt, device):
    """Sequences in flight are decoded from their pages by the usual kernel, at the format's own error."""
    layers = Layers(fmt, 40, device=device)
    first, second = layers.start(), layers.start()
    is_exact(layers.step([(first, 21), (second, 9)]))
    is_exact(layers.step([(first, 1), (second, 1)], decoding=True))
    is_exact(layers.step([(layers.start(first), 5)], padding=3))
    for _ in range(2):  # the step that sets the scales, and the next
        results = layers.step([(sequence, 2) for sequence in layers.sequences], decoding=True)
        for out, exact in results:
            assert frobenius(out, exact) < 3 * fmt.max_error
    layers.check_pages()


def test_flash_attention_3_takes_its_place(monkeypatch):
    """Where LMDeploy chose it, prefill and decoding of pending tokens go through it."""
    calls: list[dict] = []
    fa3.provide(monkeypatch, fa3.varlen_attention(calls))
    layers = Layers(STATIC[0], 100, make=fa3_layer)
    sequence = layers.start()
    is_exact(layers.step([(sequence, 21)]))
    is_exact(layers.step([(sequence, 1)], decoding=True))
    assert len(calls) == 2 * LAYERS


def test_windows_softcap_and_sinks():
    """The layer's own features hold while scales are pending."""
    layers = Layers(STATIC[0], 100, make=lambda: triton_layer(sliding_window=(7, 7), logit_softcapping=2.0))
    sequence = layers.start()
    layers.step([(sequence, 20)])
    q = torch.randn(1, HEADS, DIM)
    k, v = torch.randn(1, KV_HEADS, DIM), torch.randn(1, KV_HEADS, V_DIM)
    sink = torch.linspace(-1, 1, HEADS)
    problem = SimpleNamespace(kv_lens=torch.tensor([21]), cache=layers.caches[0],
                              block_table=torch.tensor([sequence.blocks], dtype=torch.int32))
    cache, impl = layers.caches[0], layers.modules['layers.0'].impl
    meta = metadata(problem, [1], True)
    out = layers.calibration.step(lambda: impl.forward(
        q, k, v, cache.k_codes, cache.v_codes, meta, k_scales_zeros=cache.k_static_scale,
        v_scales_zeros=cache.v_static_scale, learnable_sink=sink))
    exact = reference.attention(q.double(), torch.cat([sequence.k[0], k]).double(),
                                torch.cat([sequence.v[0], v]).double(), window=7, softcap=2.0, sinks=sink)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_request_of_nans_is_its_own_affair():
    """It leaves no trace in the scales."""
    layers = Layers(STATIC[0], 30)
    layers.step([(layers.start(), 10)])
    impl = layers.modules['layers.0'].impl
    impl.flash_attention_fwd = lambda query, *args, **kwargs: query[..., :V_DIM]
    pending = getattr(impl, ATTRIBUTE)
    before = pending.seen.key.absmax.clone()
    x = [torch.full((3, heads, dim), float('nan')) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM))]
    meta = metadata(SimpleNamespace(kv_lens=torch.tensor([3]), block_table=torch.tensor([[20]], dtype=torch.int32),
                                    cache=layers.caches[0]), [3], False)
    pending.forward(*x, layers.caches[0], meta, None)
    assert torch.equal(pending.seen.key.absmax, before) and pending.seen.key_moment.isfinite().all()


def test_pages_that_nobody_wrote_are_an_error():
    """A migrated sequence, for one: never a wrong answer."""
    layers = Layers(STATIC[0], 60)
    sequence = layers.start()
    layers.step([(sequence, 10)])
    stranger = layers.start()
    stranger.blocks, stranger.k, stranger.v = [layers.free.pop()], sequence.k[:], sequence.v[:]
    with pytest.raises(RuntimeError, match='pages that were not written in this engine'):
        layers.step([(stranger, 1)], decoding=True)


# ---- tensor parallelism

RANKS = """
import gc, os, sys, json, torch, torch.distributed as dist, torch.multiprocessing as mp
# Before there is a group: it makes the group a default argument, and a group that goes with the interpreter lets its
# threads ask for a lock that is gone ("terminate called", now and then).
import torch.distributed.nn
os.environ['TRITON_INTERPRET'] = '1'
sys.path.insert(0, {tests!r})

def rank_main(rank, cases, out):
    dist.init_process_group('gloo', init_method='file://' + out + '.init', rank=rank, world_size=2)
    import lmdeploy_kvq as kvq
    kvq.install()
    import test_calibrating as t
    head = torch.tensor([1.0, 8.0])[:, None] if rank == 0 else torch.tensor([64.0, 0.5])[:, None]
    t.without_kernels(t.pytest.MonkeyPatch())
    scaled = torch.randn
    for granularity, replicas in cases:
        case(t, rank, granularity, replicas, f'{{out}}.{{granularity}}.{{replicas}}', head, scaled)
    gc.collect()  # the layers', which refer to one another and to the group
    dist.destroy_process_group()
    threads = [open(f'/proc/self/task/{{task}}/comm').read() for task in os.listdir('/proc/self/task')]
    assert not any('gloo' in name for name in threads), threads

def case(t, rank, granularity, replicas, out, head, scaled):
    layers = t.Layers(t.STATIC[0], 30, granularity)
    layers.calibration.group, layers.calibration.replicas = dist.group.WORLD, replicas
    applied = []
    layers.calibration.apply = lambda module, k, v: applied.append([k.tolist(), v.tolist()])
    if replicas == 1:
        torch.randn = lambda *a, **kw: scaled(*a, **kw) * (1 if a[1] == t.HEADS else head)
    layers.step([(layers.start(), 20)])
    layers.step([(layers.start(), 20)])
    torch.randn = scaled
    found = {{name: [f.key.tolist(), f.value.tolist(), f.statistics['k_absmax'].tolist(),
                    list(f.statistics['k_second_moment'].shape)] for name, f in layers.found.items()}}
    json.dump([applied, found, layers.absmax.tolist()], open(f'{{out}}.{{rank}}', 'w'))

if __name__ == '__main__':
    mp.spawn(rank_main, (json.loads(sys.argv[1]), sys.argv[2]), nprocs=2)
"""


CASES = [('tensor', 1), ('head', 1), ('head', 2)]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What two real processes found, each with half the heads, by granularity and replicas."""
    folder = tmp_path_factory.mktemp('ranks')
    script, out = folder / 'ranks.py', str(folder / 'out')
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    python('import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")', str(script),
           json.dumps(CASES), out)
    return {case: [json.loads(Path(f'{out}.{case[0]}.{case[1]}.{rank}').read_text()) for rank in range(2)]
            for case in CASES}


@pytest.mark.parametrize('case', CASES, ids=str)
def test_ranks_agree(ranks, case):
    """One scale for all, or the scales of all heads, the same on both; replicated heads are counted once."""
    (granularity, replicas), found = case, ranks[case]
    assert found[0][:2] == found[1][:2]
    heads = 2 * KV_HEADS // replicas
    absmax = torch.cat([torch.tensor(rank[2]) for rank in found[::replicas]], -1)
    assert absmax.size(-1) == heads
    for n, (key, value, k_absmax, shape) in enumerate(found[0][1].values()):
        for scale, size, encoding in zip((key, value), absmax[n], (STATIC[0].key, STATIC[0].value)):
            expected = size / encoding.codec.qmax
            torch.testing.assert_close(torch.tensor(scale), expected.max() if granularity == 'tensor' else expected)
        torch.testing.assert_close(torch.tensor(k_absmax), absmax[n, 0])
        assert shape == [heads, DIM, DIM] and found[0][0][n] == [key, value]
