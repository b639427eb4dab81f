"""The format table: every KV-cache format of this package, one declarative entry each.

Everything else (allocation, CLI names, capacity, kernels' codec choice, tests, README table) is derived from
:data:`FORMATS`. Adding a format is one :class:`KVFormat` entry below; only new arithmetic needs a new
:class:`Codec` with its device pair in ``kernels/codecs.py`` and its reference pair in ``reference.py``.
"""
from __future__ import annotations

from dataclasses import dataclass, field

SCALE_BITS = 32  # scales are stored in fp32: bf16 scales were measured to double int8's error
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
GROUP = 16
"""Pages are made of blocks of GROUP tokens by GROUP elements, in the order of tensor-core fragments."""


@dataclass(frozen=True)
class Codec:
    """Arithmetic of one number format: how a value divided by its scale becomes a code.

    Attributes:
        name: key of the device pair in ``kernels/codecs.py`` and of the pair in ``reference.py``.
        bits: bits per code.
        qmax: largest magnitude a code stands for; values beyond ``qmax * scale`` saturate.
    """
    name: str
    bits: int
    qmax: float


@dataclass(frozen=True)
class Encoding:
    """How one tensor (K or V) is stored: a codec plus the granularity of its scale.

    Attributes:
        codec: the number format.
        per_token_head: True for one fp32 scale per (token, KV head), computed when the token is written; False for a
            static scale (one per layer, or one per KV head) kept in a buffer of the attention layer.
    """
    codec: Codec
    per_token_head: bool

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per element of a row of ``head_dim`` values, its scale and padding included."""
        return (self.codec.bits * stored_dim(head_dim) + (SCALE_BITS if self.per_token_head else 0)) / head_dim


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
    """
    name: str
    policy: int
    key: Encoding
    value: Encoding
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    summary: str = field(kw_only=True)
    max_error: float = field(kw_only=True)
    upstream: bool = field(default=False, kw_only=True)

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

    def check_head_dims(self, head_dim: int, v_head_dim: int | None = None) -> None:
        """Raise ValueError unless pages of these head sizes can be stored."""
        for what, dim in (('head_dim', head_dim), ('v_head_dim', head_dim if v_head_dim is None else v_head_dim)):
            if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % 8:
                raise ValueError(f'{self.name}: {what} {dim} is not supported; supported are multiples of 8 from '
                                 f'{MIN_HEAD_DIM} to {MAX_HEAD_DIM}. Use quant_policy none (0) for this model.')


E4M3 = Codec('e4m3', 8, 448.0)
E5M2 = Codec('e5m2', 8, 57344.0)
INT8 = Codec('int8', 8, 127.0)

E4M3_TENSOR, E5M2_TENSOR = Encoding(E4M3, False), Encoding(E5M2, False)
E4M3_TOKEN, E5M2_TOKEN, INT8_TOKEN = Encoding(E4M3, True), Encoding(E5M2, True), Encoding(INT8, True)

FORMATS: tuple[KVFormat, ...] = (
    KVFormat('int8_per_token_head', 108, INT8_TOKEN, INT8_TOKEN, max_error=0.009,
             summary='int8 with one fp32 scale per token and KV head'),
    KVFormat('fp8_per_token_head', 116, E4M3_TOKEN, E4M3_TOKEN, aliases=('fp8_e4m3_per_token_head', ), max_error=0.03,
             summary='fp8 e4m3 with one fp32 scale per token and KV head'),
    KVFormat('fp8_e5m2_per_token_head', 117, E5M2_TOKEN, E5M2_TOKEN, max_error=0.06,
             summary='fp8 e5m2 with one fp32 scale per token and KV head'),
    KVFormat('fp8', 16, E4M3_TENSOR, E4M3_TENSOR, aliases=('fp8_e4m3', ), upstream=True, max_error=0.03,
             summary='fp8 e4m3 with one static scale per layer'),
    KVFormat('fp8_e5m2', 17, E5M2_TENSOR, E5M2_TENSOR, upstream=True, max_error=0.06,
             summary='fp8 e5m2 with one static scale per layer'),
)


def stored_dim(dim: int) -> int:
    """Elements that a row of ``dim`` takes in a page: whole groups."""
    return -(-dim // GROUP) * GROUP


def page_shape(block_size: int, dim: int) -> tuple[int, int]:
    """Shape of the codes of one page and KV head, of K or of V: groups of tokens, codes of a group."""
    return block_size // GROUP, GROUP * stored_dim(dim)


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
