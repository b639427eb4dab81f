"""The specification in plain PyTorch: encoding, page layout, and attention over a paged cache.

Slow and simple on purpose; it runs on any device and is what the kernels are tested against. Functions take the same
arguments as the public ones in :mod:`lmdeploy_kvq.paged`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .formats import Codec, Encoding, part_dim
from .transforms import Transform

if TYPE_CHECKING:
    from .paged import PagedCache

MIN_SCALE = 1e-6
"""Smallest per-token-head scale (vLLM's floor): a row of zeros keeps a usable scale."""

MAX_INPUT = 65280.0
"""Largest magnitude stored, the largest bf16 number that fp16 holds too: larger values and infinities saturate here."""

MAX_UNBIASED = 1.5
"""Largest unbiased scale, in least squares scales. Rows like those of models stay below 1.4; a row of which one element
is nearly all would otherwise decode to several times its norm."""

_FP8_DTYPES = {'e4m3': torch.float8_e4m3fn, 'e5m2': torch.float8_e5m2}


def encode_codes(scaled: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Codes of values already divided by their scale.

    Args:
        scaled: any shape, fp32.
        codec: the number format. Integer formats have the code ``n = round(value + offset)``.

    Returns:
        uint8 tensor of the same shape, one code per element. Values beyond ``codec.qmax`` saturate; ties round to even.
    """
    clamped = scaled.float().clamp(-codec.qmax, codec.qmax)
    if codec.name in _FP8_DTYPES:
        return clamped.to(_FP8_DTYPES[codec.name]).view(torch.uint8)
    return (clamped + codec.offset).round().to(torch.uint8)


def decode_codes(codes: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Inverse of :func:`encode_codes`: fp32 values, scale not applied."""
    if codec.name in _FP8_DTYPES:
        return codes.view(_FP8_DTYPES[codec.name]).float()
    return codes.float() - codec.offset


def encode(x: torch.Tensor, encoding: Encoding, scale: torch.Tensor | None = None,
           transform: Transform | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows.

    Static: ``scale`` is given. Per-token-head: over a row's elements, the step of the grid is ``absmax / qmax`` (vLLM's
    per-token-head rule) or ``rms``, times a constant, at least 1e-6; and the scale is that step, or what fits the
    codes c best afterwards: <x, c> / <c, c> (least squares), <x, x> / <x, c> (keeps <x, decoded x>, as RaBitQ's
    estimator does: Gao and Long, 2024, arXiv:2405.12497). Value = (code - offset) x scale.

    Args:
        x: [..., heads, head_dim], any float dtype.
        encoding: codec, rotation and scale.
        scale: static scale, fp32, a scalar or [heads]; only for static encodings.
        transform: what rows are multiplied with first; needed by encodings with a rotation.

    Returns:
        codes uint8 [..., heads, head_dim], one per element, and scale fp32: [..., heads], or the static scale given.
    """
    x = x.float().clamp(-MAX_INPUT, MAX_INPUT)
    if encoding.rotation is not None:
        if transform is None:
            raise ValueError('an encoding with a rotation needs its transform')
        x = transform.store(x)
    if not encoding.per_token_head:
        if scale is None:
            raise ValueError('a static encoding needs its scale')
        return encode_codes(x / scale[..., None], encoding.codec), scale
    size = x.abs().amax(-1) / encoding.codec.qmax if encoding.statistic == 'absmax' else x.square().mean(-1).sqrt()
    step = (size * encoding.shrink).clamp(min=MIN_SCALE)
    codes = encode_codes(x / step[..., None], encoding.codec)
    if encoding.rule == 'step':
        return codes, step
    c = decode_codes(codes, encoding.codec)
    xc = (x * c).sum(-1)
    best = xc / c.square().sum(-1)
    if encoding.rule == 'unbiased':
        best = torch.minimum(x.square().sum(-1) / xc.clamp(min=MIN_SCALE**2), MAX_UNBIASED * best)
    return codes, best.clamp(min=MIN_SCALE)


def decode(codes: torch.Tensor, encoding: Encoding, scale: torch.Tensor,
           transform: Transform | None = None) -> torch.Tensor:
    """Inverse of :func:`encode`: fp32 values of codes [..., heads, head_dim] with scale [..., heads], [heads] or []."""
    values = decode_codes(codes, encoding.codec)
    if encoding.rotation is not None:
        if transform is None:
            raise ValueError('an encoding with a rotation needs its transform')
        values = transform.restore(values)  # before the scale: sums of such products are exact for Hadamard
    return values * scale[..., None]


def pack(codes: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Bytes [..., part] of codes [..., dim]; see :func:`~lmdeploy_kvq.formats.part_dim`. Padding is zero bits."""
    part = part_dim(codes.size(-1), codec.parts)
    padded = torch.nn.functional.pad(codes, (0, part * codec.parts - codes.size(-1))).unflatten(-1, (codec.parts, part))
    shifts = torch.arange(codec.parts, device=codes.device, dtype=torch.int32)[:, None] * codec.bits
    return (padded.int() << shifts).sum(-2).to(torch.uint8)


def unpack(packed: torch.Tensor, codec: Codec, dim: int) -> torch.Tensor:
    """Inverse of :func:`pack`: codes [..., dim], one per byte."""
    shifts = torch.arange(codec.parts, device=packed.device, dtype=torch.int32)[:, None] * codec.bits
    codes = (packed.int()[..., None, :] >> shifts) & (2**codec.bits - 1)
    return codes.flatten(-2)[..., :dim].to(torch.uint8)


def _pages(cache: PagedCache) -> list[tuple[Any, ...]]:
    """Of K and of V: encoding, transform, row size, codes, both scales."""
    fmt = cache.format
    return [(fmt.key, cache.k_transform, cache.head_dim, cache.k_codes, cache.k_scales, cache.k_static_scale),
            (fmt.value, cache.v_transform, cache.v_head_dim, cache.v_codes, cache.v_scales, cache.v_static_scale)]


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
    """Quantize and write new tokens; see :func:`lmdeploy_kvq.reshape_and_cache`."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    where = slots // cache.block_size, slice(None), slots % cache.block_size
    for x, (encoding, transform, _, rows, scales, static) in zip((key, value), _pages(cache)):
        codes, new_scales = encode(x[written], encoding, static, transform)
        rows[where] = pack(codes, encoding.codec)
        if encoding.per_token_head:
            scales[where] = new_scales


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
    where = block_table[position // cache.block_size].long(), slice(None), position % cache.block_size
    out = []
    for encoding, transform, dim, rows, scales, static in _pages(cache):
        scale = scales[where] if encoding.per_token_head else static
        out.append(decode(unpack(rows[where], encoding.codec, dim), encoding, scale, transform))
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
