"""The format table: every KV-cache format of this package, one declarative entry each.

Everything else (allocation, CLI names, capacity, kernels' codec choice, tests, README table) is derived from
:data:`FORMATS`. Adding a format is one :class:`KVFormat` entry below; only new arithmetic needs a new
:class:`Codec` with its device functions in ``kernels/encode.py`` and ``codecs.py`` and its pair in ``reference.py``.
"""
from __future__ import annotations

from dataclasses import dataclass, field

SCALE_BITS = 32  # scales are stored in fp32: bf16 scales were measured to double int8's error
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
ROW_ALIGNMENT = 16
"""Bytes that the rows of a page are rounded up to: what a lane copies at once."""


@dataclass(frozen=True)
class Codec:
    """Arithmetic of one number format: how a value divided by its scale becomes a code.

    Attributes:
        name: key of the device functions in ``kernels/codecs.py`` and of the pair in ``reference.py``.
        bits: bits per code: 8, 4 or 2.
        qmax: largest magnitude a code stands for; values beyond ``qmax * scale`` saturate.
        offset: integer formats: code n stands for ``n - offset``. Zero for floating formats.
    """
    name: str
    bits: int
    qmax: float
    offset: float = 0.0

    @property
    def parts(self) -> int:
        """Codes per byte: a row is that many parts, which share their bytes (:func:`part_dim`)."""
        return 8 // self.bits


@dataclass(frozen=True)
class Encoding:
    """How one tensor (K or V) is stored.

    Attributes:
        codec: the number format.
        per_token_head: True for one fp32 scale per (token, KV head), computed when the token is written; False for a
            static scale (one per layer, or one per KV head) kept in a buffer of the attention layer.
        rotation: what a row is multiplied with before it is quantized: None, ``hadamard``, or ``calibrated``: the
            layer's own matrix where a scale file has one, Hadamard elsewhere.
        statistic: the step of a row's grid is ``shrink`` times its ``absmax`` / qmax, or times its ``rms``.
        rule: the scale of the codes that follow: the ``step`` itself; ``least_squares``, <x, c> / <c, c>; or
            ``unbiased``, <x, x> / <x, c>.
    """
    codec: Codec
    per_token_head: bool
    rotation: str | None = None
    statistic: str = 'absmax'
    shrink: float = 1.0
    rule: str = 'step'

    @property
    def saturates(self) -> bool:
        """Whether an element of a row can lie beyond the codec's largest code."""
        return not self.per_token_head or self.statistic != 'absmax' or self.shrink < 1.0

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per element of a row of ``head_dim`` values, its scale and padding included."""
        return (8 * part_dim(head_dim, self.codec.parts) + (SCALE_BITS if self.per_token_head else 0)) / head_dim


@dataclass(frozen=True)
class KVFormat:
    """One KV-cache format.

    Attributes:
        name: the name used on the command line (``--quant-policy NAME``), lower case.
        policy: the ``lmdeploy.messages.QuantPolicy`` value.
        key, value: encodings of K and of V, chosen independently.
        aliases: further accepted names.
        summary: one line for tables and ``--help``.
        max_error: bound on the relative Frobenius error of a stored N(0, 1) tensor, checked by the tests.
        upstream: True where LMDeploy has a policy of this value and this package takes it over.
        experimental: why a user should think twice, in a few words; None where there is no reason.
    """
    name: str
    policy: int
    key: Encoding
    value: Encoding
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    summary: str = field(kw_only=True)
    max_error: float = field(kw_only=True)
    upstream: bool = field(default=False, kw_only=True)
    experimental: str | None = field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """The summary, with a warning where the format is experimental: for every place where a user chooses."""
        return f'{self.summary} (EXPERIMENTAL: {self.experimental})' if self.experimental else self.summary

    def bits_per_element(self, head_dim: int, v_head_dim: int | None = None) -> float:
        """Mean stored bits per K or V element, scales included.

        Args:
            head_dim: size of a K row.
            v_head_dim: size of a V row, ``head_dim`` if None.
        """
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        total = self.key.bits_per_element(head_dim) * head_dim + self.value.bits_per_element(v_head_dim) * v_head_dim
        return total / (head_dim + v_head_dim)

    @property
    def per_token_head(self) -> bool:
        """True if any of K and V carries per-(token, head) scales, i.e. the page holds scale tensors."""
        return self.key.per_token_head or self.value.per_token_head

    @property
    def needs_scales(self) -> bool:
        """True if K or V is stored with a static scale, which has to come from somewhere."""
        return not (self.key.per_token_head and self.value.per_token_head)

    @property
    def takes_transform(self) -> bool:
        """True if a scale file may bring a calibrated transform of K."""
        return self.key.rotation == 'calibrated'

    def check_head_dims(self, head_dim: int, v_head_dim: int | None = None) -> None:
        """Raise ValueError unless pages of these head sizes can be stored."""
        for what, dim in (('head_dim', head_dim), ('v_head_dim', head_dim if v_head_dim is None else v_head_dim)):
            if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % 8:
                raise ValueError(f'{self.name}: {what} {dim} is not supported; supported are multiples of 8 from '
                                 f'{MIN_HEAD_DIM} to {MAX_HEAD_DIM}. Use quant_policy none (0) for this model.')


E4M3 = Codec('e4m3', 8, 448.0)
E5M2 = Codec('e5m2', 8, 57344.0)
INT8 = Codec('int8', 8, 127.0, offset=128.0)
INT4 = Codec('int4', 4, 7.5, offset=7.5)
INT2 = Codec('int2', 2, 1.5, offset=1.5)

E4M3_TENSOR, E5M2_TENSOR = Encoding(E4M3, False), Encoding(E5M2, False)
E4M3_TOKEN, E5M2_TOKEN = Encoding(E4M3, True), Encoding(E5M2, True)
INT8_TOKEN = Encoding(INT8, True, 'hadamard')
INT4_KEY = Encoding(INT4, True, 'calibrated', shrink=0.92, rule='least_squares')
INT4_VALUE = Encoding(INT4, True, 'hadamard', shrink=0.92, rule='least_squares')
INT2_KEY = Encoding(INT2, True, 'calibrated', statistic='rms', shrink=0.996, rule='least_squares')
INT2_VALUE = Encoding(INT2, True, 'hadamard', statistic='rms', shrink=0.996, rule='unbiased')

FORMATS: tuple[KVFormat, ...] = (
    KVFormat('int8_per_token_head', 108, INT8_TOKEN, INT8_TOKEN, max_error=0.0073,
             summary='int8, rotated, with one fp32 scale per token and KV head'),
    KVFormat('fp8_per_token_head', 116, E4M3_TOKEN, E4M3_TOKEN, aliases=('fp8_e4m3_per_token_head', ), max_error=0.03,
             summary='fp8 e4m3 with one fp32 scale per token and KV head'),
    KVFormat('fp8_e5m2_per_token_head', 117, E5M2_TOKEN, E5M2_TOKEN, max_error=0.06,
             summary='fp8 e5m2 with one fp32 scale per token and KV head'),
    KVFormat('fp8', 16, E4M3_TENSOR, E4M3_TENSOR, aliases=('fp8_e4m3', ), upstream=True, max_error=0.03,
             summary='fp8 e4m3 with one static scale per layer'),
    KVFormat('fp8_e5m2', 17, E5M2_TENSOR, E5M2_TENSOR, upstream=True, max_error=0.06,
             summary='fp8 e5m2 with one static scale per layer'),
    KVFormat('k8v4_per_token_head', 184, INT8_TOKEN, INT4_VALUE, aliases=('k8v4', ), max_error=0.115,
             summary='int8 keys and int4 values, rotated, with one fp32 scale per token and KV head'),
    KVFormat('int4_per_token_head', 104, INT4_KEY, INT4_VALUE, max_error=0.115,
             summary='int4, rotated, with one fp32 scale per token and KV head'),
    KVFormat('k4v2_per_token_head', 142, INT4_KEY, INT2_VALUE, aliases=('k4v2', ), max_error=0.38,
             summary='int4 keys and int2 values, rotated, with one fp32 scale per token and KV head'),
    KVFormat('int2_per_token_head', 102, INT2_KEY, INT2_VALUE, aliases=('int2', ), max_error=0.38,
             summary='int2, rotated, with one fp32 scale per token and KV head',
             experimental='changes answers of most models; measure yours first'),
)


def part_dim(dim: int, parts: int) -> int:
    """Elements of a part of a row, which is as many bytes: a row of ``dim`` is ``parts`` equal ones, rounded up.

    Byte j holds the elements j, j + part_dim, j + 2 x part_dim ..., the first one in its lowest bits.
    """
    return -(-dim // (ROW_ALIGNMENT * parts)) * ROW_ALIGNMENT


def page_shape(block_size: int, dim: int, encoding: Encoding) -> tuple[int, int]:
    """Shape of the codes of one page and KV head, of K or of V: tokens, bytes of a row."""
    return block_size, part_dim(dim, encoding.codec.parts)


def _index(formats: tuple[KVFormat, ...]) -> tuple[dict[str, KVFormat], dict[int, KVFormat]]:
    by_name: dict[str, KVFormat] = {}
    by_policy: dict[int, KVFormat] = {}
    for fmt in formats:
        for name in (fmt.name, *fmt.aliases):
            if name != name.lower():
                raise ValueError(f'format names are lower case: {name!r}')
            if name in by_name:
                raise ValueError(f'format name {name!r} is used twice')
            by_name[name] = fmt
        if fmt.policy in by_policy:
            raise ValueError(f'policy {fmt.policy} is used by {by_policy[fmt.policy].name} and {fmt.name}')
        by_policy[fmt.policy] = fmt
    return by_name, by_policy


_BY_NAME, _BY_POLICY = _index(FORMATS)


def find_format(policy: int) -> KVFormat | None:
    """The format stored under a QuantPolicy value, or None where the policy is LMDeploy's own."""
    return _BY_POLICY.get(int(policy))


def get_format(key: str | int | KVFormat) -> KVFormat:
    """Look a format up.

    Args:
        key: a name or alias (any case), a policy number (int, or a string of digits), an
            ``lmdeploy.messages.QuantPolicy`` member, or a :class:`KVFormat`, which is returned as it is.

    Raises:
        ValueError: unknown key; the message lists what exists.
        TypeError: key of another type.
    """
    if isinstance(key, KVFormat):
        return key
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise TypeError(f'a format is named by a string or an integer, not {type(key).__name__}')
    if isinstance(key, str):
        name = key.strip().lower()
        fmt = _BY_POLICY.get(int(name)) if name.isdecimal() else _BY_NAME.get(name)
    else:
        fmt = _BY_POLICY.get(int(key))
    if fmt is None:
        known = ', '.join(f'{f.name} ({f.policy})' for f in FORMATS)
        raise ValueError(f'unknown KV cache format {key!r}; known are {known}')
    return fmt


def format_names() -> dict[str, int]:
    """Every accepted name and alias with its policy number."""
    return {name: fmt.policy for name, fmt in _BY_NAME.items()}
