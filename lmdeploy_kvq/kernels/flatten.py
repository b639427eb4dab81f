"""Flatten: decode pages into dense K and V for prefill attention."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .codecs import decoding
from .launch import batch_block, check_device, compute_capability
from .tiles import locate_tile, tile_block, tile_offset

if TYPE_CHECKING:
    from ..paged import PagedCache


@triton.jit
def _store_rows(values, first, width, out_ptrs, new_ptrs, cached, fresh, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write elements first .. first + width of rows [rows, BLOCK].

    They are ``values`` where ``cached``, and copies of the new rows where ``fresh``.
    """
    dim = tl.arange(0, BLOCK)
    mask = ((dim < width) & (first + dim < D))[None, :]
    values = tl.where(cached[:, None], values, 0.0).to(out_ptrs.dtype.element_ty)
    if new_ptrs is not None:
        new = tl.load(new_ptrs[:, None] + (first + dim)[None, :], mask=fresh[:, None] & mask, other=0.0)
        values = tl.where(fresh[:, None], new.to(values.dtype), values)
    tl.store(out_ptrs[:, None] + (first + dim)[None, :], values, mask=(cached | fresh)[:, None] & mask)


@triton.jit
def _flatten_rows(parts, scale, out_ptrs, new_ptrs, matrix_ptr, cached, fresh, GAIN: tl.constexpr, OFFSET: tl.constexpr,
                  BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Decode and write rows; ``parts`` are their codes as fp16 [rows, BLOCK_P] each, as ``decode_*`` returns them."""
    if matrix_ptr is None:
        for part in tl.static_range(PARTS):
            values = (parts[part].to(tl.float32) * (GAIN / (1 << (BITS * part))) - OFFSET) * scale[:, None]
            _store_rows(values, part * PART, PART, out_ptrs, new_ptrs, cached, fresh, D, BLOCK_P)
    else:
        byte = tl.arange(0, BLOCK_P)
        codes = ()
        for part in tl.static_range(PARTS):
            values = tl.where(cached[:, None], parts[part].to(tl.float32) * (GAIN / (1 << (BITS * part))) - OFFSET, 0.0)
            codes += (values.to(tl.float16), )  # exact
        BLOCK_OUT: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D  # the matrix is large
        for first in tl.range(0, D, BLOCK_OUT, num_stages=1):
            dim = first + tl.arange(0, BLOCK_OUT)
            rows = tl.zeros([scale.shape[0], BLOCK_OUT], tl.float32)
            for part in tl.static_range(PARTS):
                stored = part * PART + byte
                there = ((byte < PART) & (stored < D))[:, None] & (dim < D)[None, :]
                matrix = tl.load(matrix_ptr + (stored * D)[:, None] + dim[None, :], mask=there, other=0.0)
                rows = tl.dot(codes[part], matrix, rows)
            _store_rows(rows * scale[:, None], first, BLOCK_OUT, out_ptrs, new_ptrs, cached, fresh, D, BLOCK_OUT)


@triton.jit
def _zero_rows(out_ptrs, behind, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zero whole rows."""
    dim = tl.arange(0, BLOCK_D)
    tl.store(out_ptrs[:, None] + dim[None, :], tl.zeros([out_ptrs.shape[0], BLOCK_D], out_ptrs.dtype.element_ty),
             mask=behind[:, None] & (dim < D)[None, :])


@triton.jit(do_not_specialize=['batch', 'total_rows', 'stride_table'])  # they differ from step to step
def _flatten_kernel(
        k_codes_ptr, v_codes_ptr, k_scales_ptr, v_scales_ptr, k_static_ptr, v_static_ptr, k_matrix_ptr, v_matrix_ptr,
        key_out_ptr, value_out_ptr, key_new_ptr, value_new_ptr, q_start_ptr, q_len_ptr, first_ptr, last_ptr, table_ptr,
        stride_table, batch, total_rows, stride_k_matrix, stride_v_matrix,  #
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        stride_kot, stride_koh, stride_vot, stride_voh,  # dense output: token, head
        stride_knt, stride_knh, stride_vnt, stride_vnh,  # new rows: token, head
        DECODE: tl.constexpr, DECODEV: tl.constexpr, GAIN: tl.constexpr, GAINV: tl.constexpr, OFFSET: tl.constexpr,
        OFFSETV: tl.constexpr, BITS: tl.constexpr, BITSV: tl.constexpr, PER_TOKEN: tl.constexpr,
        PER_TOKENV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, PARTV: tl.constexpr,
        PARTS: tl.constexpr, PARTSV: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BATCH: tl.constexpr, CAP: tl.constexpr):
    """One program decodes one tile of tokens of one KV head, or zeroes a tile of rows behind the last token.

    Given new rows, the sequence's new tokens, the last of its range, are copied from them.
    """
    head = tl.program_id(0)
    seq, tile, first, last, start = locate_tile(tl.program_id(1), first_ptr, last_ptr, batch, BLOCK_N, BATCH)
    lane = tl.arange(0, BLOCK_N)
    if seq >= batch:
        row = start + tile * BLOCK_N + lane
        _zero_rows(key_out_ptr + row * stride_kot + head * stride_koh, row < total_rows, D, BLOCK_D)
        _zero_rows(value_out_ptr + row * stride_vot + head * stride_voh, row < total_rows, DV, BLOCK_DV)
        return
    position = tile * BLOCK_N + lane
    block = tile_block(table_ptr + seq.to(tl.int64) * stride_table, tile, last, lane, PAGE, BLOCK_N)
    offset = tile_offset(tile, lane, PAGE, BLOCK_N)
    inside = (position >= first) & (position < last)
    cached, fresh = inside, inside & False
    key_new_ptrs, value_new_ptrs = None, None
    if key_new_ptr is not None:
        new_first = last - tl.load(q_len_ptr + seq).to(tl.int32)
        new_row = tl.load(q_start_ptr + seq).to(tl.int64) + position - new_first
        cached, fresh = inside & (position < new_first), inside & (position >= new_first)
        key_new_ptrs = key_new_ptr + new_row * stride_knt + head * stride_knh
        value_new_ptrs = value_new_ptr + new_row * stride_vnt + head * stride_vnh
    row = start + position - first

    byte = tl.arange(0, BLOCK_P)[None, :]
    codes = tl.load(k_codes_ptr + block * stride_kb + head * stride_kh + (offset * PART)[:, None] + byte,
                    mask=cached[:, None] & (byte < PART), other=0)
    if PER_TOKEN:
        scale = tl.load(k_scales_ptr + block * stride_ksb + head * stride_ksh + offset, mask=cached, other=0.0)
    else:
        scale = tl.load(k_static_ptr + head * stride_k_static) + tl.zeros([BLOCK_N], tl.float32)
    matrix_ptr = None
    if k_matrix_ptr is not None:
        matrix_ptr = k_matrix_ptr + head * stride_k_matrix
    out_ptrs = key_out_ptr + row * stride_kot + head * stride_koh
    _flatten_rows(DECODE(codes, False, CAP), scale, out_ptrs, key_new_ptrs, matrix_ptr, cached, fresh, GAIN, OFFSET,
                  BITS, PARTS, PART, BLOCK_P, D, BLOCK_D)

    byte = tl.arange(0, BLOCK_PV)[None, :]
    codes = tl.load(v_codes_ptr + block * stride_vb + head * stride_vh + (offset * PARTV)[:, None] + byte,
                    mask=cached[:, None] & (byte < PARTV), other=0)
    if PER_TOKENV:
        scale = tl.load(v_scales_ptr + block * stride_vsb + head * stride_vsh + offset, mask=cached, other=0.0)
    else:
        scale = tl.load(v_static_ptr + head * stride_v_static) + tl.zeros([BLOCK_N], tl.float32)
    matrix_ptr = None
    if v_matrix_ptr is not None:
        matrix_ptr = v_matrix_ptr + head * stride_v_matrix
    out_ptrs = value_out_ptr + row * stride_vot + head * stride_voh
    _flatten_rows(DECODEV(codes, True, CAP), scale, out_ptrs, value_new_ptrs, matrix_ptr, cached, fresh, GAINV, OFFSETV,
                  BITSV, PARTSV, PARTV, BLOCK_PV, DV, BLOCK_DV)


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
    batch, cap = kv_lens.size(0), compute_capability(cache.k_codes.device)
    block_n = min(64, cache.block_size)
    partial = batch if first is None else 2 * batch  # tiles that a range fills in part, at its end or at both
    k_transform, v_transform = cache.k_transform, cache.v_transform
    _flatten_kernel[(cache.num_kv_heads, triton.cdiv(total_tokens, block_n) + partial)](
        *cache.tensors(), k_transform and k_transform.inverse, v_transform and v_transform.inverse,
        key_out, value_out, new and new.key, new and new.value, new and new.q_start, new and new.q_lens, first, kv_lens,
        block_table, block_table.stride(0), batch, total_tokens, k_transform.stride_h if k_transform else 0,
        v_transform.stride_h if v_transform else 0,
        *cache.strides(), *key_out.stride()[:2], *value_out.stride()[:2],
        *(new.key.stride()[:2] if new else (0, 0)), *(new.value.stride()[:2] if new else (0, 0)),
        **decoding(cache.format, cap), **cache.sizes(), BLOCK_N=block_n, BATCH=batch_block(batch), CAP=cap)
