"""How many bytes a KV cache takes per token, and how many tokens fit: derived from the format table alone.

Sizes follow LMDeploy's packed pages: the tensors of one block and layer (K, V and, where a format has them, K's and V's
scales) lie one after another, each rounded up to :data:`ALIGNMENT` bytes. Needs neither torch nor LMDeploy.
"""
from __future__ import annotations

from dataclasses import dataclass

from .formats import SCALE_BITS, Encoding, KVFormat, get_format, part_dim

ALIGNMENT = 256
"""Bytes to which every tensor of a block is rounded up (``CacheDesc.alignment`` in LMDeploy's ``schema.py``)."""

BF16_BITS = 16

TABLE_BYTES = 128 * 2**20
"""Bytes that the block tables of all CUDA graphs of an engine have at most, for formats of this package. With 1,024
sequences (2,815 rows in all graphs) and blocks of 64 that is room for 760,000 tokens of one sequence."""


@dataclass(frozen=True)
class CacheShape:
    """What of a model decides the size of its KV cache, on one GPU.

    Attributes:
        num_layers: layers that keep a KV cache.
        kv_heads: KV heads on one GPU, i.e. the model's divided by the tensor parallelism.
        head_dim: elements of a K row.
        v_head_dim: elements of a V row, ``head_dim`` if None.
        block_size: tokens per page (LMDeploy's ``kernel_block_size``, 64 by default).
        alignment: bytes to which every tensor of a block is rounded up.

    Raises:
        ValueError: a number that is not positive.
    """
    num_layers: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    block_size: int = 64
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f'{name} must be positive, got {value}')

    @property
    def dims(self) -> tuple[int, int]:
        """Elements of a K row and of a V row."""
        return self.head_dim, self.head_dim if self.v_head_dim is None else self.v_head_dim


def block_bytes(fmt: str | int | KVFormat | None, shape: CacheShape) -> int:
    """Bytes of one block over all layers, padding included.

    Args:
        fmt: format, name, alias or policy; None for the unquantized bf16 cache.
        shape: the model's cache on one GPU.

    Raises:
        ValueError: unknown format, or a head size it cannot store.
    """
    rows = shape.kv_heads * shape.block_size
    if fmt is None:
        bits = [rows * dim * BF16_BITS for dim in shape.dims]
    else:
        fmt = get_format(fmt)
        fmt.check_head_dims(*shape.dims)
        pairs = list(zip((fmt.key, fmt.value), shape.dims, strict=True))
        bits = [rows * part_dim(dim, encoding.codec.parts) * 8 for encoding, dim in pairs]
        bits += [_scale_bits(encoding, rows) for encoding, _ in pairs]
    return shape.num_layers * sum(_round_up(-(-b // 8), shape.alignment) for b in bits)


def bytes_per_token(fmt: str | int | KVFormat | None, shape: CacheShape) -> float:
    """Bytes one token takes over all layers of one GPU: codes, scales and padding.

    Args:
        fmt: format, name, alias or policy; None for the unquantized bf16 cache.
        shape: the model's cache on one GPU.

    Raises:
        ValueError: unknown format, or a head size it cannot store.
    """
    return block_bytes(fmt, shape) / shape.block_size


def bf16_bytes_per_token(shape: CacheShape) -> float:
    """Bytes one token takes in the unquantized bf16 cache, over all layers of one GPU."""
    return bytes_per_token(None, shape)


def gain(fmt: str | int | KVFormat, shape: CacheShape) -> float:
    """How many times as many tokens fit in the same memory as with the bf16 cache (1.94: 94 % more).

    Raises:
        ValueError: unknown format, or a head size it cannot store.
    """
    return block_bytes(None, shape) / block_bytes(fmt, shape)


def tokens_in(nbytes: float, fmt: str | int | KVFormat | None, shape: CacheShape) -> int:
    """Tokens that fit into ``nbytes`` bytes of one GPU, in whole blocks; None as format means the bf16 cache.

    Raises:
        ValueError: unknown format, or a head size it cannot store.
    """
    return int(nbytes // block_bytes(fmt, shape)) * shape.block_size


def _scale_bits(encoding: Encoding, rows: int) -> int:
    """Static scales live in the attention layer, not in the pages."""
    return rows * SCALE_BITS if encoding.per_token_head else 0


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
