"""Prefill: new tokens attend to themselves and to a quantized history, in bounded memory.

The attention is the engine's own: FlashAttention-3 where LMDeploy chose it, else LMDeploy's Triton kernel. What it
reads of the history is decoded for it, one layer at a time, and with FlashAttention-3 one piece at a time.
"""
from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad

from ..kernels.flatten import NewTokens, flatten
from ..kernels.merge import merge
from ..paged import PagedCache

PIECE_BYTES = 256 * 2**20
"""Decoded history that exists at a time, in bytes: 65,536 tokens of 8 KV heads of 128 + 128 elements in bf16.

A piece costs one more pass over the output (merge), which has to be little beside the attention over the piece. Per
element of the output, merging moves at most 10 bytes and attention does 4 operations per key. Where a GPU does 135
operations in the time of a byte (600 TFLOP/s and 4.4 TB/s, an estimate for an H200), that is 2 % at 16,384 keys, a
piece of 32 KV heads of 128, and 0.5 % at 65,536.
"""

_LSE_FLAGS = ('return_attn_probs', 'return_softmax_lse')
"""What FlashAttention-3's builds call the switch that makes ``flash_attn_varlen_func`` return the log-sum-exp as well;
builds from before there was a switch always return it."""

T = TypeVar('T')


def prefill_reads_cache() -> bool:
    """True with ``LMDEPLOY_KVQ_PREFILL=cache``: prefill attends to the quantized new tokens too, to measure accuracy.

    By default new tokens are attended to as they came, and a prompt without history is exact.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get('LMDEPLOY_KVQ_PREFILL', '').strip().lower() or 'raw'
    if value not in ('raw', 'cache'):
        raise ValueError(f"LMDEPLOY_KVQ_PREFILL is {value!r}; known are 'raw' and 'cache'")
    return value == 'cache'


def window_of(impl: Any) -> int | None:
    """How many earlier tokens a token of this layer sees besides itself; None: all."""
    window = impl.sliding_window
    left = window if window is None or isinstance(window, int) else window[0]
    return None if left is None or left <= 0 else left


def prefill(impl: Any, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, cache: PagedCache,
            meta: Any, sink: torch.Tensor | None, piece_bytes: int | None = None) -> torch.Tensor:
    """Attention of a prefill step; the new tokens are already written to ``cache``.

    Args:
        impl: LMDeploy's attention implementation of this layer.
        query: [tokens, heads, head_dim].
        key: [tokens, kv_heads, head_dim]; value: [tokens, kv_heads, v_head_dim]; None where another layer wrote them.
        cache: the layer's pages.
        meta: LMDeploy's metadata of the step.
        sink: [heads] one extra logit per head, or None.
        piece_bytes: see ``PIECE_BYTES``, its default.

    Returns:
        [tokens, heads, v_head_dim] in query's dtype.
    """
    tokens, rows, window = query.size(0), meta.kv_flatten_size, window_of(impl)
    raw = None
    if key is not None and value is not None and not prefill_reads_cache():
        raw = NewTokens(key, value, meta.q_start_loc, meta.q_seqlens)
        if rows == tokens:
            return dense_attention(impl, query, key, value, meta, meta.cu_seqlens_q, sink)
    first, cu_seqlens = None, meta.cu_seqlens_k
    if window is not None and window < meta.max_kv_seqlen - 1:  # else it hides nothing
        rows = min(rows, tokens + window * meta.q_seqlens.size(0))
        first, cu_seqlens = _per_step(meta, ('window', window), functools.partial(_visible, window=window))
    elif hasattr(impl, 'flash_attn_varlen_func_v3'):
        bytes_per_token = cache.num_kv_heads * (cache.head_dim + cache.v_head_dim) * query.element_size()
        piece_rows = max((PIECE_BYTES if piece_bytes is None else piece_bytes) // bytes_per_token, 1)
        if rows > max(piece_rows, tokens):
            return _attention_in_pieces(impl, query, cache, meta, raw, piece_rows)
    dense = _workspace(cache, rows, query.dtype)
    flatten(cache, meta.block_offsets, meta.kv_seqlens, *dense, rows, raw, first)
    return dense_attention(impl, query, *dense, meta, cu_seqlens, sink)


def _workspace(cache: PagedCache, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for decoded tokens: [rows, kv_heads, head_dim] and [rows, kv_heads, v_head_dim]."""
    key, value = (torch.empty((rows, cache.num_kv_heads, dim), dtype=dtype, device=cache.k_codes.device)
                  for dim in (cache.head_dim, cache.v_head_dim))
    return key, value


def dense_attention(impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, meta: Any,
                     cu_seqlens_k: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """The engine's dense attention, causal and windowed as the layer is.

    ``meta.max_kv_seqlen`` may be more than there are keys. Both kernels align a sequence's queries to the end of its
    keys, so that keys nobody sees can be left out in front.
    """
    max_q_seqlen = impl._get_max_q_seqlen(query, meta)
    shared = dict(cu_seqlens_q=meta.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q_seqlen,
                  max_seqlen_k=meta.max_kv_seqlen, softmax_scale=impl.scale, causal=impl.causal,
                  softcap=impl.logit_softcapping)
    if hasattr(impl, 'flash_attn_varlen_func_v3'):
        window = (-1, -1) if window_of(impl) is None else impl._normalize_sliding_window(impl.sliding_window)
        return impl.flash_attn_varlen_func_v3(q=query, k=key, v=value, window_size=window, **shared)
    return impl.flash_attention_fwd(query, key, value, window_size=impl.sliding_window, sinks=sink,
                                    alibi_slopes=impl.alibi_slopes, block_sparse_size=impl.block_sparse_size,
                                    kv_layout='shd', **shared)


# ---- what a step's layers share


def _per_step(meta: Any, key: tuple[Any, ...], build: Callable[[torch.Tensor, torch.Tensor], T]) -> T:
    """``build(kv_lens, q_lens)``, computed by the first layer of a step that asks, and kept on the step's metadata.

    LMDeploy makes a new metadata object per prefill step, also where prefill replays piecewise graphs (attention stays
    eager between them, with the live request's metadata). The tensors that the result was made from are compared all
    the same: whoever replaces them gets a new one.
    """
    lens = meta.kv_seqlens, meta.q_seqlens
    kept = getattr(meta, '_kvq_prefill', None)
    if kept is None or any(a is not b for a, b in zip(kept[0], lens)):
        kept = meta._kvq_prefill = (lens, {})
    plans: dict[tuple[Any, ...], Any] = kept[1]
    if key not in plans:
        plans[key] = build(*lens)
    return plans[key]


def _cumulative(lens: torch.Tensor) -> torch.Tensor:
    """[..., n] lengths to [..., n + 1] int32 offsets, from 0 to the sum."""
    return pad(lens.cumsum(-1, dtype=torch.int32), (1, 0))


def _visible(kv_lens: torch.Tensor, q_lens: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First position that any new token sees, [batch], and offsets [batch + 1] of the tokens from there on."""
    first = (kv_lens - q_lens - window).clamp_(min=0)
    return first, _cumulative(kv_lens - first)


@dataclass(frozen=True)
class _Piece:
    """A part of the batch's history, on the device.

    Attributes:
        first, last: [batch] range of positions of every sequence, often empty.
        cu_seqlens: [batch + 1] int32 offsets of the ranges' rows.
        rows: upper bound of the rows in all.
    """
    first: torch.Tensor
    last: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: int


def _split_history(kv_lens: torch.Tensor, q_lens: torch.Tensor, total: int,
                   piece_rows: int) -> tuple[torch.Tensor, list[_Piece]]:
    """Lengths of the history, [batch], and its pieces.

    The histories of all sequences, laid end to end, are cut every ``piece_rows`` tokens: as few pieces as there can be
    however ragged the batch is, and as many as the host can count without asking the device.

    Args:
        kv_lens, q_lens: [batch] cached tokens with the new ones, and new tokens.
        total: upper bound of the history's tokens.
        piece_rows: tokens of a piece.
    """
    history = kv_lens - q_lens
    start = history.cumsum(0) - history
    ends = torch.arange(0, total + piece_rows, piece_rows, device=kv_lens.device)
    cuts = torch.minimum((ends[:, None] - start).clamp_(min=0), history)
    cu_seqlens = _cumulative(cuts[1:] - cuts[:-1])
    return history, [_Piece(cuts[i], cuts[i + 1], cu_seqlens[i], min(piece_rows, total - i * piece_rows))
                     for i in range(cu_seqlens.size(0))]


# ---- FlashAttention-3, piece by piece


@functools.cache
def _with_lse(attention: Callable[..., Any]) -> Callable[..., Any]:
    """FlashAttention-3's own function behind LMDeploy's wrapper (which drops the log-sum-exp), asked to return it."""
    library = inspect.unwrap(attention)
    flag = next((name for name in _LSE_FLAGS if name in inspect.signature(library).parameters), None)
    return functools.partial(library, **{flag: True}) if flag else library


def _attention_in_pieces(impl: Any, query: torch.Tensor, cache: PagedCache, meta: Any, raw: NewTokens | None,
                         piece_rows: int) -> torch.Tensor:
    """New tokens attend to each other, then to the history piece by piece; the results are merged as they come.

    The running output is fp32 if it is merged more than once, so that it is rounded as often as a single pass rounds.
    """
    tokens, total = query.size(0), meta.kv_flatten_size - query.size(0)
    history, pieces = _per_step(meta, ('pieces', total, piece_rows),
                                functools.partial(_split_history, total=total, piece_rows=piece_rows))
    max_q_seqlen = impl._get_max_q_seqlen(query, meta)

    def attend(key: torch.Tensor, value: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_k: int,
               causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        result = _with_lse(impl.flash_attn_varlen_func_v3)(
            q=query, k=key, v=value, cu_seqlens_q=meta.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_q_seqlen, max_seqlen_k=max_seqlen_k, softmax_scale=impl.scale, causal=causal,
            softcap=impl.logit_softcapping)
        if not isinstance(result, (tuple, list)):
            raise RuntimeError('this FlashAttention-3 build returns no log-sum-exp, which prefill with a long history '
                               'needs; known are builds with ' + ' or '.join(_LSE_FLAGS))
        return result[0], result[1]

    if raw is not None:
        new_key, new_value = raw.key, raw.value
    else:
        new_key, new_value = _workspace(cache, tokens, query.dtype)
        flatten(cache, meta.block_offsets, meta.kv_seqlens, new_key, new_value, tokens, first=history)
    out, lse = attend(new_key, new_value, meta.cu_seqlens_q, max_q_seqlen, impl.causal)
    key, value = _workspace(cache, pieces[0].rows, query.dtype)
    running = out
    for number, piece in enumerate(pieces, 1):
        flatten(cache, meta.block_offsets, piece.last, key, value, piece.rows, first=piece.first)
        part, part_lse = attend(key[:piece.rows], value[:piece.rows], piece.cu_seqlens,
                                min(piece.rows, meta.max_kv_seqlen), False)
        target = out if number == len(pieces) else torch.empty_like(out, dtype=torch.float32) if running is out \
            else running
        merge(running, lse, part, part_lse, target)
        running = target
        del part, part_lse  # the next piece's may take their place
    return out
