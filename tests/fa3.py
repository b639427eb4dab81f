"""FlashAttention-3's varlen attention in torch, for machines without a GPU: its signature, conventions and refusals.

Read in hopper/flash_attn_interface.py, flash_api.cpp, mask.h and flash_fwd_kernel_sm90.h of Dao-AILab/flash-attention
and in fa3_fwd 0.0.3: masks are aligned to the last key, ``causal`` overrides the right side of a window, a window that
``max_seqlen_k`` fits into is none, and rows without a key are zeros with a log-sum-exp of -inf (+inf if no sequence of
the batch has a key).
"""
from __future__ import annotations

import sys
import types
from collections.abc import Callable

import torch
from helpers import finite

WRAPPER = 'lmdeploy.pytorch.third_party.flash_attn_interface'


def _one_sequence(q, k, v, scale: float, softcap: float, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scores = torch.einsum('qhd,khd->hqk', q.double(), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(k.size(0), device=q.device)
    diagonal = torch.arange(q.size(0), device=q.device)[:, None] + k.size(0) - q.size(0)
    hidden = torch.zeros_like(diagonal + key, dtype=torch.bool)
    if left >= 0:
        hidden |= key < diagonal - left
    if right >= 0:
        hidden |= key > diagonal + right
    lse = scores.masked_fill(hidden, float('-inf')).logsumexp(-1)
    weights = (scores - lse[..., None].clamp(min=-1e30)).exp().masked_fill(hidden, 0)
    return torch.einsum('hqk,khd->qhd', weights, v), lse


def varlen_attention(calls: list[dict]) -> Callable:
    """``flash_attn_varlen_func`` as fa3_fwd 0.0.3 has it; appends the arguments of each call to ``calls``."""
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
        calls.append({'rows': k.size(0), 'cu_seqlens_k': cu_seqlens_k.clone(), 'causal': causal,
                      'lse': return_attn_probs})
        assert q.dtype == k.dtype == v.dtype and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert finite(k) and finite(v), 'the kernel multiplies what lies behind the last key by zero'
        assert k.stride(-1) == v.stride(-1) == 1 and cu_seqlens_k.is_contiguous()
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert q_ends[-1] == q.size(0) and k_ends[-1] <= k.size(0)
        left, right = window_size
        left = -1 if left >= max_seqlen_k - 1 else left
        right = 0 if causal else -1 if right >= max_seqlen_q - 1 else right
        out = q.new_zeros((*q.shape[:2], v.size(2)))
        lse = torch.full((q.size(1), q.size(0)), float('inf'), dtype=torch.float32, device=q.device)
        for i in range(len(q_ends) - 1 if k.size(0) else 0):
            of_q, of_k = slice(*q_ends[i:i + 2]), slice(*k_ends[i:i + 2])
            assert of_q.stop - of_q.start <= max_seqlen_q and of_k.stop - of_k.start <= max_seqlen_k
            rows, lse_rows = _one_sequence(q[of_q], k[of_k], v[of_k], softmax_scale, softcap, left, right)
            out[of_q], lse[:, of_q] = rows.to(q.dtype), lse_rows.float()
        return (out, lse) if return_attn_probs else out

    return flash_attn_varlen_func


def provide(monkeypatch, library: Callable) -> None:
    """Let LMDeploy's own wrapper find ``library``, as it finds FlashAttention-3 where that is installed."""
    module = types.ModuleType('flash_attn_interface')
    module.flash_attn_varlen_func = library
    module.flash_attn_with_kvcache = lambda *args, **kwargs: 1 / 0  # prefill has no use for it
    monkeypatch.setitem(sys.modules, 'flash_attn_interface', module)
    monkeypatch.setitem(sys.modules, WRAPPER, None)  # so that monkeypatch puts back what was there
    del sys.modules[WRAPPER]
