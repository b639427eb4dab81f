"""Our prefill inside LMDeploy's piecewise CUDA graphs: its eager boundaries and output adapters, without a GPU."""
from __future__ import annotations

import pytest
import torch
from helpers import by_name, covering
from layers import engine_problem, metadata
from lmdeploy.pytorch.backends.cuda.graph_runner import piecewise
from test_prefill import calls, fa3_layer, run, triton_layer  # noqa: F401  calls is a fixture

import lmdeploy_kvq as kvq

BUCKET = 64
FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)


class Recorder:
    """In the place of LMDeploy's capture: what it does at a boundary, the CUDA graphs around it left out."""

    inside_eager_boundary = False

    def __init__(self):
        self.calls = []

    def call_eager(self, declaration, args, kwargs):
        self.calls.append((declaration, args, kwargs))
        output = declaration.func(*args, **kwargs)
        inputs = frozenset(piecewise._tensor_storage_pointers(args) + piecewise._tensor_storage_pointers(kwargs))
        adapter = declaration.adapter_factory()
        bridge = adapter.allocate(output, inputs)
        adapter.copy(bridge, output)
        return bridge


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.delenv('LMDEPLOY_KVQ_PREFILL', raising=False)
    kvq.install()


@pytest.mark.covers('feature.prefill_graphs')
@pytest.mark.parametrize('make', [triton_layer, fa3_layer], ids=['triton', 'fa3'])
@pytest.mark.parametrize('q_lens', [[18, 2], [5, 2]], ids=['no history', 'history'])
@FORMATS
def test_a_boundary_runs_our_prefill_on_the_tokens_there_are(fmt, q_lens, make, device, calls):  # noqa: F811
    """Rows behind the last token, NaN here, are neither written nor attended to; LMDeploy takes the output."""
    plain, *rows = engine_problem(fmt, [18, 2], q_lens, device)
    expected = run(make(), plain, *rows, metadata(plain, q_lens, False))
    p, query, key, value = engine_problem(fmt, [18, 2], q_lens, device)
    padded = [torch.cat([x, torch.full((BUCKET - len(x), *x.shape[1:]), torch.nan, device=device)])
              for x in (query, key, value)]
    impl, recorder = make(), Recorder()
    impl.enable_piecewise_cuda_graph()
    meta = metadata(p, q_lens, False)
    token = piecewise._ACTIVE_BUILDER.set(recorder)
    try:
        with piecewise.piecewise_graph_execution(raw_tokens=len(query), token_bucket=BUCKET):
            out = run(impl, p, *padded, meta)
    finally:
        piecewise._ACTIVE_BUILDER.reset(token)
    assert len(recorder.calls) == 1 and any(x is meta for x in recorder.calls[0][1]), 'bound to each live request'
    assert out.size(0) == BUCKET and torch.equal(out[:len(query)], expected) and not out[len(query):].any()
    assert torch.equal(p.pool, plain.pool)
    again = run(impl, p, query, key, value, meta)  # outside of piecewise graphs the layer is as ever
    assert torch.equal(again, expected)
