"""LMDeploy's attention layer on our pages: its own implementation object and metadata, our kernels behind them."""
import pytest
import torch
from helpers import by_name, covering, finite, frobenius, problem
from layers import DIM, HEADS, KV_HEADS, V_DIM, engine_problem, layer, metadata, scales
from lmdeploy.messages import QuantPolicy

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.backends import attention

FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The hook, and none of our variables, whatever this process's environment says."""
    monkeypatch.delenv('LMDEPLOY_KVQ_PREFILL', raising=False)
    kvq.install()


@pytest.mark.parametrize('features, expected, query_len', [
    ({}, {}, 3), ({'scale': 0.4}, {'sm_scale': 0.4}, 1), ({'sliding_window': 9}, {'window': 9}, 3),
    ({'sliding_window': (9, 9)}, {'window': 9}, 1), ({'sliding_window': (-1, -1)}, {}, 1),
    ({'logit_softcapping': 3.0}, {'softcap': 3.0}, 1),
], ids=str)
@FORMATS
def test_decoding(fmt, features, expected, query_len, device):
    """Through the patched method: new tokens written, everything attended to, in the engine's conventions."""
    lens = [20, query_len]
    p, query, key, value = engine_problem(fmt, lens, [query_len] * 2, device)
    out = layer(**features).forward(query, key, value, p.cache.k_codes, p.cache.v_codes,
                                    metadata(p, [query_len] * 2, True), **scales(p))
    written = problem(fmt, lens, device=device, kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM)
    oracle = reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=query_len,
                                       dtype=torch.float64, **expected)
    assert out.shape == (2 * query_len, HEADS, V_DIM) and finite(out) and frobenius(out, oracle) <= 1e-3
    for x, y in zip(reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32),
                    reference.flatten(written.cache, p.block_table, p.kv_lens, torch.float32), strict=True):
        assert frobenius(x, y) <= 1e-3


@FORMATS
def test_decoding_with_sinks_and_alibi(fmt, device):
    p, query, key, value = engine_problem(fmt, [40, 1], [1, 1], device)
    sinks = torch.linspace(-2, 3, HEADS, device=device)
    impl = layer(alibi=True)
    impl.alibi_slopes = torch.linspace(0.1, 0.6, HEADS, device=device)
    out = impl.forward(query, key, value, p.cache.k_codes, p.cache.v_codes, metadata(p, [1, 1], True), **scales(p),
                       learnable_sink=sinks)
    oracle = reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, dtype=torch.float64, sinks=sinks,
                                       alibi_slopes=impl.alibi_slopes)
    assert finite(out) and frobenius(out, oracle) <= 1e-3


@pytest.mark.covers('feature.dllm')
@pytest.mark.parametrize('length', [4, 24])
@FORMATS
def test_decoding_of_block_diffusion(fmt, length, device):
    """The tokens of a block see all of it, also where there are more than the kernel takes as one group."""
    lens = [length, length + 20]
    p, query, key, value = engine_problem(fmt, lens, [length] * 2, device)
    out = layer(block_sparse_size=length).forward(query, key, value, p.cache.k_codes, p.cache.v_codes,
                                                  metadata(p, [length] * 2, True), **scales(p))
    assert out.shape == (2 * length, HEADS, V_DIM) and finite(out)
    table, kv_lens = (x.repeat_interleave(length, 0) for x in (p.block_table, p.kv_lens))  # a sequence per token
    oracle = reference.paged_attention(query, p.cache, table, kv_lens, dtype=torch.float64)
    assert frobenius(out, oracle) <= 1e-3
    causal = reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, query_len=length, dtype=torch.float64)
    assert frobenius(out, causal) > 0.1


@FORMATS
def test_decoding_of_tokens_written_before(fmt, device):
    """Layers that share another layer's cache pass no key and value: nothing is written."""
    p = problem(fmt, [40, 9], device=device, kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM, pooled=True)
    query = torch.randn(2, HEADS, DIM, generator=torch.Generator().manual_seed(3)).to(device)
    before = p.snapshot()
    out = layer().forward(query, None, None, p.cache.k_codes, p.cache.v_codes, metadata(p, [1, 1], True), **scales(p))
    oracle = reference.paged_attention(query, p.cache, p.block_table, p.kv_lens, dtype=torch.float64)
    assert frobenius(out, oracle) <= 1e-3 and p.same_bytes(before)


@FORMATS
def test_graph_padding_rows(fmt, device):
    """What LMDeploy's CUDA graphs pad a batch with: no bit of other rows changes, and no page but 0 is touched."""
    from lmdeploy.pytorch.kernels.cuda.step_metadata.fill_graph_common_inputs import fill_graph_common_inputs
    lens, most = [40, 300, 2, 65, 90], 8
    p, query, key, value = engine_problem(fmt, lens, [1] * len(lens), device)
    used = {int(row[(n - 1) // p.cache.block_size]) for row, n in zip(p.block_table, lens)}
    before = p.pool.clone()
    meta = metadata(p, [1] * len(lens), True)
    plain = layer().forward(query, key, value, p.cache.k_codes, p.cache.v_codes, meta, **scales(p))
    assert set((p.pool != before).any(1).nonzero().flatten().tolist()) == used
    numbers = torch.zeros(1, len(lens), dtype=torch.int64, device=device)
    table = p.block_table.new_full((most, p.block_table.size(1)), -1)
    qkv_lens, sums = (numbers.new_zeros(rows, most + more, dtype=torch.int32) for rows, more in ((3, 0), (2, 1)))
    fill_graph_common_inputs(numbers, numbers, p.block_table, meta.q_start_loc, meta.q_seqlens, meta.kv_seqlens,
                             *numbers.new_zeros(2, 1, most), table, qkv_lens, sums, 1)
    meta.block_offsets, (meta.q_start_loc, meta.q_seqlens, meta.kv_seqlens) = table, qkv_lens
    rows = [torch.cat([x, torch.randn_like(x[:most - len(lens)])]) for x in (query, key, value)]
    out = layer().forward(*rows, p.cache.k_codes, p.cache.v_codes, meta, **scales(p))
    assert torch.equal(out[:len(lens)], plain) and not out[len(lens):].any() and finite(out)
    changed = (p.pool != before).any(1).nonzero().flatten().tolist()
    assert set(changed) == {0, *used}


@pytest.mark.parametrize('policy', [0, 4, 8, 42])
def test_other_policies_take_lmdeploys_path_untouched(policy, device):
    """The original is called with what came, and its result goes back."""
    p = problem(kvq.FORMATS[0], [9], device=device)
    meta = metadata(p, [1], True)
    meta.quant_policy = QuantPolicy(policy)
    arguments = [torch.zeros(1, device=device) for _ in range(5)]
    named = {'k_scales_zeros': arguments[0], 'v_scales_zeros': None, 'learnable_sink': arguments[1], 'inplace': False,
             'extra': 1}
    impl, answer, calls = layer(), object(), []

    def original(*args, **kwargs):
        calls.append((args, kwargs))
        return answer

    before = p.snapshot()
    assert attention.forward(original, impl, *arguments, meta, **named) is answer and p.same_bytes(before)
    (args, kwargs), = calls
    assert all(a is b for a, b in zip(args, (impl, *arguments, meta), strict=True))
    assert all(kwargs[name] is value for name, value in named.items())


def test_rocm_is_refused(monkeypatch):
    """ROCm reports device type cuda too, but its fp8 is another format."""
    from lmdeploy.messages import PytorchEngineConfig
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    with pytest.raises(ValueError, match='fp8_per_token_head needs an NVIDIA GPU'):
        PytorchEngineConfig(quant_policy='fp8_per_token_head')
    assert PytorchEngineConfig(quant_policy=8).quant_policy == 8
