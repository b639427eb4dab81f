"""The specification in plain PyTorch: encoding, page layout, and attention over a paged cache.

Slow and simple on purpose; it runs on any device and is what the kernels are tested against. Functions take the same
arguments as the public ones in :mod:`lmdeploy_kvq.paged`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .formats import GROUP, Codec, Encoding, stored_dim

if TYPE_CHECKING:
    from .paged import PagedCache

MIN_SCALE = 1e-6
"""Smallest per-token-head scale (vLLM's floor): a row of zeros keeps a usable scale."""

MAX_INPUT = 65504.0
"""Largest magnitude stored, fp16's maximum: larger values and infinities saturate here (see docs/formats.md)."""

_FP8_DTYPES = {'e4m3': torch.float8_e4m3fn, 'e5m2': torch.float8_e5m2}


def encode_codes(scaled: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Codes of values already divided by their scale.

    Args:
        scaled: any shape, fp32.
        codec: the number format. ``int8`` is stored offset-binary (code = n + 128).

    Returns:
        uint8 tensor of the same shape. Values beyond ``codec.qmax`` saturate; ties round to even.
    """
    clamped = scaled.float().clamp(-codec.qmax, codec.qmax)
    if codec.name in _FP8_DTYPES:
        return clamped.to(_FP8_DTYPES[codec.name]).view(torch.uint8)
    if codec.name == 'int8':
        return (clamped.round() + 128).to(torch.uint8)
    raise ValueError(f'codec {codec.name!r} has no reference arithmetic')


def decode_codes(codes: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Inverse of :func:`encode_codes`: fp32 values, scale not applied."""
    if codec.name in _FP8_DTYPES:
        return codes.view(_FP8_DTYPES[codec.name]).float()
    if codec.name == 'int8':
        return codes.float() - 128
    raise ValueError(f'codec {codec.name!r} has no reference arithmetic')


def encode(x: torch.Tensor, encoding: Encoding, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows.

    Per-token-head: ``scale = max(absmax / qmax, 1e-6)`` over the last axis (vLLM's per-token-head rule).
    Static: ``scale`` is given. Value = code x scale.

    Args:
        x: [..., heads, head_dim], any float dtype.
        encoding: codec and scale granularity.
        scale: static scale, fp32, a scalar or [heads]; only for static encodings.

    Returns:
        codes uint8 [..., heads, head_dim] and scale fp32: [..., heads], or the static scale given.
    """
    x = x.float().clamp(-MAX_INPUT, MAX_INPUT)
    if encoding.per_token_head:
        scale = (x.abs().amax(-1) / encoding.codec.qmax).clamp(min=MIN_SCALE)
        return encode_codes(x / scale[..., None], encoding.codec), scale
    if scale is None:
        raise ValueError('a static encoding needs its scale')
    return encode_codes(x / scale[..., None], encoding.codec), scale


def decode(codes: torch.Tensor, encoding: Encoding, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`encode`: fp32 values of codes [..., heads, head_dim] with scale [..., heads], [heads] or []."""
    return decode_codes(codes, encoding.codec) * scale[..., None]


def _pages(cache: PagedCache, slots: torch.Tensor) -> list[tuple[Any, ...]]:
    """Of K and of V: encoding, row size, codes token by token, their index by ``slots``, and the two kinds of scale."""
    block, offset = slots // cache.block_size, slots % cache.block_size
    group = offset // GROUP
    of_k = (block, slice(None), group, offset // 8 % 2, offset % 8)
    of_v = (block, slice(None), group, offset // 4 % 4, offset % 4)
    return [(cache.format.key, cache.head_dim, cache.k_rows, of_k, cache.k_scales, cache.k_static_scale),
            (cache.format.value, cache.v_head_dim, cache.v_rows, of_v, cache.v_scales, cache.v_static_scale)]


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
    """Quantize and write new tokens; see :func:`lmdeploy_kvq.reshape_and_cache`."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    for x, (encoding, dim, codes, where, scales, static) in zip((key, value), _pages(cache, slots)):
        padded = torch.nn.functional.pad(x[written], (0, stored_dim(dim) - dim))
        new_codes, new_scales = encode(padded, encoding, static)
        codes[where] = new_codes.unflatten(-1, codes.shape[len(where):])
        if encoding.per_token_head:
            scales[slots // cache.block_size, :, slots % cache.block_size] = new_scales


def gather(cache: PagedCache, block_table: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's decoded K and V.

    Args:
        cache: the paged cache.
        block_table: [max_blocks] page ids of the sequence.
        kv_len: tokens to read.

    Returns:
        key [kv_len, kv_heads, head_dim], value [kv_len, kv_heads, v_head_dim], fp32.
    """
    position = torch.arange(kv_len, device=block_table.device)
    slots = block_table[position // cache.block_size].long() * cache.block_size + position % cache.block_size
    out = []
    for encoding, dim, codes, where, scales, static in _pages(cache, slots):
        scale = scales[slots // cache.block_size, :, slots % cache.block_size] if encoding.per_token_head else static
        out.append(decode(codes[where].flatten(2), encoding, scale)[..., :dim])
    return out[0], out[1]


def flatten(cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor,
            dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decoded K and V of a batch; see :func:`lmdeploy_kvq.flatten`."""
    pairs = [gather(cache, table, int(n)) for table, n in zip(block_table, kv_lens)]
    return torch.cat([k for k, _ in pairs]).to(dtype), torch.cat([v for _, v in pairs]).to(dtype)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, sm_scale: float | None = None,
              window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
              alibi_slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention of one sequence's last rows over its K and V, in the dtype of the inputs.

    Scores ``s = sm_scale * q.k``; with a softcap ``c``, ``c * tanh(s / c)``; then ALiBi adds
    ``slope * (kv_pos - q_pos)``; a sink joins the softmax's denominator without a value.

    Args:
        query: [query_len, heads, head_dim]; row j stands at position ``kv_len - query_len + j``.
        key: [kv_len, kv_heads, head_dim]; value: [kv_len, kv_heads, v_head_dim].
        window: earlier tokens a token sees besides itself; None or negative sees all.

    Returns:
        [query_len, heads, v_head_dim]; rows that see no token are zeros.
    """
    query_len, heads, head_dim = query.shape
    kv_len, kv_heads, _ = key.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = torch.einsum('qhd,khd->hqk', query, key) * scale
    if softcap is not None and softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    q_pos = torch.arange(kv_len - query_len, kv_len, device=query.device)[:, None]
    kv_pos = torch.arange(kv_len, device=query.device)[None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(scores)[:, None, None] * (kv_pos - q_pos)
    visible = kv_pos <= q_pos
    if window is not None and window >= 0:
        visible &= kv_pos >= q_pos - window
    scores = scores.masked_fill(~visible, float('-inf'))
    if sinks is not None:
        sink = sinks.to(scores)[:, None, None].expand(-1, query_len, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.masked_fill(~visible, 0.0)
    return torch.einsum('hqk,khd->qhd', weights, value)


def paged_attention(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, *,
                    query_len: int = 1, sm_scale: float | None = None, window: int | None = None,
                    softcap: float | None = None, sinks: torch.Tensor | None = None,
                    alibi_slopes: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Attention over the decoded cache, computed in ``dtype``; see :func:`lmdeploy_kvq.paged_attention`."""
    out = []
    for rows, table, kv_len in zip(query.split(query_len), block_table, kv_lens.tolist()):
        key, value = gather(cache, table, kv_len)
        out.append(attention(rows.to(dtype), key.to(dtype), value.to(dtype), sm_scale=sm_scale, window=window,
                             softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes))
    return torch.cat(out)
