"""LMDeploy's attention calls on our pages: write the new tokens, then decode or prefill."""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..formats import KVFormat, find_format
from ..kernels.decode import decode
from ..kernels.fill import TokenLayout, fill
from ..kernels.flatten import NewTokens, flatten
from ..paged import PagedCache
from . import observer


def prefill_reads_cache() -> bool:
    """True with ``LMDEPLOY_KVQ_PREFILL=cache``: prefill attends to the quantized new tokens too, to measure accuracy.

    By default new tokens are attended to as they came, and a prompt without history is exact.
    """
    value = os.environ.get('LMDEPLOY_KVQ_PREFILL', 'raw').strip().lower()
    if value not in ('raw', 'cache'):
        raise ValueError(f"LMDEPLOY_KVQ_PREFILL is {value!r}; known are 'raw' and 'cache'")
    return value == 'cache'


def forward(original: Callable[..., torch.Tensor], impl: Any, query: torch.Tensor, key: torch.Tensor | None,
            value: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor, attn_metadata: Any,
            k_scales_zeros: torch.Tensor | None = None, v_scales_zeros: torch.Tensor | None = None,
            learnable_sink: torch.Tensor | None = None, inplace: bool = True, **kwargs: Any) -> torch.Tensor:
    """``TritonAttentionImpl.forward`` / ``FA3Impl.forward``: ours where the policy is ours, else the original."""
    fmt = find_format(attn_metadata.quant_policy)
    if fmt is None:
        if observer.ACTIVE is not None:
            observer.ACTIVE.see(impl, query, key, value, attn_metadata)
        return original(impl, query, key, value, k_cache, v_cache, attn_metadata, k_scales_zeros=k_scales_zeros,
                        v_scales_zeros=v_scales_zeros, learnable_sink=learnable_sink, inplace=inplace, **kwargs)
    cache = page_views(fmt, k_cache, v_cache, k_scales_zeros, v_scales_zeros)
    batch = attn_metadata.q_seqlens.size(0)
    query_len = query.size(0) // batch if attn_metadata.is_decoding else 0
    if key is not None and value is not None:
        fill(key, value, cache, TokenLayout(q_start=attn_metadata.q_start_loc, q_lens=attn_metadata.q_seqlens,
                                            kv_lens=attn_metadata.kv_seqlens, block_table=attn_metadata.block_offsets,
                                            uniform_query_len=query_len))
    if attn_metadata.is_decoding:
        out = query.new_empty((*query.shape[:2], cache.v_head_dim))
        return decode(query, cache, attn_metadata.block_offsets, attn_metadata.kv_seqlens, out, query_len=query_len,
                      sm_scale=impl.scale, window=_window(impl), softcap=_softcap(impl), sinks=learnable_sink,
                      alibi_slopes=impl.alibi_slopes if impl.alibi else None)
    return _prefill(impl, query, key, value, cache, attn_metadata, learnable_sink)


def page_views(fmt: KVFormat, k_cache: torch.Tensor, v_cache: torch.Tensor, k_scale: torch.Tensor | None,
               v_scale: torch.Tensor | None) -> PagedCache:
    """LMDeploy's views of one layer as a :class:`PagedCache`.

    The scale arguments carry what the format stores: per-(token, head) scales from the pool, or the attention layer's
    static scale buffers.
    """
    per_k, per_v = fmt.key.per_token_head, fmt.value.per_token_head
    return PagedCache(fmt, k_cache, v_cache, k_scale if per_k else None, v_scale if per_v else None,
                      None if per_k else k_scale, None if per_v else v_scale)


def _window(impl: Any) -> int | None:
    window = impl.sliding_window
    left = window if window is None or isinstance(window, int) else window[0]
    return None if left is None or left <= 0 else left


def _softcap(impl: Any) -> float | None:
    return impl.logit_softcapping if impl.logit_softcapping > 0 else None


def _prefill(impl: Any, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, cache: PagedCache,
             meta: Any, sink: torch.Tensor | None) -> torch.Tensor:
    """Prefill: the raw new tokens alone where there is no history, else history decoded beside them."""
    raw = key is not None and value is not None and not prefill_reads_cache()
    if raw and meta.kv_flatten_size == query.size(0):
        return _varlen_attention(impl, query, key, value, meta, meta.cu_seqlens_q, sink)  # type: ignore[arg-type]
    rows = meta.kv_flatten_size
    dense_k, dense_v = (torch.empty((rows, cache.num_kv_heads, dim), dtype=query.dtype, device=query.device)
                        for dim in (cache.head_dim, cache.v_head_dim))
    new = NewTokens(key, value, meta.q_start_loc, meta.q_seqlens, _window(impl)) if raw else None  # type: ignore[arg-type]
    flatten(cache, meta.block_offsets, meta.kv_seqlens, dense_k, dense_v, rows, new)
    return _varlen_attention(impl, query, dense_k, dense_v, meta, meta.cu_seqlens_k, sink)


def _varlen_attention(impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, meta: Any,
                      cu_seqlens_k: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """The engine's own dense attention: FlashAttention-3 where LMDeploy chose it, else its Triton kernel."""
    max_q_seqlen = impl._get_max_q_seqlen(query, meta)
    shared = dict(cu_seqlens_q=meta.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q_seqlen,
                  max_seqlen_k=meta.max_kv_seqlen, softmax_scale=impl.scale, causal=impl.causal,
                  softcap=impl.logit_softcapping)
    if hasattr(impl, 'flash_attn_varlen_func_v3'):
        return impl.flash_attn_varlen_func_v3(q=query, k=key, v=value,
                                              window_size=impl._normalize_sliding_window(impl.sliding_window), **shared)
    return impl.flash_attention_fwd(query, key, value, window_size=impl.sliding_window, sinks=sink,
                                    alibi_slopes=impl.alibi_slopes, block_sparse_size=impl.block_sparse_size,
                                    kv_layout='shd', **shared)
