"""Flatten: decode pages into dense K and V for prefill attention."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .codecs import decode_gain, device_codec
from .launch import check_device, compute_capability
from .tiles import key_rows, locate_tile, tile_block, tile_offset, value_columns

if TYPE_CHECKING:
    from ..paged import PagedCache


@triton.jit(do_not_specialize=['batch', 'total_rows'])  # they differ from step to step
def _flatten_kernel(
        k_codes_ptr, v_codes_ptr, k_scales_ptr, v_scales_ptr, k_static_ptr, v_static_ptr, key_out_ptr, value_out_ptr,
        key_new_ptr, value_new_ptr, q_start_ptr, q_len_ptr, first_ptr, last_ptr, table_ptr, stride_table, batch,
        total_rows,  #
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        stride_kot, stride_koh, stride_vot, stride_voh,  # dense output: token, head
        stride_knt, stride_knh, stride_vnt, stride_vnh,  # new rows: token, head
        DECODE_K: tl.constexpr, DECODE_V: tl.constexpr, GAIN_K: tl.constexpr, GAIN_V: tl.constexpr,  #
        K_PER_TOKEN: tl.constexpr, V_PER_TOKEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, STORED: tl.constexpr,
        STORED_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,  #
        BLOCK_N: tl.constexpr, NEW_GIVEN: tl.constexpr, BATCH: tl.constexpr, CAP: tl.constexpr):
    """One program decodes one tile of tokens of one KV head, or zeroes a tile of rows behind the last token.

    With NEW_GIVEN the sequence's new tokens, the last of its range, are copied from the rows they came from.
    """
    head = tl.program_id(0)
    seq, tile, first, last, start = locate_tile(tl.program_id(1), first_ptr, last_ptr, batch, BLOCK_N, BATCH)
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if seq >= batch:
        row = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        behind = (row < total_rows)[:, None]
        tl.store(key_out_ptr + (row * stride_kot)[:, None] + head * stride_koh + dim[None, :],
                 tl.zeros([BLOCK_N, BLOCK_D], key_out_ptr.dtype.element_ty), mask=behind & (dim < D)[None, :])
        tl.store(value_out_ptr + (row * stride_vot)[:, None] + head * stride_voh + dim_v[None, :],
                 tl.zeros([BLOCK_N, BLOCK_DV], value_out_ptr.dtype.element_ty), mask=behind & (dim_v < DV)[None, :])
        return
    lane = tl.arange(0, BLOCK_N)
    position = tile * BLOCK_N + lane
    block = tile_block(table_ptr + seq.to(tl.int64) * stride_table, tile, last, lane, PAGE, BLOCK_N)
    offset = tile_offset(tile, lane, PAGE, BLOCK_N)
    inside = (position >= first) & (position < last)
    cached, fresh = inside, inside & False
    new_row = position.to(tl.int64) * 0
    if NEW_GIVEN:
        new_first = last - tl.load(q_len_ptr + seq).to(tl.int32)
        new_row = tl.load(q_start_ptr + seq).to(tl.int64) + position - new_first
        cached, fresh = inside & (position < new_first), inside & (position >= new_first)
    row = start + position - first

    group = tile_offset(tile, tl.arange(0, BLOCK_N // 16) * 16, PAGE, BLOCK_N)
    cached_group = (tl.max(tl.reshape(cached.to(tl.int32), (BLOCK_N // 16, 16)), 1) > 0)[:, None]
    mask = (dim < D)[None, :]
    packed = tl.arange(0, 16 * BLOCK_D)[None, :]
    codes = tl.load(k_codes_ptr + block * stride_kb + head * stride_kh + (group * STORED)[:, None] + packed,
                    mask=cached_group & (packed < 16 * STORED), other=0)
    if K_PER_TOKEN:
        scale = tl.load(k_scales_ptr + block * stride_ksb + head * stride_ksh + offset, mask=cached, other=0.0)
    else:
        scale = tl.load(k_static_ptr + head * stride_k_static) + tl.zeros([BLOCK_N], tl.float32)
    key = key_rows(DECODE_K(codes, CAP)).to(tl.float32) * GAIN_K * scale[:, None]
    key = tl.where(cached[:, None], key, 0.0).to(key_out_ptr.dtype.element_ty)
    if NEW_GIVEN:
        new = tl.load(key_new_ptr + (new_row * stride_knt)[:, None] + head * stride_knh + dim[None, :],
                      mask=fresh[:, None] & mask, other=0.0)
        key = tl.where(fresh[:, None], new.to(key.dtype), key)
    tl.store(key_out_ptr + (row * stride_kot)[:, None] + head * stride_koh + dim[None, :], key,
             mask=inside[:, None] & mask)

    mask_v = (dim_v < DV)[None, :]
    packed = tl.arange(0, 16 * BLOCK_DV)[None, :]
    codes = tl.load(v_codes_ptr + block * stride_vb + head * stride_vh + (group * STORED_V)[:, None] + packed,
                    mask=cached_group & (packed < 16 * STORED_V), other=0)
    if V_PER_TOKEN:
        scale = tl.load(v_scales_ptr + block * stride_vsb + head * stride_vsh + offset, mask=cached, other=0.0)
    else:
        scale = tl.load(v_static_ptr + head * stride_v_static) + tl.zeros([BLOCK_N], tl.float32)
    value = tl.trans(value_columns(DECODE_V(codes, CAP))).to(tl.float32) * GAIN_V * scale[:, None]
    value = tl.where(cached[:, None], value, 0.0).to(value_out_ptr.dtype.element_ty)
    if NEW_GIVEN:
        new = tl.load(value_new_ptr + (new_row * stride_vnt)[:, None] + head * stride_vnh + dim_v[None, :],
                      mask=fresh[:, None] & mask_v, other=0.0)
        value = tl.where(fresh[:, None], new.to(value.dtype), value)
    tl.store(value_out_ptr + (row * stride_vot)[:, None] + head * stride_voh + dim_v[None, :], value,
             mask=inside[:, None] & mask_v)


@dataclass(frozen=True)
class NewTokens:
    """The batch's new tokens before quantization; prefill attends to these instead of their cached codes.

    Attributes:
        key: [tokens, kv_heads, head_dim]; value: [tokens, kv_heads, v_head_dim].
        q_start, q_lens: [batch] first new token and number of new tokens of each sequence.
    """
    key: torch.Tensor
    value: torch.Tensor
    q_start: torch.Tensor
    q_lens: torch.Tensor


def flatten(cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, key_out: torch.Tensor,
            value_out: torch.Tensor, total_tokens: int, new: NewTokens | None = None,
            first: torch.Tensor | None = None) -> None:
    """Decode tokens ``first .. kv_lens`` of every sequence into dense rows, sequences one after another.

    Rows from the last token to ``total_tokens`` become zeros: attention kernels read a little past the last key and
    multiply it by a probability of zero, which only numbers survive. Rows from there on keep what they held.

    Args:
        cache: the paged cache.
        block_table: [batch, max_blocks] int32 page ids.
        kv_lens: [batch] integers, where each sequence's range ends; its new tokens, if any, are the last in it.
        key_out, value_out: [rows >= total_tokens, kv_heads, dim], any strides with a contiguous last axis.
        total_tokens: an upper bound of ``sum(kv_lens - first)``, known on the host.
        new: see :class:`NewTokens`.
        first: [batch] integers, where each sequence's range begins, at most ``kv_lens``; None: at 0.

    Raises:
        ValueError: tensors that kernels cannot run on.
    """
    check_device(cache.k_codes)
    if total_tokens == 0:
        return
    fmt, batch = cache.format, kv_lens.size(0)
    block_n = min(64, cache.block_size)
    partial = batch if first is None else 2 * batch  # tiles that a range fills in part, at its end or at both
    cap = compute_capability(cache.k_codes.device)
    k_codec, v_codec = device_codec(fmt.key.codec), device_codec(fmt.value.codec)
    _flatten_kernel[(cache.num_kv_heads, triton.cdiv(total_tokens, block_n) + partial)](
        *cache.tensors(),
        key_out, value_out, new and new.key, new and new.value, new and new.q_start, new and new.q_lens, first, kv_lens,
        block_table, block_table.stride(0), batch, total_tokens,
        *cache.strides(), *key_out.stride()[:2], *value_out.stride()[:2],
        *(new.key.stride()[:2] if new else (0, 0)), *(new.value.stride()[:2] if new else (0, 0)),
        DECODE_K=k_codec.decode, DECODE_V=v_codec.decode, GAIN_K=decode_gain(fmt.key.codec, cap),
        GAIN_V=decode_gain(fmt.value.codec, cap), K_PER_TOKEN=fmt.key.per_token_head,
        V_PER_TOKEN=fmt.value.per_token_head, **cache.sizes(), BLOCK_N=block_n, NEW_GIVEN=new is not None,
        BATCH=triton.next_power_of_2(batch), CAP=cap)
