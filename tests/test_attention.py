"""LMDeploy's attention layer on our pages: its own implementation object and metadata, our kernels behind them."""
import pytest
import torch
from helpers import by_name, finite, frobenius, problem
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl, TritonAttentionMetadata

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.backends import attention

FORMATS = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
HEADS, KV_HEADS, DIM, V_DIM = 6, 2, 64, 32


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The hook, and none of our variables, whatever this process's environment says."""
    monkeypatch.delenv('LMDEPLOY_KVQ_PREFILL', raising=False)
    kvq.install()


def metadata(p, q_lens: list[int], decoding: bool) -> TritonAttentionMetadata:
    """What LMDeploy's step context makes of a batch."""
    device, q = p.kv_lens.device, torch.tensor(q_lens, device=p.kv_lens.device)
    kv = p.kv_lens.long()

    def cumulative(lens):
        return torch.cat([torch.zeros(1, dtype=torch.int32, device=device), lens.cumsum(0).int()])

    return TritonAttentionMetadata(
        is_decoding=decoding, block_offsets=p.block_table, q_start_loc=q.cumsum(0) - q, q_seqlens=q,
        kv_start_loc=kv.cumsum(0) - kv, kv_seqlens=kv, quant_policy=QuantPolicy(p.cache.format.policy),
        kv_flatten_size=int(kv.sum()), cu_seqlens_q=cumulative(q), cu_seqlens_k=cumulative(kv),
        max_kv_seqlen=int(kv.max()), max_q_seqlen=max(q_lens))


def new_rows(p, q_lens: list[int]) -> torch.Tensor:
    """Index of every sequence's last ``q_lens`` tokens among the problem's dense rows."""
    ends = p.kv_lens.cumsum(0).tolist()
    return torch.cat([torch.arange(end - q, end) for end, q in zip(ends, q_lens, strict=True)]).to(p.kv_lens.device)


def engine_problem(fmt, lens: list[int], q_lens: list[int], device: str):
    """Sequences whose history is written and whose new tokens are not, and the new tokens' query, key and value."""
    p = problem(fmt, lens, device=device, kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM, pooled=True, fill=False)
    new = torch.zeros(p.slots.numel(), dtype=torch.bool, device=device)
    new[new_rows(p, q_lens)] = True
    reference.reshape_and_cache(p.key[~new], p.value[~new], p.cache, p.slots[~new])
    query = torch.randn(sum(q_lens), HEADS, DIM, generator=torch.Generator().manual_seed(3)).to(device)
    return p, query, p.key[new], p.value[new]


def scales(p) -> dict[str, torch.Tensor]:
    """The scale arguments of a layer: the page's tensors, or the layer's buffers."""
    cache = p.cache
    return {'k_scales_zeros': cache.k_static_scale if cache.k_scales is None else cache.k_scales,
            'v_scales_zeros': cache.v_static_scale if cache.v_scales is None else cache.v_scales}


def layer(**features) -> TritonAttentionImpl:
    return TritonAttentionImpl(HEADS, DIM, num_kv_heads=KV_HEADS, v_head_size=V_DIM, **features)


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
    """CUDA graphs pad a batch with rows of length query_len on page 0: finite, and no other page is touched."""
    p, query, key, value = engine_problem(fmt, [40, 1, 1], [1, 1, 1], device)
    p.block_table[1:] = 0
    used = p.block_table[0, :3].tolist()
    before = p.pool.clone()
    meta = metadata(p, [1, 1, 1], True)
    out = layer().forward(query, key, value, p.cache.k_codes, p.cache.v_codes, meta, **scales(p))
    assert finite(out)
    changed = (p.pool != before).any(1).nonzero().flatten().tolist()
    assert set(changed) == {0, used[2]}


def dense_attention(query, key, value, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size, softcap, causal,
                    kv_layout, sinks, alibi_slopes, **ignored):
    """In the place of LMDeploy's dense Triton kernel, which needs a GPU: the reference, in LMDeploy's conventions."""
    assert causal and kv_layout == 'shd' and finite(key) and finite(value)
    window = window_size if window_size is None or isinstance(window_size, int) else window_size[0]
    rows = []
    for i in range(len(cu_seqlens_q) - 1):
        q, k = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        rows.append(reference.attention(query[q].double(), key[k].double(), value[k].double(), sm_scale=softmax_scale,
                                        window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes))
    return torch.cat(rows).to(query.dtype)


def prefill(p, query, key, value, q_lens, **features):
    impl = layer(**features)
    impl.flash_attention_fwd = dense_attention
    return impl.forward(query, key, value, p.cache.k_codes, p.cache.v_codes, metadata(p, q_lens, False), **scales(p))


def expected_prefill(p, query, q_lens, key, value, **features):
    """Dense attention over the given rows (all tokens of all sequences)."""
    rows, start, first = [], 0, 0
    for n, q_len in zip(p.kv_lens.tolist(), q_lens, strict=True):
        rows.append(reference.attention(query[start:start + q_len].double(), key[first:first + n].double(),
                                        value[first:first + n].double(), **features))
        start, first = start + q_len, first + n
    return torch.cat(rows)


@pytest.mark.parametrize('features, expected', [({}, {}), ({'sliding_window': 7, 'logit_softcapping': 2.0},
                                                          {'window': 7, 'softcap': 2.0})], ids=['plain', 'window'])
@FORMATS
def test_prefill_without_history_is_exact(fmt, features, expected, device):
    """Every query sees the tokens as they came; the pages are written all the same."""
    lens = [18, 2, 9]
    p, query, key, value = engine_problem(fmt, lens, lens, device)
    out = prefill(p, query, key, value, lens, **features)
    oracle = expected_prefill(p, query, lens, p.key, p.value, **expected)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-6, atol=1e-6)
    dense = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    assert all(frobenius(x, y) <= 1.1 * fmt.max_error for x, y in zip(dense, (p.key, p.value), strict=True))


@pytest.mark.parametrize('features, expected', [({}, {}), ({'sliding_window': 7}, {'window': 7})],
                         ids=['plain', 'window'])
@FORMATS
def test_prefill_with_history(fmt, features, expected, device):
    """History comes from the pages and new tokens as they came; chunked prefill and prefix caching do this."""
    q_lens = [5, 3, 4]
    p, query, key, value = engine_problem(fmt, [20, 3, 33], q_lens, device)
    out = prefill(p, query, key, value, q_lens, **features)
    decoded = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    new = new_rows(p, q_lens)
    for x, raw in zip(decoded, (p.key, p.value), strict=True):
        x[new] = raw[new]
    oracle = expected_prefill(p, query, q_lens, *decoded, **expected)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('q_lens', [[18, 2], [5, 2]], ids=['no history', 'history'])
@FORMATS
def test_prefill_that_reads_the_cache(fmt, q_lens, device, monkeypatch):
    """The switch for measuring accuracy: new tokens are attended to as they were stored."""
    monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'cache')
    p, query, key, value = engine_problem(fmt, [18, 2], q_lens, device)
    out = prefill(p, query, key, value, q_lens)
    oracle = expected_prefill(p, query, q_lens, *reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert frobenius(out, expected_prefill(p, query, q_lens, p.key, p.value)) > 1e-3


def test_the_switch_is_checked(monkeypatch):
    assert not attention.prefill_reads_cache()
    for value, reads in (('raw', False), ('cache', True), (' Cache ', True)):
        monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', value)
        assert attention.prefill_reads_cache() is reads
    monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'yes')
    with pytest.raises(ValueError, match=r"LMDEPLOY_KVQ_PREFILL.*'raw' and 'cache'"):
        attention.prefill_reads_cache()


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
