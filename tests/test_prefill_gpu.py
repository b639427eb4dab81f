"""Prefill on a GPU: with FlashAttention-3 itself, through LMDeploy's own Triton kernel, and its peak memory."""
from __future__ import annotations

import pytest
import torch
from helpers import finite, frobenius, problem
from layers import engine_problem, layer, metadata, new_rows
from test_prefill import FIRST, expected_prefill, installed, rows_attended_to, run  # noqa: F401  a fixture

from lmdeploy_kvq.backends import prefill


@pytest.fixture
def gpu_case(device):
    """``case(histories, new lengths, **layer)``: a problem, its query, and ``call(piece_rows)`` of a bf16 layer.

    32 query and 8 KV heads of 128; without ``piece_rows`` the limit is the engine's.
    """
    from lmdeploy.pytorch.backends.cuda.attention import use_fa3
    if not use_fa3:
        pytest.skip('needs FlashAttention-3')
    from lmdeploy.pytorch.backends.cuda.attention.fa3 import FA3Impl

    def case(histories, q_lens, **features):
        lens = [h + n for h, n in zip(histories, q_lens, strict=True)]
        p = problem(FIRST, lens, device=device, kv_heads=8, head_dim=128, block_size=64, dtype=torch.bfloat16,
                    pooled=True)
        query = torch.randn(sum(q_lens), 32, 128, generator=torch.Generator().manual_seed(3)).bfloat16().to(device)
        new, meta = new_rows(p, q_lens), metadata(p, q_lens, False)
        impl, key, value = FA3Impl(32, 128, num_kv_heads=8, **features), p.key[new], p.value[new]

        def call(piece_rows: int | None = None) -> torch.Tensor:
            limit = None if piece_rows is None else piece_rows * 8 * 256 * 2
            return prefill.prefill(impl, query, key, value, p.cache, meta, None, piece_bytes=limit)

        return p, query, call

    return case


@pytest.mark.gpu
@pytest.mark.parametrize('piece_rows', [7100, 1024, 640])
@pytest.mark.parametrize('softcap', [0.0, 30.0])
def test_pieces_on_the_gpu(piece_rows, softcap, gpu_case):
    """As close to fp64 as the dense call is, and finite for sequences that have nothing in a piece."""
    histories, q_lens = [5000, 0, 64, 1, 2000, 0], [300, 700, 1, 129, 64, 1]
    p, query, call = gpu_case(histories, q_lens, logit_softcapping=softcap)
    dense, out = call(), call(piece_rows)
    oracle = expected_prefill(p, query, q_lens, *rows_attended_to(p, q_lens), softcap=softcap)
    assert finite(out) and not torch.equal(out, dense)
    assert frobenius(out, oracle) <= 1.3 * frobenius(dense, oracle) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize('window', [100, 8191])
def test_windows_on_the_gpu(window, gpu_case):
    """Left-out keys change nothing. (fa3_fwd is built without local attention: then only a window wider than all.)"""
    histories, q_lens = [5000, 0, 64, 1], [300, 700, 1, 129]
    p, query, call = gpu_case(histories, q_lens, sliding_window=(window, window))
    try:
        out = call()
    except RuntimeError as error:
        assert 'does not support local attention' in str(error)
        pytest.skip('this FlashAttention-3 build has no local attention')
    oracle = expected_prefill(p, query, q_lens, *rows_attended_to(p, q_lens), window=window)
    assert frobenius(out, oracle) <= 1e-2


@pytest.mark.gpu
def test_a_window_through_lmdeploys_triton_kernel(device):
    """The kernel itself, not its stand-in: queries are aligned to the last key, whatever was left out in front."""
    histories, q_lens = [700, 0, 64, 1], [60, 70, 1, 29]
    lens = [h + n for h, n in zip(histories, q_lens, strict=True)]
    p, query, key, value = engine_problem(FIRST, lens, q_lens, device)
    query, key, value = (x.bfloat16() for x in (query, key, value))
    out = run(layer(sliding_window=(100, 100)), p, query, key, value, metadata(p, q_lens, False))
    oracle = expected_prefill(p, query, q_lens, *rows_attended_to(p, q_lens), window=100)
    assert frobenius(out, oracle) <= 1e-2


@pytest.mark.gpu
def test_peak_memory_on_the_gpu(gpu_case):
    """A chunk of 2,048 tokens after 200,000 cached ones: four pieces, within the documented bound."""
    _, query, call = gpu_case([200_000], [2048])
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= prefill.PIECE_BYTES + out.numel() * (2 + 4) + query.size(0) * 32 * 8 + 2**22
    assert extra < 202_048 * 8 * 256 * 2 / 2, 'half the history at once'
