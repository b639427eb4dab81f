"""Codes of fp32 values that are divided by their scale already, one per byte; codecs.py has the way back.

Every function takes SATURATE, whether values may lie beyond the codec's largest one, and ``CAP``, the compute
capability as an integer (0 for portable Triton, e.g. the interpreter). Ties round to even.
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
def _encode_float(x, DTYPE: tl.constexpr, LARGEST: tl.constexpr, DROP: tl.constexpr, EXPONENT_SHIFT: tl.constexpr,
                  SUBNORMAL_BELOW: tl.constexpr, SUBNORMAL_SCALE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to a minifloat (saturating at LARGEST, ties to even) as uint8; see :func:`_round_to_even_bits`."""
    if CAP >= FP8_ROUND_CAP:
        return x.to(DTYPE).to(tl.uint8, bitcast=True)  # saturates by itself
    else:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        code = _round_to_even_bits(tl.abs(x), DROP, EXPONENT_SHIFT, SUBNORMAL_BELOW, SUBNORMAL_SCALE)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (code | sign).to(tl.uint8)


@triton.jit
def encode_e4m3(x, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to e4m3 (saturating at 448, ties to even) as uint8."""
    return _encode_float(x, tl.float8e4nv, 448.0, 20, 960, 0.015625, 512.0, CAP)


@triton.jit
def encode_e5m2(x, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to e5m2 (saturating at 57344, ties to even) as uint8."""
    return _encode_float(x, tl.float8e5, 57344.0, 21, 448, 6.103515625e-05, 65536.0, CAP)


@triton.jit
def _encode_integer(x, SATURATE: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr):
    """fp32 to round(x + OFFSET), ties to even, as uint8."""
    if SATURATE:
        x = tl.minimum(tl.maximum(x, -QMAX), QMAX)
    # 1.5 * 2**23: the low byte of the sum is the rounded number.
    if OFFSET % 1 == 0:
        x += 12582912.0 + OFFSET
    else:
        x = (x + OFFSET) + 12582912.0
    return (x.to(tl.uint32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def encode_int8(x, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int8 codes, -127 to 127 plus 128, as uint8."""
    return _encode_integer(x, SATURATE, 127.0, 128.0)


@triton.jit
def encode_int4(x, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int4 codes, 0 to 15 for -7.5 to 7.5, as uint8."""
    return _encode_integer(x, SATURATE, 7.5, 7.5)


@triton.jit
def encode_int2(x, SATURATE: tl.constexpr, CAP: tl.constexpr):
    """fp32 to int2 codes, 0 to 3 for -1.5 to 1.5, as uint8."""
    return _encode_integer(x, SATURATE, 1.5, 1.5)
