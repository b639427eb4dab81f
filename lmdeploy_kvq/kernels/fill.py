"""Fill: quantize new K and V rows and write them into their pages, one pass, codes and scales together."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..reference import MAX_INPUT, MIN_SCALE
from .codecs import device_codec
from .launch import check_device, compute_capability, dependent_launch
from .tiles import key_offset, token_slots, value_offset

if TYPE_CHECKING:
    from ..paged import PagedCache


@triton.jit
def _quantize_rows(x, static_ptr, static_offset, ENCODE: tl.constexpr, QMAX: tl.constexpr, PER_TOKEN: tl.constexpr,
                   MIN_SCALE: tl.constexpr, MAX_INPUT: tl.constexpr, CAP: tl.constexpr):
    """Codes [rows, dim] and scales [rows] of a tile; see ``reference.encode``."""
    x = tl.minimum(tl.maximum(x.to(tl.float32), -MAX_INPUT), MAX_INPUT)
    if PER_TOKEN:
        scale = tl.maximum(tl.max(tl.abs(x), 1) * (1.0 / QMAX), MIN_SCALE)
        return ENCODE(x * (1.0 / scale)[:, None], CAP), scale
    else:
        scale = tl.load(static_ptr + static_offset)
        return ENCODE(x * (1.0 / scale), CAP), scale


@triton.jit(do_not_specialize=['batch', 'num_tokens'])  # they differ from step to step
def _fill_kernel(
        key_ptr, value_ptr, k_codes_ptr, v_codes_ptr, k_scales_ptr, v_scales_ptr, k_static_ptr, v_static_ptr,  #
        slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch, num_tokens,  #
        stride_key_t, stride_key_h, stride_value_t, stride_value_h,  # new rows: token, head; contiguous last axis
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        ENCODE_K: tl.constexpr, ENCODE_V: tl.constexpr, QMAX_K: tl.constexpr, QMAX_V: tl.constexpr,  #
        K_PER_TOKEN: tl.constexpr, V_PER_TOKEN: tl.constexpr, MIN_SCALE: tl.constexpr, MAX_INPUT: tl.constexpr,  #
        D: tl.constexpr, DV: tl.constexpr, STORED: tl.constexpr, STORED_V: tl.constexpr, BLOCK_D: tl.constexpr,  #
        BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,  #
        TOKENS: tl.constexpr, SLOTS_GIVEN: tl.constexpr, UNIFORM_QUERY_LEN: tl.constexpr, BATCH: tl.constexpr,
        PDL: tl.constexpr, CAP: tl.constexpr):
    """One program writes TOKENS new tokens of one KV head."""
    if PDL:
        # Decode divides its work meanwhile. It may, because whatever ran before this kernel has ended by now; and it
        # waits for this kernel before it reads pages.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    valid = (token < num_tokens)[:, None]
    row = token.to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    # Rows are asked for before their slots, which take two reads in a row.
    key = tl.load(key_ptr + row * stride_key_t + head * stride_key_h + dim[None, :], mask=valid & (dim < D)[None, :],
                  other=0.0)
    value = tl.load(value_ptr + row * stride_value_t + head * stride_value_h + dim_v[None, :],
                    mask=valid & (dim_v < DV)[None, :], other=0.0)
    slot = token_slots(token, num_tokens, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,
                       PAGE, SLOTS_GIVEN, UNIFORM_QUERY_LEN, BATCH)
    live = slot >= 0
    slot = tl.maximum(slot, 0)
    block, offset = slot // PAGE, slot % PAGE

    # Beyond its dim elements a row is padded with the codes of zeros, which products read.
    codes, scale = _quantize_rows(key, k_static_ptr, head * stride_k_static, ENCODE_K, QMAX_K, K_PER_TOKEN, MIN_SCALE,
                                  MAX_INPUT, CAP)
    tl.store(k_codes_ptr + (block * stride_kb)[:, None] + head * stride_kh
             + key_offset(offset[:, None], dim[None, :], STORED), codes, mask=live[:, None] & (dim < STORED)[None, :])
    if K_PER_TOKEN:
        tl.store(k_scales_ptr + block * stride_ksb + head * stride_ksh + offset, scale, mask=live)

    codes, scale = _quantize_rows(value, v_static_ptr, head * stride_v_static, ENCODE_V, QMAX_V, V_PER_TOKEN, MIN_SCALE,
                                  MAX_INPUT, CAP)
    tl.store(v_codes_ptr + (block * stride_vb)[:, None] + head * stride_vh
             + value_offset(offset[:, None], dim_v[None, :], STORED_V), codes,
             mask=live[:, None] & (dim_v < STORED_V)[None, :])
    if V_PER_TOKEN:
        tl.store(v_scales_ptr + block * stride_vsb + head * stride_vsh + offset, scale, mask=live)


@dataclass(frozen=True)
class TokenLayout:
    """Which slots new tokens go to: explicit slots, or a batch as LMDeploy describes it.

    Attributes:
        slots: [tokens] integer slots, negative to skip; or None, and then:
        q_start, q_lens, kv_lens: [batch] integers, first new token, new tokens, and cached tokens with the new ones.
        block_table: [batch, max_blocks] int32 page ids, last axis contiguous.
        uniform_query_len: if positive, every sequence has this many new tokens, in order.
    """
    slots: torch.Tensor | None = None
    q_start: torch.Tensor | None = None
    q_lens: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    uniform_query_len: int = 0


def fill(key: torch.Tensor, value: torch.Tensor, cache: PagedCache, layout: TokenLayout) -> None:
    """Quantize ``key`` [tokens, kv_heads, head_dim] and ``value`` [tokens, kv_heads, v_head_dim] into their pages.

    Works in place on ``cache``; starts ``kv_heads x ceil(tokens / tile)`` programs and allocates nothing.

    Raises:
        ValueError: shapes, strides or devices that do not fit the cache.
    """
    check_device(cache.k_codes)
    tokens = key.size(0)
    for what, x, dim in (('key', key, cache.head_dim), ('value', value, cache.v_head_dim)):
        if x.dim() != 3 or x.shape != (tokens, cache.num_kv_heads, dim):
            raise ValueError(f'{what} has shape {tuple(x.shape)}, the cache takes '
                             f'[{tokens}, {cache.num_kv_heads}, {dim}]')
        if x.stride(-1) != 1:
            raise ValueError(f'{what} must be contiguous in its last axis')
    if tokens == 0:
        return
    fmt, table, cap = cache.format, layout.block_table, compute_capability(key.device)
    batch = 1 if layout.slots is not None else layout.kv_lens.size(0)  # type: ignore[union-attr]
    tile = 1 if layout.uniform_query_len or tokens <= 64 else 16
    k_codec, v_codec = device_codec(fmt.key.codec), device_codec(fmt.value.codec)
    _fill_kernel[(cache.num_kv_heads, triton.cdiv(tokens, tile))](
        key, value, *cache.tensors(), layout.slots, layout.q_start, layout.q_lens, layout.kv_lens, table,
        0 if table is None else table.stride(0), batch, tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *cache.strides(),
        ENCODE_K=k_codec.encode, ENCODE_V=v_codec.encode, QMAX_K=fmt.key.codec.qmax, QMAX_V=fmt.value.codec.qmax,
        K_PER_TOKEN=fmt.key.per_token_head, V_PER_TOKEN=fmt.value.per_token_head, MIN_SCALE=MIN_SCALE,
        MAX_INPUT=MAX_INPUT, **cache.sizes(), TOKENS=tile,
        SLOTS_GIVEN=layout.slots is not None, UNIFORM_QUERY_LEN=layout.uniform_query_len,
        BATCH=triton.next_power_of_2(batch), CAP=cap, num_warps=1 if tile == 1 else 4,
        **dependent_launch(cap))
