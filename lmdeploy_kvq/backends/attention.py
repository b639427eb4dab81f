"""LMDeploy's attention calls on our pages: write the new tokens, then decode or prefill."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..formats import KVFormat, find_format
from ..kernels.decode import MAX_GROUP, decode
from ..kernels.fill import TokenLayout, fill
from ..kernels.workspace import Workspace
from ..paged import PagedCache
from ..transforms import Transform
from . import calibrating, observer
from .prefill import prefill, window_of

TRANSFORM = '_kvq_k_transform'
"""Attribute of an attention implementation: the layer's calibrated transform of K, where it has one."""


def forward(original: Callable[..., torch.Tensor], impl: Any, query: torch.Tensor, key: torch.Tensor | None,
            value: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor, attn_metadata: Any,
            k_scales_zeros: torch.Tensor | None = None, v_scales_zeros: torch.Tensor | None = None,
            learnable_sink: torch.Tensor | None = None, inplace: bool = True, **kwargs: Any) -> torch.Tensor:
    """``TritonAttentionImpl.forward`` / ``FA3Impl.forward``: ours where the policy is ours, else the original."""
    fmt = find_format(attn_metadata.quant_policy)
    if fmt is None:
        watcher = observer.ACTIVE  # read once: another thread may take it away
        if watcher is not None:
            watcher.see(impl, query, key, value, attn_metadata)
        return original(impl, query, key, value, k_cache, v_cache, attn_metadata, k_scales_zeros=k_scales_zeros,
                        v_scales_zeros=v_scales_zeros, learnable_sink=learnable_sink, inplace=inplace, **kwargs)
    cache = page_views(fmt, k_cache, v_cache, query.size(-1), impl.v_head_size, k_scales_zeros, v_scales_zeros,
                       getattr(impl, TRANSFORM, None))
    pending = getattr(impl, calibrating.ATTRIBUTE, None)
    if pending is not None and pending.owner.active:
        exact = pending.forward(query, key, value, cache, attn_metadata, learnable_sink)
        if exact is not None:
            return exact
    batch = attn_metadata.q_seqlens.size(0)
    query_len = query.size(0) // batch if attn_metadata.is_decoding else 0
    layout = TokenLayout(q_start=attn_metadata.q_start_loc, q_lens=attn_metadata.q_seqlens,
                         kv_lens=attn_metadata.kv_seqlens, block_table=attn_metadata.block_offsets,
                         uniform_query_len=query_len)
    if attn_metadata.is_decoding and impl.block_sparse_size > 1:
        fill(key, value, cache, layout)
        return _both_ways(impl, query, cache, attn_metadata, query_len)
    if attn_metadata.is_decoding:
        workspace = Workspace.allocate(query, cache, batch, query_len)
        out = query.new_empty((*query.shape[:2], cache.v_head_dim))
        fill(key, value, cache, layout, workspace.inputs(query))
        return decode(query, cache, attn_metadata.block_offsets, attn_metadata.kv_seqlens, out, query_len=query_len,
                      sm_scale=impl.scale, window=window_of(impl), softcap=_softcap(impl), sinks=learnable_sink,
                      alibi_slopes=impl.alibi_slopes if impl.alibi else None, workspace=workspace, filled=True,
                      padded=True)
    if key is not None and value is not None:
        fill(key, value, cache, layout)
    return prefill(impl, query, key, value, cache, attn_metadata, learnable_sink)


def _both_ways(impl: Any, query: torch.Tensor, cache: PagedCache, meta: Any, query_len: int) -> torch.Tensor:
    """Decoding of block diffusion: the tokens of a block see each other, whichever comes first, and all before them.

    Tokens that see the same keys are to the kernel what heads of the same KV head are: more queries of one token.

    Args:
        query: [batch * query_len, heads, head_dim]; the tokens are written.

    Returns:
        [batch * query_len, heads, v_head_dim].
    """
    group = query.size(1) // cache.num_kv_heads
    # [batch, token, kv_head, group, dim]
    tokens = query.unflatten(0, (-1, query_len)).unflatten(2, (cache.num_kv_heads, group))
    out = query.new_empty((*tokens.shape[:-1], cache.v_head_dim))
    for part, result in zip(*(x.split(MAX_GROUP // group, dim=1) for x in (tokens, out))):
        rows = part.transpose(1, 2).flatten(1, 3).contiguous()  # [batch, kv_head * token * group, dim]
        done = decode(rows, cache, meta.block_offsets, meta.kv_seqlens, rows.new_empty((*rows.shape[:2], out.size(-1))),
                      query_len=1, sm_scale=impl.scale, softcap=_softcap(impl))
        result.copy_(done.unflatten(1, (cache.num_kv_heads, part.size(1), group)).transpose(1, 2))
    return out.flatten(2, 3).flatten(0, 1)


def page_views(fmt: KVFormat, k_cache: torch.Tensor, v_cache: torch.Tensor, head_dim: int, v_head_dim: int,
               k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
               k_transform: Transform | None = None) -> PagedCache:
    """LMDeploy's views of one layer as a :class:`PagedCache`.

    The scale arguments carry what the format stores: per-(token, head) scales from the pool, or the attention layer's
    static scale buffers.
    """
    per_k, per_v = fmt.key.per_token_head, fmt.value.per_token_head
    return PagedCache(fmt, k_cache, v_cache, head_dim, v_head_dim, k_scale if per_k else None,
                      v_scale if per_v else None, None if per_k else k_scale, None if per_v else v_scale, k_transform)


def _softcap(impl: Any) -> float | None:
    return impl.logit_softcapping if impl.logit_softcapping > 0 else None
