"""Fill: rotate and quantize new K and V rows and write them into their pages, in one pass; and rotate their queries.

Rows are columns here, [dim, rows]: a rotation is then a matrix times few columns, for which tensor cores have narrow
products.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..reference import MAX_INPUT, MAX_UNBIASED, MIN_SCALE
from .codecs import device_codec
from .launch import batch_block, check_device, compute_capability, dependent_launch, multiprocessors
from .queries import rotate_queries
from .rotation import hadamard_signs, operand, rotate_columns, saturate, split_parts
from .rows import by_lanes, load_rows, mix_rows, mixed_columns, store_mixed, store_of_rows
from .tiles import token_places

if TYPE_CHECKING:
    from ..formats import Encoding
    from ..paged import PagedCache


_RULES = {'step': 0, 'least_squares': 1, 'unbiased': 2}


@triton.jit
def _column_sums(x, LOG_N: tl.constexpr):
    """Sums of the columns of x [2^LOG_N, columns], in pairs.

    A plain reduction adds in an order that depends on how lanes and warps hold the rows, hence on how many tokens come
    at once. A token's scale must not: its page is the same whether its prompt came in one piece or in several.
    """
    for _ in tl.static_range(2):  # a lane has four side by side, or all
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), 1)
    for _ in tl.static_range(LOG_N - 2):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), 0)
    return tl.reshape(x, (x.shape[1], ))


@triton.jit
def _squares(parts, PARTS: tl.constexpr, LOG_P: tl.constexpr):
    """Sums of the squares of columns in parts."""
    squares = parts[0] * parts[0]
    for part in tl.static_range(1, PARTS):
        squares = tl.fma(parts[part], parts[part], squares)
    return _column_sums(squares, LOG_P)


@triton.jit
def _largest(parts, PARTS: tl.constexpr, TO_SHUFFLE: tl.constexpr):
    """Largest magnitudes of columns in parts."""
    size = tl.max(tl.abs(parts[0]), 0)
    if TO_SHUFFLE:
        # For the sum's sake the compiler lets bytes change lanes at the end, and not floats before.
        size = tl.maximum(size, tl.sum(parts[0], 0) * 0.0)
    for part in tl.static_range(1, PARTS):
        size = tl.maximum(size, tl.max(tl.abs(parts[part]), 0))
    return size


@triton.jit
def _fill_rows(x_ptr, codes_ptr, scales_ptr, static_ptr, matrix_ptr, head, first, num_tokens, stride_t, stride_h,  #
               stride_b, stride_bh, stride_sb, stride_sh, stride_static, stride_matrix,  # codes, scales: block, head
               slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,  #
               HADAMARD: tl.constexpr, ENCODE: tl.constexpr, SATURATE: tl.constexpr, OFFSET: tl.constexpr,
               RMS: tl.constexpr, FACTOR: tl.constexpr, RULE: tl.constexpr, PER_TOKEN: tl.constexpr,
               BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, MIN_SCALE: tl.constexpr, MAX_INPUT: tl.constexpr,
               MAX_UNBIASED: tl.constexpr, PAGE: tl.constexpr, SLOTS_GIVEN: tl.constexpr,
               UNIFORM_QUERY_LEN: tl.constexpr, BATCH: tl.constexpr, WARPS: tl.constexpr, CAP: tl.constexpr):
    """Quantize rows of K or of V and write them into their pages; see ``reference.encode``.

    Rows are asked for before their places, which take two reads in a row.

    Args:
        head, first: KV head, and number of the first token.
        matrix_ptr: A^T of the heads' rotations, or None; HADAMARD: the factor of butterflies in its place, or 0.
        static_ptr: the heads' scales, where they are not per token.
    """
    # Of a rotated row of 64 elements, lanes have two parts, and others the other two.
    TOGETHER: tl.constexpr = min(PARTS, D // 32) if HADAMARD != 0 else PARTS
    APART: tl.constexpr = PARTS // TOGETHER
    LOG_P: tl.constexpr = (BLOCK_P * APART).bit_length() - 1
    byte = tl.arange(0, BLOCK_P)
    token = first + tl.arange(0, TOKENS)
    valid = token < num_tokens
    row = token.to(tl.int64) * stride_t + head * stride_h
    raw = ()
    if HADAMARD != 0:
        signs = hadamard_signs(HADAMARD, x_ptr.dtype.element_ty if CAP > 0 else tl.float32, 0)
        raw = (load_rows(x_ptr, row, valid, D, WARPS), )
        token = first + mixed_columns(TOKENS, WARPS)
    elif matrix_ptr is None:
        for part in tl.static_range(PARTS):
            there = (byte < PART) & (byte + part * PART < D)
            raw += (tl.load(x_ptr + row[None, :] + (byte + part * PART)[:, None],
                            mask=valid[None, :] & there[:, None], other=0.0), )
    block, offset, live = token_places(
        token, num_tokens, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch, PAGE,
        SLOTS_GIVEN, UNIFORM_QUERY_LEN, BATCH)
    parts = ()
    if HADAMARD != 0:
        mixed = mix_rows(saturate(raw[0], MAX_INPUT, CAP), signs, WARPS, CAP)  # type: ignore[misc]
        parts = split_parts(mixed, TOGETHER)
    elif matrix_ptr is not None:
        parts = rotate_columns(x_ptr, row, valid, matrix_ptr + head * stride_matrix, D, PART, BLOCK_P, PARTS, BLOCK_D,
                               MAX_INPUT)
    else:
        for part in tl.static_range(PARTS):
            parts += (saturate(raw[part], MAX_INPUT, CAP).to(tl.float32), )
    if PER_TOKEN:
        # Of a column's magnitudes, the largest or the root mean square.
        if RMS or RULE == 2:
            squares = _squares(parts, TOGETHER, LOG_P)
        if RMS:
            size = tl.sqrt(squares * (1.0 / D))
        else:
            size = _largest(parts, TOGETHER, HADAMARD == 0 and TOKENS < 8)
        step = tl.maximum(size * FACTOR, MIN_SCALE)
    else:
        step = tl.load(static_ptr + head * stride_static) + tl.zeros_like(offset).to(tl.float32)
    inverse = 1.0 / step
    packed = tl.zeros_like(parts[0]).to(tl.int32)  # type: ignore[misc]
    xc, cc = step, step  # where RULE asks for them: sums over parts
    for part in tl.static_range(TOGETHER):
        codes = ENCODE(parts[part], inverse[None, :], SATURATE, CAP)
        if RULE != 0:
            c = codes.to(tl.float32, bitcast=True) - 8388608.0 - OFFSET
        if HADAMARD == 0:
            there = ((byte < PART) & (byte + part * PART < D))[:, None]
            codes = tl.where(there, codes, 0)
            if RULE != 0:
                c = tl.where(there, c, 0.0)
        if RULE != 0:
            # Fused here, and nowhere that the compiler chooses: what it fuses depends on layouts.
            xc = tl.fma(parts[part], c, xc) if part > 0 else parts[part] * c
            cc = tl.fma(c, c, cc) if part > 0 else c * c
        packed += codes << (BITS * APART * part)  # of which the low byte counts
    if APART > 1:
        by_part = tl.reshape(packed, (APART, PART, TOKENS))
        packed = tl.sum(by_part << (BITS * tl.arange(0, APART))[:, None, None], 0)
    if HADAMARD != 0:
        block, offset, live = by_lanes(block, WARPS), by_lanes(offset, WARPS), by_lanes(live, WARPS)
    code_ptrs = codes_ptr + block * stride_b + head * stride_bh
    if HADAMARD != 0:
        store_mixed(code_ptrs + offset * PART, packed.to(tl.uint8), live)
    else:
        tl.store(code_ptrs[None, :] + (offset * PART)[None, :] + byte[:, None], packed.to(tl.uint8),
                 mask=live[None, :] & (byte < PART)[:, None])
    if PER_TOKEN:
        scale = step
        if RULE != 0:
            products = _column_sums(xc, LOG_P)
            scale = products / tl.sum(cc, 0)  # a sum that is exact in any order
            if RULE == 2:
                scale = tl.minimum(squares / tl.maximum(products, MIN_SCALE * MIN_SCALE), scale * MAX_UNBIASED)
            scale = tl.maximum(scale, MIN_SCALE)
        scale_ptrs = scales_ptr + block * stride_sb + head * stride_sh + offset
        if HADAMARD != 0:
            store_of_rows(scale_ptrs, scale, live, WARPS)
        else:
            tl.store(scale_ptrs, scale, mask=live)


# They differ from step to step.
@triton.jit(do_not_specialize=['batch', 'num_tokens', 'num_counters', 'stride_table'])
def _fill_kernel(
        key_ptr, value_ptr, query_ptr, rotated_ptr, counters_ptr, k_codes_ptr, v_codes_ptr, k_scales_ptr, v_scales_ptr,
        k_static_ptr, v_static_ptr, k_matrix_ptr, v_matrix_ptr, q_matrix_ptr,  #
        slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch, num_tokens, num_counters,  #
        stride_key_t, stride_key_h, stride_value_t, stride_value_h, stride_query_t, stride_query_h,  # token, head
        stride_k_matrix, stride_v_matrix, num_heads,  #
        stride_kb, stride_kh, stride_vb, stride_vh,  # codes: block, head
        stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_k_static, stride_v_static,  # scales: block, head
        HADAMARD: tl.constexpr, HADAMARDV: tl.constexpr, HADAMARDQ: tl.constexpr,  # factors of butterflies, or 0
        ENCODE: tl.constexpr, ENCODEV: tl.constexpr, SATURATE: tl.constexpr, SATURATEV: tl.constexpr,
        OFFSET: tl.constexpr, OFFSETV: tl.constexpr,  #
        RMS: tl.constexpr, RMSV: tl.constexpr, FACTOR: tl.constexpr, FACTORV: tl.constexpr, RULE: tl.constexpr,
        RULEV: tl.constexpr, PER_TOKEN: tl.constexpr, PER_TOKENV: tl.constexpr, BITS: tl.constexpr,
        BITSV: tl.constexpr, MIN_SCALE: tl.constexpr, MAX_INPUT: tl.constexpr, MAX_UNBIASED: tl.constexpr,  #
        D: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, PARTV: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_PV: tl.constexpr, PARTS: tl.constexpr, PARTSV: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_DV: tl.constexpr, HEADS_PER_KV: tl.constexpr, FILLS: tl.constexpr,  #
        TOKENS: tl.constexpr, SLOTS_GIVEN: tl.constexpr, UNIFORM_QUERY_LEN: tl.constexpr, BATCH: tl.constexpr,
        PDL: tl.constexpr, WARPS: tl.constexpr, CAP: tl.constexpr):
    """One program writes K or V of TOKENS new tokens of one KV head, or rotates TOKENS of its query rows.

    ``program_id(1)`` counts the tiles of K, then those of V (both if FILLS), then those of the queries.
    """
    if PDL:
        # Decode could start and divide its work meanwhile (gdc_launch_dependents). But programs that start while others
        # hold places are spread unevenly over multiprocessors, which costs more; benchmarks/results/decode_sweeps.json.
        tl.extra.cuda.gdc_wait()
    head, pid = tl.program_id(0), tl.program_id(1)
    if counters_ptr is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        for start in range((pid * tl.num_programs(0) + head) * 128, num_counters, programs * 128):
            index = start + tl.arange(0, 128)
            tl.store(counters_ptr + index, tl.zeros([128], tl.int32), mask=index < num_counters)
    tiles = tl.cdiv(num_tokens, TOKENS) if FILLS else 0
    if pid >= 2 * tiles:
        if query_ptr is not None:
            q_rotation = None
            if q_matrix_ptr is not None:
                q_rotation = q_matrix_ptr + head * stride_k_matrix
            rotate_queries(query_ptr, rotated_ptr, q_rotation, head, (pid - 2 * tiles) * TOKENS,
                            num_tokens * HEADS_PER_KV, stride_query_t, stride_query_h, num_heads, HADAMARDQ,
                            HEADS_PER_KV, D, BLOCK_D, TOKENS, WARPS, CAP)
        return
    if FILLS:
        first = (pid % tiles) * TOKENS
        if pid < tiles:
            _fill_rows(key_ptr, k_codes_ptr, k_scales_ptr, k_static_ptr, k_matrix_ptr, head, first, num_tokens,
                       stride_key_t, stride_key_h, stride_kb, stride_kh, stride_ksb, stride_ksh, stride_k_static,
                       stride_k_matrix, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,
                       HADAMARD, ENCODE, SATURATE, OFFSET, RMS, FACTOR, RULE, PER_TOKEN, BITS, PARTS, PART, BLOCK_P,
                       D, BLOCK_D, TOKENS, MIN_SCALE, MAX_INPUT, MAX_UNBIASED, PAGE, SLOTS_GIVEN, UNIFORM_QUERY_LEN,
                       BATCH, WARPS, CAP)
        else:
            _fill_rows(value_ptr, v_codes_ptr, v_scales_ptr, v_static_ptr, v_matrix_ptr, head, first, num_tokens,
                       stride_value_t, stride_value_h, stride_vb, stride_vh, stride_vsb, stride_vsh, stride_v_static,
                       stride_v_matrix, slot_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, table_ptr, stride_table, batch,
                       HADAMARDV, ENCODEV, SATURATEV, OFFSETV, RMSV, FACTORV, RULEV, PER_TOKENV, BITSV, PARTSV,
                       PARTV, BLOCK_PV, DV, BLOCK_DV, TOKENS, MIN_SCALE, MAX_INPUT, MAX_UNBIASED, PAGE, SLOTS_GIVEN,
                       UNIFORM_QUERY_LEN, BATCH, WARPS, CAP)


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


@dataclass(frozen=True)
class DecodeInputs:
    """What decoding needs besides the pages, prepared by the same launch.

    Attributes:
        counters: int32 [n], zeroed.
        query: [tokens, heads, head_dim], and rotated: fp16 [tokens, heads, head_dim + QUERY_TAIL], contiguous, written
            as :func:`~lmdeploy_kvq.kernels.queries.rotate_queries` says; or None both.
    """
    counters: torch.Tensor
    query: torch.Tensor | None = None
    rotated: torch.Tensor | None = None


def fill(key: torch.Tensor | None, value: torch.Tensor | None, cache: PagedCache, layout: TokenLayout,
         inputs: DecodeInputs | None = None) -> None:
    """Quantize ``key`` [tokens, kv_heads, head_dim] and ``value`` [tokens, kv_heads, v_head_dim] into their pages.

    Works in place on ``cache``; starts two programs per KV head and tile of tokens and allocates nothing.

    Args:
        key, value: None both: nothing is written to the pages.
        cache: the pages.
        layout: which slots the tokens go to.
        inputs: see :class:`DecodeInputs`.

    Raises:
        ValueError: shapes, strides or devices that do not fit the cache.
    """
    check_device(cache.k_codes)
    tokens = _check(key, value, cache, inputs)
    if key is None and inputs is not None and inputs.query is None:
        inputs.counters.zero_()  # nothing else to do
        return
    if tokens == 0:
        return
    fmt, table, cap = cache.format, layout.block_table, compute_capability(cache.k_codes.device)
    batch = layout.kv_lens.size(0) if layout.slots is None and layout.kv_lens is not None else 1
    query = None if inputs is None else inputs.query
    k_matrix, k_stride, k_factor = operand(cache.k_transform)
    v_matrix, v_stride, v_factor = operand(cache.v_transform)
    q_matrix, _, q_factor = operand(cache.k_transform, inverse=True)
    heads_per_kv = 1 if query is None else query.size(1) // cache.num_kv_heads
    tile, warps = _tile(cache, tokens, (0 if key is None else 2) + (0 if query is None else heads_per_kv),
                        k_matrix is not None or v_matrix is not None, k_factor != 0 or v_factor != 0)
    programs = (0 if key is None else 2 * triton.cdiv(tokens, tile)) + (
        0 if query is None else triton.cdiv(tokens * heads_per_kv, tile))
    _fill_kernel[(cache.num_kv_heads, max(programs, 1))](
        key, value, query, None if inputs is None else inputs.rotated, None if inputs is None else inputs.counters,
        *cache.tensors(), k_matrix, v_matrix, q_matrix, layout.slots, layout.q_start, layout.q_lens, layout.kv_lens,
        table, 0 if table is None else table.stride(0), batch, tokens, 0 if inputs is None else inputs.counters.numel(),
        *_strides(key), *_strides(value), *_strides(query), k_stride, v_stride, 0 if query is None else query.size(1),
        *cache.strides(), HADAMARD=k_factor, HADAMARDV=v_factor, HADAMARDQ=q_factor, **_encoding(fmt.key, ''),
        **_encoding(fmt.value, 'V'), MIN_SCALE=MIN_SCALE, MAX_INPUT=MAX_INPUT, MAX_UNBIASED=MAX_UNBIASED,
        **cache.sizes(), HEADS_PER_KV=heads_per_kv,
        FILLS=key is not None, TOKENS=tile, SLOTS_GIVEN=layout.slots is not None,
        UNIFORM_QUERY_LEN=layout.uniform_query_len, BATCH=1 if layout.uniform_query_len else batch_block(batch),
        WARPS=warps, CAP=cap, num_warps=warps,
        enable_fp_fusion=False, **dependent_launch(cap))  # what would be fused depends on layouts


def _tile(cache: PagedCache, tokens: int, rows_per_token: int, matrices: bool, butterflies: bool) -> tuple[int, int]:
    """Rows per program, and its warps.

    For a decode step as few as there can be without too many programs, for starting one takes over a nanosecond of the
    GPU; benchmarks/results/fill_sweeps.json. Every program that multiplies by a matrix reads it, so that there should
    not be many more than multiprocessors. Butterflies take four rows per warp, or eight.
    """
    rows, sms = tokens * rows_per_token * cache.num_kv_heads, multiprocessors(cache.k_codes.device)
    dim = max(cache.head_dim, cache.v_head_dim)
    if matrices:
        tile = min(max(16 if butterflies else 8, triton.next_power_of_2(rows // (2 * sms))), 64)
        return tile, 4 if tile <= 16 else 8
    if tokens > 512:
        return (32, 4) if dim <= 128 or not butterflies else (16, 4)
    # Few steps, for every size is compiled.
    if butterflies:
        return (4, 1) if rows <= 24 * sms else (16, 4) if dim <= 128 else (8, 2)
    steps = [(tile, 1) for tile in (1, 4, 8) if tile * dim <= 1024]
    return next((step for step in steps if rows <= 2 * sms * step[0]), steps[-1])


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def _encoding(encoding: Encoding, suffix: str) -> dict[str, Any]:
    """The kernel's constants of one encoding."""
    codec = encoding.codec
    rms = encoding.statistic == 'rms'
    constants = {'ENCODE': device_codec(codec).encode, 'SATURATE': encoding.saturates, 'OFFSET': codec.offset,
                 'RMS': rms,
                 'FACTOR': encoding.shrink * (1.0 if rms else 1.0 / codec.qmax), 'RULE': _RULES[encoding.rule],
                 'PER_TOKEN': encoding.per_token_head, 'BITS': codec.bits}
    return {name + suffix: value for name, value in constants.items()}


def _check(key: torch.Tensor | None, value: torch.Tensor | None, cache: PagedCache,
           inputs: DecodeInputs | None) -> int:
    """Tokens to fill. Raises ValueError unless :func:`fill` can run."""
    if key is None and (inputs is None or inputs.query is None):
        return 0
    tokens = key.size(0) if key is not None else inputs.query.size(0)  # type: ignore[union-attr]
    for what, x, dim in (('key', key, cache.head_dim), ('value', value, cache.v_head_dim)):
        if x is None:
            continue
        if x.dim() != 3 or x.shape != (tokens, cache.num_kv_heads, dim):
            raise ValueError(f'{what} has shape {tuple(x.shape)}, the cache takes '
                             f'[{tokens}, {cache.num_kv_heads}, {dim}]')
        if x.stride(-1) != 1:
            raise ValueError(f'{what} must be contiguous in its last axis')
    return tokens
