"""Public operations on a quantized paged KV cache: allocate, write, attend, flatten."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .formats import Encoding, KVFormat, get_format, page_shape, part_dim
from .transforms import Transform, hadamard

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class PagedCache:
    """Pages of one layer's quantized K and V.

    Attributes:
        format: the entry of the format table.
        k_codes, v_codes: uint8 [blocks, kv_heads, block_size, bytes of a row]; the last two axes are contiguous, rows
            are rounded up to 16 bytes (docs/formats.md).
        head_dim, v_head_dim: elements of a K row and of a V row.
        k_scales, v_scales: fp32 [blocks, kv_heads, block_size], or None for a static encoding.
        k_static_scale, v_static_scale: fp32 scalar or [kv_heads], or None for a per-token-head encoding.
        k_transform, v_transform: what rows are multiplied with before they are quantized, for encodings with a
            rotation; Hadamard if not given.

    Views with any block stride are accepted (LMDeploy packs all tensors of a block into one pool).
    """
    format: KVFormat
    k_codes: torch.Tensor
    v_codes: torch.Tensor
    head_dim: int
    v_head_dim: int
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    k_static_scale: torch.Tensor | None = None
    v_static_scale: torch.Tensor | None = None
    k_transform: Transform | None = None
    v_transform: Transform | None = None

    def __post_init__(self) -> None:
        device = self.k_codes.device
        if self.k_transform is None and self.format.key.rotation is not None:
            self.k_transform = hadamard(self.head_dim, device)
        if self.v_transform is None and self.format.value.rotation is not None:
            self.v_transform = hadamard(self.v_head_dim, device)

    @classmethod
    def allocate(cls, fmt: str | int | KVFormat, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                 v_head_dim: int | None = None, device: torch.device | str = 'cuda') -> Self:
        """Allocate zeroed pages.

        Args:
            fmt: format, name, alias or policy.
            num_blocks: number of pages.
            block_size: tokens per page, a power of two from 16 up.
            num_kv_heads: KV heads.
            head_dim: size of a K row; v_head_dim: size of a V row, ``head_dim`` if None.
            device: where to allocate.

        Raises:
            ValueError: unknown format, a block size that is no power of two, or a head size it cannot pack.
        """
        fmt = get_format(fmt)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        fmt.check_head_dims(head_dim, v_head_dim)
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f'block_size must be a power of two from 16 up, got {block_size}')

        def scales(encoding: Encoding) -> torch.Tensor | None:
            shape = (num_blocks, num_kv_heads, block_size)
            return torch.zeros(shape, dtype=torch.float32, device=device) if encoding.per_token_head else None

        def static(encoding: Encoding) -> torch.Tensor | None:
            return None if encoding.per_token_head else torch.ones((), dtype=torch.float32, device=device)

        k_codes, v_codes = (torch.zeros((num_blocks, num_kv_heads, *page_shape(block_size, dim, encoding)),
                                        dtype=torch.uint8, device=device)
                            for dim, encoding in ((head_dim, fmt.key), (v_head_dim, fmt.value)))
        return cls(fmt, k_codes, v_codes, head_dim, v_head_dim,
                   scales(fmt.key), scales(fmt.value), static(fmt.key), static(fmt.value))

    @property
    def num_blocks(self) -> int:
        """Pages."""
        return self.k_codes.size(0)

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.k_codes.size(1)

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.k_codes.size(2)

    @property
    def k_scale(self) -> torch.Tensor:
        """K's scale, fp32: [blocks, block_size, kv_heads], or the static scalar (or [kv_heads])."""
        return self.k_static_scale if self.k_scales is None else self.k_scales.transpose(1, 2)  # type: ignore[return-value]

    @property
    def v_scale(self) -> torch.Tensor:
        """V's scale, fp32: [blocks, block_size, kv_heads], or the static scalar (or [kv_heads])."""
        return self.v_static_scale if self.v_scales is None else self.v_scales.transpose(1, 2)  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        tensors = (self.k_codes, self.v_codes, self.k_scale, self.v_scale)
        return sum(t.numel() * t.element_size() for t in tensors)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The kernels' pointers, in their order: codes of K and V, their scales, their static scales."""
        return self.k_codes, self.v_codes, self.k_scales, self.v_scales, self.k_static_scale, self.v_static_scale

    def sizes(self) -> dict[str, int]:
        """The kernels' constants: elements and bytes (a part) of a row, and as powers of 2; parts; tokens of a page."""
        sizes = {'PAGE': self.block_size}
        for suffix, encoding, dim in (('', self.format.key, self.head_dim), ('V', self.format.value, self.v_head_dim)):
            part = part_dim(dim, encoding.codec.parts)
            sizes |= {f'D{suffix}': dim, f'PART{suffix}': part, f'PARTS{suffix}': encoding.codec.parts,
                      f'BLOCK_D{suffix}': 1 << (dim - 1).bit_length(),
                      f'BLOCK_P{suffix}': 1 << (part - 1).bit_length()}
        return sizes

    def strides(self) -> tuple[int, ...]:
        """The kernels' strides, in their order; zeros where there is nothing to step over.

        Codes of K and of V, scales of K and of V (block, head each), and the heads of the static K and V scale.

        Raises:
            ValueError: pages whose inner axes are not contiguous.
        """
        for codes in (self.k_codes, self.v_codes):
            if codes.stride(3) != 1 or codes.stride(2) != codes.size(3):
                raise ValueError(f'pages must be contiguous in their last two axes, got strides {codes.stride()}')
        k_scales, v_scales = ((0, 0) if s is None else s.stride()[:2] for s in (self.k_scales, self.v_scales))
        static = (0 if s is None or s.dim() == 0 else s.stride(0) for s in (self.k_static_scale, self.v_static_scale))
        return (*self.k_codes.stride()[:2], *self.v_codes.stride()[:2], *k_scales, *v_scales, *static)


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
    """Quantize new tokens into their slots, in place.

    Args:
        key: [tokens, kv_heads, head_dim], fp16, bf16 or fp32; value: [tokens, kv_heads, v_head_dim].
        cache: written in place.
        slot_mapping: [tokens] integers, slot = block * block_size + offset; negative slots are skipped and leave every
            byte of the cache as it was.

    Raises:
        ValueError: shapes that do not fit the cache, or tensors the kernels cannot run on.
    """
    from .kernels.fill import TokenLayout, fill
    if slot_mapping.shape != key.shape[:1]:
        raise ValueError(f'slot_mapping has shape {tuple(slot_mapping.shape)}, one slot per token of key is needed')
    fill(key, value, cache, TokenLayout(slots=slot_mapping.contiguous()))


def paged_attention(query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor, *,
                    query_len: int = 1, sm_scale: float | None = None, window: int | None = None,
                    softcap: float | None = None, sinks: torch.Tensor | None = None,
                    alibi_slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention of every sequence's newest tokens over its quantized pages.

    Args:
        query: [batch * query_len, heads, head_dim], fp16, bf16 or fp32; sequences one after another. Row j of a
            sequence stands at position ``kv_len - query_len + j``.
        cache: the pages; the new tokens are already written.
        block_table: [batch, max_blocks] int32 page ids.
        kv_lens: [batch] int32 or int64 tokens per sequence, the new ones included; 0 gives zero rows.
        query_len: new tokens per sequence, 1 to 16.
        sm_scale: softmax scale, ``head_dim ** -0.5`` if None.
        window: how many earlier tokens a token sees besides itself; None or negative: all.
        softcap: ``c`` in ``c * tanh(score / c)``; None, zero or negative: off.
        sinks: [heads] one extra logit per query head, without a value.
        alibi_slopes: [heads], ``slope * (kv_pos - q_pos)`` is added to the score.

    Returns:
        [batch * query_len, heads, v_head_dim] in query's dtype.

    Raises:
        ValueError: shapes or limits violated (query_len 1 to 16, heads per KV head 1 to 64, batch 1 to 1024).
    """
    from .kernels.decode import decode
    out = query.new_empty((*query.shape[:2], cache.v_head_dim))
    return decode(query, cache, block_table, kv_lens, out, query_len=query_len,
                  sm_scale=query.size(-1)**-0.5 if sm_scale is None else sm_scale,
                  window=None if window is None or window < 0 else window,
                  softcap=None if softcap is None or softcap <= 0 else softcap, sinks=sinks, alibi_slopes=alibi_slopes)


def flatten(cache: PagedCache, block_table: torch.Tensor, kv_lens: torch.Tensor,
            dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the pages of a batch into dense tensors. Synchronizes with the device to size the result.

    Args:
        cache: the pages.
        block_table: [batch, max_blocks] int32 page ids; kv_lens: [batch] tokens per sequence.
        dtype: of the result.

    Returns:
        key [sum(kv_lens), kv_heads, head_dim] and value [sum(kv_lens), kv_heads, v_head_dim].
    """
    from .kernels.flatten import flatten as launch
    total = int(kv_lens.sum())
    key = torch.empty((total, cache.num_kv_heads, cache.head_dim), dtype=dtype, device=cache.k_codes.device)
    value = torch.empty((total, cache.num_kv_heads, cache.v_head_dim), dtype=dtype, device=cache.k_codes.device)
    launch(cache, block_table, kv_lens, key, value, total)
    return key, value
