"""Merge: attention over two disjoint sets of keys becomes attention over both.

With outputs ``o`` and log-sum-exps ``s`` of the scores of two parts, the whole has

    s = log(exp(s_a) + exp(s_b)),    o = exp(s_a - s) o_a + exp(s_b - s) o_b

which is the online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867,
section 3) with the maximum and the sum folded into one number, as FlashAttention combines its splits (Dao et al.,
arXiv:2205.14135, section 3.1).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import check_device

_TOKENS = 32
"""Tokens of one head per program: one 128-byte line of log-sum-exps."""


@triton.jit(do_not_specialize=['tokens'])  # it differs from step to step
def _merge_kernel(
        running_ptr, running_lse_ptr, part_ptr, part_lse_ptr, out_ptr, tokens,  #
        stride_rt, stride_rh, stride_pt, stride_ph, stride_ot, stride_oh,  # outputs: token, head
        stride_rlh, stride_plh,  # log-sum-exps: head
        DV: tl.constexpr, BLOCK_DV: tl.constexpr, TOKENS: tl.constexpr, IN_PLACE: tl.constexpr):
    """One program merges TOKENS rows of one head; fp32 throughout. Rows of an empty part are not read."""
    head = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    empty = float('-inf')
    running_lse = tl.load(running_lse_ptr + head * stride_rlh + token, mask=live, other=empty)
    part_lse = tl.load(part_lse_ptr + head * stride_plh + token, mask=live, other=empty)
    # FlashAttention says +inf where there is no key at all, and -inf where some sequences have some.
    running_lse = tl.where(running_lse == float('inf'), empty, running_lse)
    part_lse = tl.where(part_lse == float('inf'), empty, part_lse)

    top = tl.maximum(running_lse, part_lse)
    top = tl.where(top == empty, 0.0, top)  # no key in either part: both weights become 0, and nothing NaN
    running_weight, part_weight = tl.exp(running_lse - top), tl.exp(part_lse - top)
    total = running_weight + part_weight
    divisor = tl.where(total == 0.0, 1.0, total)

    token = token.to(tl.int64)
    dim = tl.arange(0, BLOCK_DV)
    inside = (dim < DV)[None, :]
    running = tl.load(running_ptr + (token * stride_rt)[:, None] + head * stride_rh + dim[None, :],
                      mask=(live & (running_lse != empty))[:, None] & inside, other=0.0).to(tl.float32)
    part = tl.load(part_ptr + (token * stride_pt)[:, None] + head * stride_ph + dim[None, :],
                   mask=(live & (part_lse != empty))[:, None] & inside, other=0.0).to(tl.float32)
    merged = running * (running_weight / divisor)[:, None] + part * (part_weight / divisor)[:, None]
    changed = live & (part_lse != empty) if IN_PLACE else live
    tl.store(out_ptr + (token * stride_ot)[:, None] + head * stride_oh + dim[None, :],
             merged.to(out_ptr.dtype.element_ty), mask=changed[:, None] & inside)
    tl.debug_barrier()  # every warp has read all log-sum-exps, and one of them replaces them
    tl.store(running_lse_ptr + head * stride_rlh + token, tl.where(total == 0.0, empty, top + tl.log(divisor)),
             mask=live)


def merge(running: torch.Tensor, running_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor,
          out: torch.Tensor) -> None:
    """Write the attention over the keys of ``running`` and of ``part`` to ``out``, and its log-sum-exp in place.

    Statistics and sums are fp32 whatever the tensors are; a row that saw no key (log-sum-exp of either infinity) has
    no weight and is not read, and rows without any key in either part become zeros (in place: stay as they were).

    Args:
        running: [tokens, heads, v_head_dim] attention so far.
        running_lse: [heads, tokens] fp32, natural logarithm; becomes the merged one.
        part: [tokens, heads, v_head_dim] attention over other keys; part_lse: [heads, tokens] fp32.
        out: [tokens, heads, v_head_dim], any floating dtype; may be ``running`` itself.

    Raises:
        ValueError: shapes or dtypes that do not fit, or tensors the kernels cannot run on.
    """
    check_device(running)
    tokens, heads, dim = running.shape
    for what, x in (('part', part), ('out', out)):
        if x.shape != running.shape or x.stride(-1) != 1:
            raise ValueError(f'{what} must be {tuple(running.shape)} with a contiguous last axis, got {tuple(x.shape)}')
    for what, x in (('running_lse', running_lse), ('part_lse', part_lse)):
        if x.shape != (heads, tokens) or x.dtype != torch.float32 or x.stride(-1) != 1:
            raise ValueError(f'{what} must be fp32 [{heads}, {tokens}] with a contiguous last axis, got {x.dtype} '
                             f'{tuple(x.shape)}')
    if tokens == 0:
        return
    _merge_kernel[(heads, triton.cdiv(tokens, _TOKENS))](
        running, running_lse, part, part_lse, out, tokens, *running.stride()[:2], *part.stride()[:2], *out.stride()[:2],
        running_lse.stride(0), part_lse.stride(0), DV=dim, BLOCK_DV=triton.next_power_of_2(dim), TOKENS=_TOKENS,
        IN_PLACE=out is running)
