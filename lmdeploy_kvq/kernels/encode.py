"""Codes of fp32 values, each the low byte of an int32; codecs.py has the way back.

Every function takes what values are multiplied with first (fp32 that broadcasts to them), SATURATE, whether products
may lie beyond the codec's largest value, and ``CAP``, the compute capability as an integer (0 for portable Triton, e.g.
the interpreter). Ties round to even. The int32 of an integer codec is the fp32 number 2^23 plus the code, so that it
need not be converted again where it is to be calculated with.
"""
from __future__ import annotations

import triton
import triton.language as tl

FP8_ROUND_CAP = tl.constexpr(90)  # first compute capability for which Triton rounds fp32 to fp8 once, not through fp16


@triton.jit
def _round_to_even_bits(magnitude, DROP: tl.constexpr, EXPONENT_SHIFT: tl.constexpr, SUBNORMAL_BELOW: tl.constexpr,
                        SUBNORMAL_SCALE: tl.constexpr):
    """Minifloat bits of non-negative fp32 values in range: drop ``DROP`` mantissa bits, ties to even."""
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP) - EXPONENT_SHIFT
    # Below the smallest normal the grid is uniform: adding 1.5 * 2**23 leaves the rounded integer in the low bits.
    uniform = (magnitude * SUBNORMAL_SCALE + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF
    return tl.where(magnitude < SUBNORMAL_BELOW, uniform, normal)


@triton.jit
def _encode_float(x, factor, DTYPE: tl.constexpr, LARGEST: tl.constexpr, DROP: tl.constexpr,
                  EXPONENT_SHIFT: tl.constexpr, SUBNORMAL_BELOW: tl.constexpr, SUBNORMAL_SCALE: tl.constexpr,
                  CAP: tl.constexpr):
    """fp32 to a minifloat (saturating at LARGEST, ties to even); see :func:`_round_to_even_bits`."""
    x = x * factor
    if CAP >= FP8_ROUND_CAP:
        return x.to(DTYPE).to(tl.uint8, bitcast=True).to(tl.int32)  # saturates by itself
    else:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        code = _round_to_even_bits(tl.abs(x), DROP, EXPONENT_SHIFT, SUBNORMAL_BELOW, SUBNORMAL_SCALE)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (code | sign).to(tl.int32)


@triton.jit
def encode_e4m3(x, factor, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to e4m3 (saturating at 448, ties to even)."""
    return _encode_float(x, factor, tl.float8e4nv, 448.0, 20, 960, 0.015625, 512.0, CAP)


@triton.jit
def encode_e5m2(x, factor, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to e5m2 (saturating at 57344, ties to even)."""
    return _encode_float(x, factor, tl.float8e5, 57344.0, 21, 448, 6.103515625e-05, 65536.0, CAP)


@triton.jit
def _share(x, factor, CAP: tl.constexpr):
    """1/2 more than x times factor, between 0 and 1."""
    if CAP > 0:
        return tl.inline_asm_elementwise('fma.rn.sat.f32 $0, $1, $2, 0f3F000000;', '=f,f,f', [x, factor],
                                         dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.minimum(tl.maximum(tl.fma(x, factor, 0.5), 0.0), 1.0)


@triton.jit
def _encode_integer(x, factor, SATURATE: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr, CAP: tl.constexpr):
    """fp32 to round(x * factor + OFFSET), which is not negative: 2^23 plus that has the integer in its low bits."""
    if SATURATE:
        y = tl.fma(_share(x, factor * (0.5 / QMAX), CAP), 2 * QMAX, 8388608.0 + (OFFSET - QMAX))
    else:
        y = tl.fma(x, factor, 8388608.0 + OFFSET)
    return y.to(tl.int32, bitcast=True)


@triton.jit
def encode_int8(x, factor, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int8 codes, -127 to 127 plus 128."""
    return _encode_integer(x, factor, SATURATE, 127.0, 128.0, CAP)


@triton.jit
def encode_int4(x, factor, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int4 codes, 0 to 15 for -7.5 to 7.5; always saturates, for 2^23 + 7.5 is no fp32 number."""
    return _encode_integer(x, factor, True, 7.5, 7.5, CAP)


@triton.jit
def encode_int2(x, factor, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int2 codes, 0 to 3 for -1.5 to 1.5; always saturates, like int4."""
    return _encode_integer(x, factor, True, 1.5, 1.5, CAP)
