"""Prefill through LMDeploy's own attention classes: exact without history, and in bounded memory with one."""
from __future__ import annotations

import functools

import fa3
import pytest
import torch
from helpers import by_name, covering, finite, frobenius
from layers import DIM, HEADS, KV_HEADS, V_DIM, engine_problem, layer, metadata, new_rows, scales
from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.backends import prefill

FIRST = kvq.FORMATS[0]
FORMATS = pytest.mark.parametrize('fmt', covering(), ids=by_name)
ROW_BYTES = KV_HEADS * (DIM + V_DIM) * 4
"""One decoded token of these tests' layers, in fp32."""


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The hook, and none of our variables, whatever this process's environment says."""
    monkeypatch.delenv('LMDEPLOY_KVQ_PREFILL', raising=False)
    kvq.install()


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """FlashAttention-3's place is taken by ``fa3.varlen_attention``; what it was called with."""
    calls: list[dict] = []
    fa3.provide(monkeypatch, fa3.varlen_attention(calls))
    return calls


def fa3_layer(**features) -> TritonAttentionImpl:
    """LMDeploy's own FA3Impl."""
    from lmdeploy.pytorch.backends.cuda.attention.fa3 import FA3Impl
    return FA3Impl(HEADS, DIM, num_kv_heads=KV_HEADS, v_head_size=V_DIM, **features)


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


def triton_layer(**features) -> TritonAttentionImpl:
    """LMDeploy's TritonAttentionImpl, its dense kernel replaced."""
    impl = layer(**features)
    impl.flash_attention_fwd = dense_attention
    return impl


def run(impl, p, query, key, value, meta) -> torch.Tensor:
    """The patched method."""
    return impl.forward(query, key, value, p.cache.k_codes, p.cache.v_codes, meta, **scales(p))


def expected_prefill(p, query, q_lens, key, value, **features):
    """Dense attention over the given rows (all tokens of all sequences)."""
    rows, start, first = [], 0, 0
    for n, q_len in zip(p.kv_lens.tolist(), q_lens, strict=True):
        rows.append(reference.attention(query[start:start + q_len].double(), key[first:first + n].double(),
                                        value[first:first + n].double(), **features))
        start, first = start + q_len, first + n
    return torch.cat(rows)


def rows_attended_to(p, q_lens) -> tuple[torch.Tensor, torch.Tensor]:
    """History as it was stored, new tokens as they came."""
    decoded = reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32)
    new = new_rows(p, q_lens)
    for x, raw in zip(decoded, (p.key, p.value), strict=True):
        x[new] = raw[new].to(x.dtype)
    return decoded


@pytest.mark.parametrize('features, expected', [({}, {}), ({'sliding_window': 7, 'logit_softcapping': 2.0},
                                                          {'window': 7, 'softcap': 2.0})], ids=['plain', 'window'])
@FORMATS
def test_prefill_without_history_is_exact(fmt, features, expected, device):
    """Every query sees the tokens as they came; the pages are written all the same."""
    lens = [18, 2, 9]
    p, query, key, value = engine_problem(fmt, lens, lens, device)
    out = run(triton_layer(**features), p, query, key, value, metadata(p, lens, False))
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
    out = run(triton_layer(**features), p, query, key, value, metadata(p, q_lens, False))
    oracle = expected_prefill(p, query, q_lens, *rows_attended_to(p, q_lens), **expected)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('q_lens', [[18, 2], [5, 2]], ids=['no history', 'history'])
@FORMATS
def test_prefill_that_reads_the_cache(fmt, q_lens, device, monkeypatch):
    """The switch for measuring accuracy: new tokens are attended to as they were stored."""
    monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'cache')
    p, query, key, value = engine_problem(fmt, [18, 2], q_lens, device)
    out = run(triton_layer(), p, query, key, value, metadata(p, q_lens, False))
    oracle = expected_prefill(p, query, q_lens, *reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert frobenius(out, expected_prefill(p, query, q_lens, p.key, p.value)) > 1e-3


def test_the_switch_is_checked(monkeypatch):
    assert not prefill.prefill_reads_cache()
    for value, reads in (('raw', False), ('cache', True), (' Cache ', True)):
        monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', value)
        assert prefill.prefill_reads_cache() is reads
    monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'yes')
    with pytest.raises(ValueError, match=r"LMDEPLOY_KVQ_PREFILL.*'raw' and 'cache'"):
        prefill.prefill_reads_cache()


HISTORIES, NEW = [15, 0, 29, 3], [3, 2, 1, 4]
"""47 tokens of history and 10 new ones: a piece of 50 rows holds the history alone; of 17 rows it takes three."""


def in_pieces_of(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(prefill, 'PIECE_BYTES', rows * ROW_BYTES + ROW_BYTES // 2)


def problem_with_history(fmt, device):
    return engine_problem(fmt, [h + n for h, n in zip(HISTORIES, NEW, strict=True)], NEW, device)


@pytest.mark.parametrize('fmt, piece_rows', [(FIRST, 50), (FIRST, 5), *((fmt, 17) for fmt in kvq.FORMATS)],
                         ids=lambda x: by_name(x) or str(x))
def test_history_in_pieces(fmt, piece_rows, device, calls, monkeypatch):
    """Any number of pieces gives the attention over everything, whatever the sequences' lengths are."""
    in_pieces_of(monkeypatch, piece_rows)
    p, query, key, value = problem_with_history(fmt, device)
    out = run(fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    new, *pieces = calls
    assert new['rows'] == sum(NEW) and new['causal'] and new['lse']
    assert [call['rows'] for call in pieces] == [min(piece_rows, 47 - i) for i in range(0, 47, piece_rows)]
    assert all(call['lse'] and not call['causal'] for call in pieces)
    assert all(call['cu_seqlens_k'][-1] == call['rows'] for call in pieces), 'every row of a piece belongs to a token'


@pytest.mark.parametrize('features, expected', [({'scale': 0.4}, {'sm_scale': 0.4}),
                                                ({'logit_softcapping': 2.0}, {'softcap': 2.0})], ids=str)
def test_features_in_pieces(features, expected, device, calls, monkeypatch):
    in_pieces_of(monkeypatch, 17)
    p, query, key, value = problem_with_history(FIRST, device)
    out = run(fa3_layer(**features), p, query, key, value, metadata(p, NEW, False))
    oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW), **expected)
    assert len(calls) == 4
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('how', ['switch', 'shared cache'])
@pytest.mark.parametrize('piece_rows', [17, 1000])
def test_new_tokens_from_the_cache(how, piece_rows, device, calls, monkeypatch):
    """In one piece and in many: with the switch, and in layers that share another layer's cache (no key, no value)."""
    in_pieces_of(monkeypatch, piece_rows)
    p, query, key, value = problem_with_history(FIRST, device)
    if how == 'switch':
        monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'cache')
    else:
        reference.reshape_and_cache(p.key, p.value, p.cache, p.slots)
        key = value = None
    out = run(fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    oracle = expected_prefill(p, query, NEW, *reference.flatten(p.cache, p.block_table, p.kv_lens, torch.float32))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert len(calls) == {1000: 1, 17: 4}[piece_rows]


def test_a_long_prompt_without_history_is_one_call(device, calls, monkeypatch):
    """More new tokens than a piece holds: raw, or read from the cache, there is nothing to merge."""
    in_pieces_of(monkeypatch, 4)
    for reads_cache in ('raw', 'cache'):
        monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', reads_cache)
        p, query, key, value = engine_problem(FIRST, NEW, NEW, device)
        run(fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    assert [(call['rows'], call['lse']) for call in calls] == [(sum(NEW), False)] * 2


@pytest.mark.parametrize('piece_rows, pieces', [(57, None), (56, 1)])
def test_what_fits_one_piece_is_one_call(piece_rows, pieces, device, calls, monkeypatch):
    """History and new tokens within the limit (57 in all): one dense call, nothing merged."""
    in_pieces_of(monkeypatch, piece_rows)
    p, query, key, value = problem_with_history(FIRST, device)
    run(fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    assert [call['lse'] for call in calls] == ([False] if pieces is None else [True] * (1 + pieces))


def test_a_history_shorter_than_its_bound(device, calls, monkeypatch):
    """``kv_flatten_size`` counts tokens that LMDeploy dropped behind a window: the last pieces are empty, not wrong."""
    in_pieces_of(monkeypatch, 17)
    p, query, key, value = problem_with_history(FIRST, device)
    meta = metadata(p, NEW, False)
    meta.kv_flatten_size += 40
    out = run(fa3_layer(), p, query, key, value, meta)
    oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1 + 6 and calls[-1]['cu_seqlens_k'][-1] == 0


@pytest.mark.parametrize('make', [fa3_layer, triton_layer], ids=['fa3', 'triton'])
@pytest.mark.parametrize('window', [3, 7, 16, 68])
def test_only_what_a_window_shows_is_decoded(window, make, device, calls, monkeypatch):
    """Keys that no new token sees are left out in front; their pages may hold anything."""
    in_pieces_of(monkeypatch, 5)  # windows are bounded already, and never cut
    lens, q_lens = [70, 20, 3, 41], [5, 3, 3, 1]
    p, query, key, value = engine_problem(FIRST, lens, q_lens, device)
    attended = rows_attended_to(p, q_lens)
    block = p.cache.block_size
    for table, n, q_len in zip(p.block_table, lens, q_lens, strict=True):
        hidden = table[:max(n - q_len - window, 0) // block].long()
        p.cache.k_codes[hidden] = p.cache.v_codes[hidden] = 0xFF
        for x in (p.cache.k_scales, p.cache.v_scales):
            if x is not None:
                x[hidden] = float('nan')
    impl, shapes = make(sliding_window=(window, window)), []
    if make is triton_layer:
        def recording(query, key, value, **kwargs):
            shapes.append(key.size(0))
            return dense_attention(query, key, value, **kwargs)
        impl.flash_attention_fwd = recording
    meta = metadata(p, q_lens, False)
    out = run(impl, p, query, key, value, meta)
    oracle = expected_prefill(p, query, q_lens, *attended, window=window)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert (shapes or [call['rows'] for call in calls]) == [min(sum(lens), sum(q_lens) + 4 * window)]


@pytest.mark.parametrize('window, pieces', [(30, 3), (29, None)])
def test_a_window_that_hides_nothing_is_none(window, pieces, device, calls, monkeypatch):
    """The last of 31 tokens sees the first one: such a history may be cut, and one token less may not."""
    in_pieces_of(monkeypatch, 10)
    p, query, key, value = engine_problem(FIRST, [31], [1], device)
    out = run(fa3_layer(sliding_window=(window, window)), p, query, key, value, metadata(p, [1], False))
    oracle = expected_prefill(p, query, [1], *rows_attended_to(p, [1]), window=window)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    assert len(calls) == (1 if pieces is None else 1 + pieces)


def test_window_zero_means_no_window(device, calls):
    """As in decoding, and as LMDeploy's Triton kernels take it."""
    p, query, key, value = problem_with_history(FIRST, device)
    out = run(fa3_layer(sliding_window=(0, 0)), p, query, key, value, metadata(p, NEW, False))
    oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)


def test_triton_layers_are_never_cut(device, monkeypatch):
    """LMDeploy's kernel returns no log-sum-exp; sinks and ALiBi go there."""
    in_pieces_of(monkeypatch, 5)
    p, query, key, value = problem_with_history(FIRST, device)
    sinks = torch.linspace(-2, 3, HEADS, device=device)
    impl = triton_layer(alibi=True)
    impl.alibi_slopes = torch.linspace(0.1, 0.6, HEADS, device=device)
    out = impl.forward(query, key, value, p.cache.k_codes, p.cache.v_codes, metadata(p, NEW, False), **scales(p),
                       learnable_sink=sinks)
    oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW), sinks=sinks, alibi_slopes=impl.alibi_slopes)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)


def test_lengths_are_cut_once_per_step(device, calls, monkeypatch):
    """The first layer of a step computes what all layers share; new lengths in the same object are noticed."""
    in_pieces_of(monkeypatch, 40)
    counted = []
    cut = prefill._split_history
    monkeypatch.setattr(prefill, '_split_history', lambda *args, **kwargs: counted.append(1) or cut(*args, **kwargs))
    p, query, key, value = problem_with_history(FIRST, device)
    meta = metadata(p, NEW, False)
    results = [run(fa3_layer(), p, query, key, value, meta) for _ in range(2)]
    assert len(counted) == 1 and torch.equal(results[0], results[1])
    meta.kv_seqlens = meta.kv_seqlens.clone()
    assert torch.equal(run(fa3_layer(), p, query, key, value, meta), results[0]) and len(counted) == 2
    run(fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    assert len(counted) == 3


@pytest.mark.parametrize('library', ['renamed', 'old', 'without'])
def test_builds_of_flash_attention_3(library, device, monkeypatch):
    """The switch has had two names, and the first builds had none; one that cannot do it is refused by name."""
    calls: list[dict] = []
    attention = fa3.varlen_attention(calls)

    def renamed(*args, return_softmax_lse=False, **kwargs):
        return attention(*args, return_attn_probs=return_softmax_lse, **kwargs)

    def old(*args, **kwargs):
        return attention(*args, return_attn_probs=True, **kwargs)

    def without(*args, **kwargs):
        return attention(*args, **kwargs)

    fa3.provide(monkeypatch, {'renamed': renamed, 'old': old, 'without': without}[library])
    in_pieces_of(monkeypatch, 17)
    p, query, key, value = problem_with_history(FIRST, device)
    forward = functools.partial(run, fa3_layer(), p, query, key, value, metadata(p, NEW, False))
    if library == 'without':
        with pytest.raises(RuntimeError, match=r'returns no log-sum-exp.*return_attn_probs or return_softmax_lse'):
            forward()
    else:
        oracle = expected_prefill(p, query, NEW, *rows_attended_to(p, NEW))
        torch.testing.assert_close(forward().double(), oracle, rtol=1e-5, atol=1e-5)


def test_the_bound_that_the_docs_state():
    """65,536 tokens of 8 KV heads of 128, 16,384 of 32; in bf16."""
    assert [prefill.PIECE_BYTES // (heads * 256 * 2) for heads in (8, 32)] == [65_536, 16_384]
