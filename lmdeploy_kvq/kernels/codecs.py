"""Device arithmetic of the codecs: codes to fp16, and what belongs to a codec. No addresses here.

Every function takes ``CAP``, the compute capability as an integer (90 for sm_90; 0 for portable Triton, e.g. the
interpreter), and picks the cheapest exact instructions.

``decode_*`` takes bytes and returns a tuple of fp16 tensors of their shape, one for each code in a byte, the lowest
bits first. What it returns is the stored value plus the codec's offset, divided by a power of two
(:func:`decode_gain`): GPUs without fp8 conversion decode with shifts alone. Part i of an integer code is 2^(bits x i)
times larger, for it stays where it stands in its byte: an fp16 whose bits are just an integer n is n x 2^-24, exactly
(a subnormal number, which tensor cores multiply as fast as any other), so that neither conversion nor shift is needed.
With CENTERED, 2^(bits - 1) is subtracted from integers, which leaves an offset of 0 or -1/2: sums over many tokens
would drown in an offset.

``pairs_*`` does the same for two neighbouring bytes of a row at once, a uint16, and is always centered. It returns
twice as many tensors, those of the first byte and of the second in turn. Tensor cores take two tokens of one element in
a register; V's rows have the elements of a token side by side, and what a transposed read from shared memory gives is
two elements of each of two tokens. Two registers are made of it with hardly more instructions than of four tokens of
one element.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..formats import Codec, KVFormat
from .encode import encode_e4m3, encode_e5m2, encode_int2, encode_int4, encode_int8

FP8_CONVERT_CAP = tl.constexpr(89)  # first compute capability with e4m3 conversion instructions


@triton.jit
def decode_e4m3(codes, CENTERED: tl.constexpr, CAP: tl.constexpr):
    """e4m3 codes to fp16; divided by 256 where the GPU lacks the conversion (fp16's exponent bias is 8 larger)."""
    if CAP >= FP8_CONVERT_CAP:
        return (codes.to(tl.float8e4nv, bitcast=True).to(tl.float16), )
    elif CAP > 0:
        return (tl.inline_asm_elementwise(
            """{
            .reg .b32 lo, hi, slo, shi;
            prmt.b32 lo, $2, 0, 0x1404;
            prmt.b32 hi, $2, 0, 0x3424;
            and.b32 slo, lo, 0x80008000;
            and.b32 shi, hi, 0x80008000;
            and.b32 lo, lo, 0x7f007f00;
            and.b32 hi, hi, 0x7f007f00;
            shr.u32 lo, lo, 1;
            shr.u32 hi, hi, 1;
            or.b32 $0, lo, slo;
            or.b32 $1, hi, shi;
            }""", '=r,=r,r', [codes], dtype=tl.float16, is_pure=True, pack=4), )
    else:
        wide = codes.to(tl.uint16)
        return ((((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True), )


@triton.jit
def pairs_e4m3(codes, CAP: tl.constexpr):
    """Pairs of e4m3 codes to fp16, like :func:`decode_e4m3`."""
    if CAP >= FP8_CONVERT_CAP:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b16 first, second;
            prmt.b32 both, $2, 0, 0x3120;
            mov.b32 {first, second}, both;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            }""", '=r,=r,r', [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    elif CAP > 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second, sign, other_sign;
            prmt.b32 first, $2, 0, 0x2404;
            and.b32 second, $2, 0xff00ff00;
            and.b32 sign, first, 0x80008000;
            and.b32 other_sign, second, 0x80008000;
            and.b32 first, first, 0x7f007f00;
            and.b32 second, second, 0x7f007f00;
            shr.u32 first, first, 1;
            shr.u32 second, second, 1;
            or.b32 $0, first, sign;
            or.b32 $1, second, other_sign;
            }""", '=&r,=&r,r', [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return decode_e4m3(codes & 0xFF, True, CAP)[0], decode_e4m3(codes >> 8, True, CAP)[0]


@triton.jit
def finite_e4m3(values, CAP: tl.constexpr):
    """Decoded e4m3 with NaN replaced by a number (no infinities exist; max returns the operand that is a number)."""
    return tl.maximum(values, tl.full([1, 1], -448.0, tl.float16))


@triton.jit
def decode_e5m2(codes, CENTERED: tl.constexpr, CAP: tl.constexpr):
    """e5m2 codes to fp16: the code is fp16's upper byte."""
    if CAP > 0:
        return (tl.inline_asm_elementwise('prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;', '=r,=r,r',
                                          [codes], dtype=tl.float16, is_pure=True, pack=4), )
    else:
        return ((codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True), )


@triton.jit
def pairs_e5m2(codes, CAP: tl.constexpr):
    """Pairs of e5m2 codes to fp16."""
    if CAP > 0:
        return tl.inline_asm_elementwise('prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xff00ff00;', '=&r,=r,r', [codes],
                                         dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return decode_e5m2(codes & 0xFF, True, CAP)[0], decode_e5m2(codes >> 8, True, CAP)[0]


@triton.jit
def finite_e5m2(values, CAP: tl.constexpr):
    """Decoded e5m2 with NaN and infinities replaced by numbers of the range."""
    limit = tl.full([1, 1], 57344.0, tl.float16)
    if CAP > 0:
        return tl.minimum(tl.maximum(values, -limit), limit)
    else:  # the interpreter's minimum and maximum return NaN
        return tl.where(tl.abs(values) <= limit, values, limit)


@triton.jit
def _in_place(codes, MASK: tl.constexpr, CENTER: tl.constexpr):
    """fp16 whose bits are ``codes & MASK``, less the one whose bits are CENTER."""
    return (codes.to(tl.uint16) & MASK).to(tl.float16, bitcast=True) - CENTER * 5.9604644775390625e-08


@triton.jit
def _centered(pairs, CENTER: tl.constexpr):
    """fp16 less the one whose bits are CENTER, two at a time."""
    return tl.inline_asm_elementwise('sub.f16x2 $0, $1, $2;', '=r,r,r', [pairs, tl.full([1, 1], CENTER, tl.uint16)],
                                     dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def decode_int8(codes, CENTERED: tl.constexpr, CAP: tl.constexpr):
    """int8 codes to fp16, n x 2^-24."""
    CENTER: tl.constexpr = 0x80 if CENTERED else 0
    if CAP > 0:
        values = tl.inline_asm_elementwise('prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;', '=r,=r,r',
                                           [codes], dtype=tl.float16, is_pure=True, pack=4)
        return (_centered(values, CENTER) if CENTERED else values, )
    else:
        return (_in_place(codes, 0xFF, CENTER), )


@triton.jit
def pairs_int8(codes, CAP: tl.constexpr):
    """Pairs of int8 codes to fp16, (n - 128) x 2^-24."""
    if CAP > 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second, center;
            mov.b32 center, 0x00800080;
            and.b32 first, $2, 0x00ff00ff;
            prmt.b32 second, $2, 0, 0x4341;
            sub.f16x2 $0, first, center;
            sub.f16x2 $1, second, center;
            }""", '=&r,=r,r', [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return _in_place(codes, 0xFF, 0x80), _in_place(codes >> 8, 0xFF, 0x80)


@triton.jit
def decode_int4(codes, CENTERED: tl.constexpr, CAP: tl.constexpr):
    """Two int4 codes of each byte to fp16: n x 2^-24, and n x 2^-20 of the upper one."""
    if CAP > 0:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 lo, hi;
            prmt.b32 lo, $4, 0, 0x4140;
            prmt.b32 hi, $4, 0, 0x4342;
            and.b32 $0, lo, 0x000f000f;
            and.b32 $1, hi, 0x000f000f;
            and.b32 $2, lo, 0x00f000f0;
            and.b32 $3, hi, 0x00f000f0;
            }""", '=&r,=&r,=&r,=&r,r', [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
        if CENTERED:
            low, high = _centered(low, 0x08), _centered(high, 0x80)
        return low, high
    else:
        return _in_place(codes, 0x0F, 0x08 * CENTERED), _in_place(codes, 0xF0, 0x80 * CENTERED)


@triton.jit
def pairs_int4(codes, CAP: tl.constexpr):
    """Pairs of bytes of two int4 codes to fp16: (n - 8) x 2^-24 of the lower ones, then x 2^-20 of the upper ones."""
    if CAP > 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 next, low, high, center, upper;
            mov.b32 center, 0x00080008;
            mov.b32 upper, 0x00800080;
            shr.u32 next, $4, 8;
            and.b32 low, $4, 0x000f000f;
            and.b32 high, $4, 0x00f000f0;
            sub.f16x2 $0, low, center;
            sub.f16x2 $2, high, upper;
            and.b32 low, next, 0x000f000f;
            and.b32 high, next, 0x00f000f0;
            sub.f16x2 $1, low, center;
            sub.f16x2 $3, high, upper;
            }""", '=&r,=&r,=&r,=&r,r', [codes], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True,
            pack=2)
    else:
        return (_in_place(codes, 0x0F, 0x08), _in_place(codes >> 8, 0x0F, 0x08), _in_place(codes, 0xF0, 0x80),
                _in_place(codes >> 8, 0xF0, 0x80))


@triton.jit
def decode_int2(codes, CENTERED: tl.constexpr, CAP: tl.constexpr):
    """Four int2 codes of each byte to fp16: n x 2^-24, 2^-22, 2^-20 and 2^-18."""
    if CAP > 0:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 lo, hi;
            prmt.b32 lo, $8, 0, 0x4140;
            prmt.b32 hi, $8, 0, 0x4342;
            and.b32 $0, lo, 0x00030003;
            and.b32 $1, hi, 0x00030003;
            and.b32 $2, lo, 0x000c000c;
            and.b32 $3, hi, 0x000c000c;
            and.b32 $4, lo, 0x00300030;
            and.b32 $5, hi, 0x00300030;
            and.b32 $6, lo, 0x00c000c0;
            and.b32 $7, hi, 0x00c000c0;
            }""", '=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r', [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4)
        if CENTERED:
            a, b, c, d = _centered(a, 0x02), _centered(b, 0x08), _centered(c, 0x20), _centered(d, 0x80)
        return a, b, c, d
    else:
        return (_in_place(codes, 0x03, 0x02 * CENTERED), _in_place(codes, 0x0C, 0x08 * CENTERED),
                _in_place(codes, 0x30, 0x20 * CENTERED), _in_place(codes, 0xC0, 0x80 * CENTERED))


@triton.jit
def pairs_int2(codes, CAP: tl.constexpr):
    """Pairs of bytes of four int2 codes to fp16: (n - 2) x 2^-24 of the lowest ones, then x 2^-22, 2^-20 and 2^-18."""
    if CAP > 0:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 next, code, center;
            shr.u32 next, $8, 8;
            mov.b32 center, 0x00020002;
            and.b32 code, $8, 0x00030003;
            sub.f16x2 $0, code, center;
            and.b32 code, next, 0x00030003;
            sub.f16x2 $1, code, center;
            mov.b32 center, 0x00080008;
            and.b32 code, $8, 0x000c000c;
            sub.f16x2 $2, code, center;
            and.b32 code, next, 0x000c000c;
            sub.f16x2 $3, code, center;
            mov.b32 center, 0x00200020;
            and.b32 code, $8, 0x00300030;
            sub.f16x2 $4, code, center;
            and.b32 code, next, 0x00300030;
            sub.f16x2 $5, code, center;
            mov.b32 center, 0x00800080;
            and.b32 code, $8, 0x00c000c0;
            sub.f16x2 $6, code, center;
            and.b32 code, next, 0x00c000c0;
            sub.f16x2 $7, code, center;
            }""", '=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r', [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2)
    else:
        return (_in_place(codes, 0x03, 0x02), _in_place(codes >> 8, 0x03, 0x02), _in_place(codes, 0x0C, 0x08),
                _in_place(codes >> 8, 0x0C, 0x08), _in_place(codes, 0x30, 0x20), _in_place(codes >> 8, 0x30, 0x20),
                _in_place(codes, 0xC0, 0x80), _in_place(codes >> 8, 0xC0, 0x80))


@triton.jit
def finite_always(values, CAP: tl.constexpr):
    """Every code of the format is a finite number."""
    return values


@dataclass(frozen=True)
class DeviceCodec:
    """Device functions of one codec.

    Attributes:
        encode, decode: fp32 to codes (encode.py), codes to fp16. pairs: two neighbouring codes to fp16, centered.
        finite: makes whatever ``decode`` returns finite, for slots that were never written.
        gain: what ``decode`` divides by; soft_gain: on GPUs without fp8 conversion.
    """
    encode: Any
    decode: Any
    pairs: Any
    finite: Any
    gain: float = 1.0
    soft_gain: float = 1.0


_INTEGER = 2.0**24  # fp16's smallest subnormal is 2^-24

DEVICE_CODECS: dict[str, DeviceCodec] = {
    'e4m3': DeviceCodec(encode_e4m3, decode_e4m3, pairs_e4m3, finite_e4m3, soft_gain=256.0),
    'e5m2': DeviceCodec(encode_e5m2, decode_e5m2, pairs_e5m2, finite_e5m2),
    'int8': DeviceCodec(encode_int8, decode_int8, pairs_int8, finite_always, _INTEGER, _INTEGER),
    'int4': DeviceCodec(encode_int4, decode_int4, pairs_int4, finite_always, _INTEGER, _INTEGER),
    'int2': DeviceCodec(encode_int2, decode_int2, pairs_int2, finite_always, _INTEGER, _INTEGER),
}


def device_codec(codec: Codec) -> DeviceCodec:
    """Device functions for a codec of the format table."""
    return DEVICE_CODECS[codec.name]


def decode_gain(codec: Codec, cap: int) -> float:
    """Factor that turns what ``decode`` returns into the value the code stands for, plus the codec's offset."""
    device = DEVICE_CODECS[codec.name]
    return device.gain if cap >= FP8_CONVERT_CAP.value else device.soft_gain


def decoding(fmt: KVFormat, cap: int, pairs: bool = False) -> dict[str, Any]:
    """The constants of kernels that read pages: of K, and with a V behind the names of V, which comes in pairs or not.

    OFFSET is what is left of a codec's offset in what ``decode`` returns: all of it in K, which is not centered.
    """
    constants: dict[str, Any] = {}
    for encoding, suffix in ((fmt.key, ''), (fmt.value, 'V')):
        codec, device = encoding.codec, device_codec(encoding.codec)
        center = 2**(codec.bits - 1) if codec.offset and suffix else 0
        functions = {'PAIRS': device.pairs, 'FINITE': device.finite} if suffix and pairs else {'DECODE': device.decode}
        for name, value in {**functions, 'BITS': codec.bits, 'OFFSET': codec.offset - center,
                            'GAIN': decode_gain(codec, cap), 'PER_TOKEN': encoding.per_token_head}.items():
            constants[name + suffix] = value
    return constants
