"""In front of FlashAttention-3 on an engine's path, where the wheel (fa3_fwd) was built without pages.

LMDeploy's bf16 cache takes ``flash_attn_with_kvcache`` for several tokens of a sequence at once, and nothing else will
do; here that one function is plain torch, in fp32, so that bf16's rate of acceptance can be known. Formats of this
package do not call it.
"""
from __future__ import annotations

from typing import Any

import torch
from fa3_fwd_interface import *  # noqa: F403
from fa3_fwd_interface import flash_attn_varlen_func  # noqa: F401


def get_scheduler_metadata(batch_size: int, *args: Any, cache_seqlens: torch.Tensor | None = None,
                           **kwargs: Any) -> torch.Tensor:
    """Nothing that is read: int32 [1], on the device of the lengths."""
    lens = next(x for x in (cache_seqlens, *args) if isinstance(x, torch.Tensor))
    return torch.zeros(1, dtype=torch.int32, device=lens.device)


def flash_attn_with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
                            cache_seqlens: torch.Tensor, page_table: torch.Tensor, softmax_scale: float,
                            causal: bool, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                            **kwargs: Any) -> torch.Tensor:
    """Causal attention of the newest tokens, which are in the cache already.

    Args:
        q: [batch, tokens, heads, dim]; k_cache, v_cache: [blocks, page, kv_heads, dim]; page_table: [batch, pages], of
            which those beyond the length may be any.
    """
    if not causal or softcap or tuple(window_size) != (-1, -1):
        raise NotImplementedError('causal attention alone')
    pages = page_table.clamp(0, k_cache.size(0) - 1).long()
    k, v = (cache[pages].flatten(1, 2).float().repeat_interleave(q.size(2) // cache.size(2), 2)
            for cache in (k_cache, v_cache))
    position = torch.arange(k.size(1), device=q.device)
    last = cache_seqlens[:, None] - q.size(1) + torch.arange(q.size(1), device=q.device)
    unseen = position > last[:, :, None]  # [batch, tokens, positions]
    v = v.masked_fill((position >= cache_seqlens[:, None])[:, :, None, None], 0.0)  # what no token sees may be NaN
    scores = torch.einsum('bthd,bshd->bhts', q.float(), k) * softmax_scale
    weights = scores.masked_fill(unseen[:, None], float('-inf')).softmax(-1)
    return torch.einsum('bhts,bshd->bthd', weights, v).to(q.dtype)
