"""One step of online softmax over a tile of quantized K and V, for decode: the innermost loop of this package.

K's scale multiplies the scores and V's scale the probabilities, so that no tile is ever dequantized; codes only become
fp16, exactly, with an offset of integer formats still in them. It is taken out of sums: ``sum q (n - c) = sum q n - c
sum q`` for the scores, and likewise for the output.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .tiles import block_of, tile_offset

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _prefetch(ptrs, mask):
    """Ask for the lines of pointers to be brought into the L2 cache."""
    tl.inline_asm_elementwise("""{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        @wanted prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }""", '=r,l,r', [ptrs.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_tile(pages, tile, k_ptr, v_ptr, stride_kb, stride_vb, PART: tl.constexpr, PARTV: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
                  CAP: tl.constexpr):
    """Bring the codes of a tile, whose pages are known, into the L2 cache, 128 bytes per lane."""
    if CAP > 0:
        group = tl.arange(0, BLOCK_N // 16) * 16
        block = block_of(pages, group, PAGE, BLOCK_N)
        offset = tile_offset(tile, group, PAGE, BLOCK_N)
        line = (tl.arange(0, BLOCK_P // 8) * 128)[None, :]
        _prefetch(k_ptr + (block * stride_kb + offset * PART)[:, None] + line, line < 16 * PART)
        line = (tl.arange(0, BLOCK_PV // 8) * 128)[None, :]
        _prefetch(v_ptr + (block * stride_vb + offset * PARTV)[:, None] + line, line < 16 * PARTV)


@triton.jit
def behind(x, CAP: tl.constexpr):
    """fp16 numbers x for which the compiler does not wait before it comes here. Else it does where they were read."""
    if CAP > 0:
        x = tl.inline_asm_elementwise('mov.b16 $0, $1;', '=h,h', [x], dtype=tl.float16, is_pure=False, pack=1)
    return x


@triton.jit
def load_queries(q_ptrs, row_mask, D: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, PARTS: tl.constexpr):
    """Rows at ``q_ptrs`` [rows], as columns [PARTS * BLOCK_P, rows] of parts one below the other.

    In one read: the compiler would put a part into shared memory, hence wait for it, before it asks for the next one.
    """
    element = tl.arange(0, PARTS * BLOCK_P)
    offset = element // BLOCK_P * PART + element % BLOCK_P
    there = (element % BLOCK_P < PART) & (offset < D)
    return tl.load(q_ptrs[None, :] + offset[:, None], mask=there[:, None] & row_mask[None, :], other=0.0)


@triton.jit
def query_operands(normalized, OFFSET: tl.constexpr, GAIN: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
                   WARPS: tl.constexpr):
    """What K's codes are multiplied with, from fp16 queries in parts [BLOCK_P, rows], and what is too much then.

    Returns:
        (queries, correction): parts, divided by what codes are multiplied with by where they stand in their byte; and
        fp32 [16 * WARPS, rows], rows alike, what a product with codes has too much by their OFFSET, negated. It comes
        from a product with ones: a sum over elements would cross lanes and warps.
    """
    ones = tl.full([16 * WARPS, normalized[0].shape[0]], 1.0, tl.float16)
    queries = ()
    correction = tl.zeros([16 * WARPS, normalized[0].shape[1]], tl.float32)
    for part in tl.static_range(PARTS):
        query = normalized[part] * (1.0 / (1 << (BITS * part)))
        queries += (query, )
        if OFFSET > 0.0:
            correction += tl.dot(ones, query) * (-OFFSET / GAIN * (1 << (BITS * part)))
    return queries, correction


@triton.jit
def _softcap(score, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(score / SOFTCAP), scores in units of log2."""
    scale: tl.constexpr = 2.0 / SOFTCAP
    return (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(score * scale) + 1.0))


@triton.jit
def _sum_in_lanes(x, WARPS: tl.constexpr):
    """Sum of [tokens, rows] over the tokens that a lane holds of a product's result: fp32 [WARPS * 8, rows].

    The sum over lanes and warps can wait for the end of a segment.
    """
    N: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    by_lane = tl.reshape(x, (N // (16 * WARPS), WARPS, 2, 8, M))
    return tl.reshape(tl.sum(tl.sum(by_lane, 2), 0), (WARPS * 8, M))


@triton.jit
def attend(queries, row_scale, correction, q_pos, slope, m, l, weight, accs, tile, oldest, kv_len, pages, k_ptr, v_ptr,
           ks_ptr, vs_ptr, stride_kb, stride_vb, stride_ksb, stride_vsb,  #
           PART: tl.constexpr, PARTV: tl.constexpr, BLOCK_P: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
           PARTSV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr,
           PAIRSV: tl.constexpr, FINITEV: tl.constexpr, OFFSET: tl.constexpr, OFFSETV: tl.constexpr,
           PER_TOKEN: tl.constexpr, PER_TOKENV: tl.constexpr, QMAXV: tl.constexpr, WINDOW: tl.constexpr,
           SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WARPS: tl.constexpr, CAP: tl.constexpr):
    """One online-softmax step over one tile. Scores are [tokens, rows], outputs [pairs of elements, rows].

    K and V are left operands, so that a product's narrow side (8 columns suffice) holds the query rows, of which there
    are few, and codes become fp16 in the lanes that multiply them.

    Every tile is masked, although only those at the window's edge and at the newest tokens need it: a second, masked
    copy of this body costs more (registers, hence programs per multiprocessor) than the masks do.

    Args:
        queries, correction: :func:`query_operands`; row_scale: [rows] what scores are multiplied with.
        m: [rows] largest scores; l: [WARPS * 8, rows] sums of probabilities, by lanes; weight: like l, sums of
            probabilities times V's scale, where V's codes have an offset; accs: of each part of the output, the even
            elements and the odd ones.
        oldest: position of the oldest token that a row sees through the window.
        pages: of the tile, from :func:`~lmdeploy_kvq.kernels.tiles.tile_pages`.
        v_ptr: uint16, and strides of V in those.
    """
    lane = tl.arange(0, BLOCK_N)
    position = tile * BLOCK_N + lane
    block = block_of(pages, lane, PAGE, BLOCK_N)
    offset = tile_offset(tile, lane, PAGE, BLOCK_N)
    byte = tl.arange(0, BLOCK_P)[None, :]
    k_ptrs = k_ptr + (block * stride_kb + offset * PART)[:, None] + byte
    k_codes = tl.load(k_ptrs) if BLOCK_P == PART else tl.load(k_ptrs, mask=byte < PART, other=0)
    # V is read with tokens along the last axis: only so does the compiler copy it asynchronously, and transpose it on
    # its way from shared memory.
    pair = tl.arange(0, PAIRS)[:, None]
    v_ptrs = v_ptr + (block * stride_vb + offset * (PARTV // 2))[None, :] + pair
    v_codes = tl.load(v_ptrs) if 2 * PAIRS == PARTV else tl.load(v_ptrs, mask=pair < PARTV // 2, other=0)

    live = position < kv_len  # slots that no row sees may hold any bytes, scales that are NaN included
    if WINDOW >= 0:
        live = live & (position >= oldest)
    if PER_TOKEN:
        k_scale = tl.load(ks_ptr + block * stride_ksb + offset, mask=live, other=0.0)
    if PER_TOKENV:
        # scale x qmax is the row's absmax, of order one where scale alone could leave fp16's normal range.
        v_scale = tl.load(vs_ptr + block * stride_vsb + offset, mask=live, other=0.0) * QMAXV

    if OFFSET > 0.0:
        again = tl.broadcast_to(correction[None], (BLOCK_N // (16 * WARPS), 16 * WARPS, m.shape[0]))
        score = tl.reshape(again, (BLOCK_N, m.shape[0]))
    else:
        score = tl.zeros([BLOCK_N, m.shape[0]], tl.float32)
    k = DECODE(k_codes, False, CAP)
    for part in tl.static_range(PARTS):
        score = tl.dot(k[part], queries[part], score)
    score = score * row_scale[None, :]
    if PER_TOKEN:
        score = score * k_scale[:, None]
    if SOFTCAP > 0.0:
        score = _softcap(score, SOFTCAP)
    if ALIBI:
        score += slope[None, :] * (position[:, None] - q_pos[None, :]).to(tl.float32)
    seen = position[:, None] <= q_pos[None, :]
    if WINDOW >= 0:
        seen = seen & (position[:, None] >= q_pos[None, :] - WINDOW)
    score = tl.where(seen, score, float('-inf'))
    m_new = tl.maximum(m, tl.max(score, 0))
    shift = tl.where(m_new == float('-inf'), 0.0, m_new)  # a row that has seen nothing yet: -inf - -inf is NaN
    p = tl.exp2(score - shift[None, :])
    alpha = tl.exp2(m - shift)
    l_new = l * alpha[None, :] + _sum_in_lanes(p, WARPS)
    if PER_TOKENV:
        p = p * v_scale[:, None]
    p = p.to(tl.float16)
    weight_new = weight
    if OFFSETV != 0.0:
        weight_new = weight * alpha[None, :] + _sum_in_lanes(p.to(tl.float32), WARPS)
    v = PAIRSV(v_codes, CAP)
    new_accs = ()
    for part in tl.static_range(2 * PARTSV):
        # A NaN or inf code in a slot that no row sees would survive its probability of zero.
        new_accs += (tl.dot(FINITEV(v[part], CAP), p, accs[part] * alpha[None, :]), )
    return m_new, l_new, weight_new, new_accs


@triton.jit
def interleave(accs, PARTSV: tl.constexpr, BLOCK_PV: tl.constexpr):
    """Even and odd elements of every part as the parts [BLOCK_PV, rows]. Moves no data between lanes."""
    parts = ()
    for part in tl.static_range(PARTSV):
        both = tl.permute(tl.join(accs[2 * part], accs[2 * part + 1]), (0, 2, 1))
        if 2 * both.shape[0] > BLOCK_PV:  # a product has more rows than there are pairs
            both, _ = tl.split(tl.permute(tl.reshape(both, (2, BLOCK_PV, both.shape[2])), (1, 2, 0)))
        parts += (tl.reshape(both, (BLOCK_PV, accs[0].shape[1])), )
    return parts
