"""Rotations and other linear maps of K and V rows before they are quantized, as pairs of fp16 matrices.

Quantization loses least where a row's elements are alike. Stored row ``y = x A``, and ``q A^-T`` in place of a query q
leaves every score as it was. A is the Hadamard matrix (QuaRot: Ashkboos et al., 2024, arXiv:2404.00456), or one that
was calibrated for a layer's keys.
"""
from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

MAX_CONDITION = 1e4
"""Largest condition number of a matrix: beyond it, fp16 entries lose what 4-bit codes keep."""

MAX_DEFECT = 0.02
"""Largest element of ``A x inverse - I``, both in fp16."""


MIN_BUTTERFLY = 64
"""Smallest dim that kernels multiply by butterflies: the parts of its rows have no padding."""


class TransformError(ValueError):
    """A matrix that cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class Transform:
    """A linear map of rows and what undoes it.

    Attributes:
        forward_t: fp16 [heads or 1, dim, dim], contiguous: ``stored = row @ forward_t.mT``. Transposed, because kernels
            multiply from the left.
        inverse: fp16 [heads or 1, dim, dim], contiguous: ``row = stored @ inverse``; and queries meet stored keys as
            ``query @ inverse.mT``.
        factors: sizes of the entries of A and of its inverse, where they are those of one Hadamard matrix: kernels
            then multiply by butterflies, and read no matrix. Zeros elsewhere.
    """
    forward_t: torch.Tensor
    inverse: torch.Tensor
    factors: tuple[float, float] = (0.0, 0.0)

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self.inverse.size(-1)

    @property
    def stride_h(self) -> int:
        """Elements from a head's matrix to the next head's: 0 where all heads share one."""
        return 0 if self.inverse.size(0) == 1 else self.inverse.stride(0)

    def to(self, device: torch.device | str) -> Transform:
        """The same on another device."""
        return Transform(self.forward_t.to(device), self.inverse.to(device), self.factors)

    def head(self, index: int) -> Transform:
        """The map of one KV head alone."""
        index = 0 if self.inverse.size(0) == 1 else index
        return Transform(self.forward_t[index:index + 1], self.inverse[index:index + 1], self.factors)

    def store(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 ``rows @ A``, rows [..., heads, dim]."""
        return _product(rows, self.forward_t.mT, self.factors[0] != 0)

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """fp32 ``stored @ inverse``, stored [..., heads, dim]."""
        return torch.einsum('...hi,hij->...hj', stored.float(), self.inverse.float().expand(stored.size(-2), -1, -1))

    def query(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 ``rows @ inverse.T``, rows [..., heads, dim], as many heads as KV heads or a multiple."""
        group = rows.size(-2) // self.inverse.size(0) if self.inverse.size(0) > 1 else 1
        return _product(rows, self.inverse.mT.repeat_interleave(group, 0), self.factors[1] != 0)

    def digest(self) -> str:
        """Short hash of the matrices: caches written with different ones do not mix."""
        return hashlib.sha256(self.forward_t.cpu().numpy().tobytes()).hexdigest()[:16]


def _product(rows: torch.Tensor, matrix: torch.Tensor, exact: bool) -> torch.Tensor:
    """fp32 rows [..., heads, dim] times matrix [heads or 1, dim, dim].

    Unless ``exact``, rows are rounded to fp16 as multiples of a power of two near their largest element, which changes
    bf16 rows only where they are 2^-14 of the largest or less. Products of exact rows are summed in fp64: fp32 sums
    depend on their order, which depends on how many rows there are, and a row's codes must not.
    """
    rows, matrix = rows.float(), matrix.float().expand(rows.size(-2), -1, -1)
    if exact:
        return torch.einsum('...hi,hij->...hj', rows.double(), matrix.double()).float()
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=2.0**-126)
    power = torch.exp2(torch.frexp(largest)[1] - 1.0)
    return torch.einsum('...hi,hij->...hj', (rows / power).half().float(), matrix) * power


def block_size(dim: int) -> int:
    """Size of the Hadamard blocks on the diagonal: the largest power of two that divides ``dim``."""
    return dim & -dim


@functools.cache
def hadamard(dim: int, device: torch.device | str = 'cpu') -> Transform:
    """The Hadamard transform, block-diagonal where ``dim`` is no power of two.

    Entries are powers of two, exact in fp16: of a block of 2^b, A's are 2^-ceil(b / 2) and its inverse's 2^-floor(b /
    2). Where b is odd, A is therefore sqrt(2) times smaller than orthonormal, which the scales make up for.
    """
    block = block_size(dim)
    index = torch.arange(dim)
    both = index[:, None] & index[None, :] & (block - 1)
    parity = sum((both >> bit) & 1 for bit in range(max(block.bit_length() - 1, 1))) % 2
    signs = torch.where(index[:, None] // block == index[None, :] // block, 1.0 - 2.0 * parity, 0.0)
    bits = block.bit_length() - 1
    factors = 2.0**-((bits + 1) // 2), 2.0**-(bits // 2)
    forward, inverse = (signs[None].half().to(device) * factor for factor in factors)
    return Transform(forward, inverse, factors if MIN_BUTTERFLY <= dim == block else (0.0, 0.0))


def from_matrix(matrix: torch.Tensor, what: str = 'transform') -> Transform:
    """The transform of A, checked.

    Args:
        matrix: [heads, dim, dim], any float dtype; scaled by a power of two, which scales make up for.
        what: its name in messages.

    Raises:
        TransformError: wrong shape, NaN or inf, singular or badly conditioned, or an inverse that fp16 cannot hold.
    """
    if matrix.dim() != 3 or matrix.size(1) != matrix.size(2):
        raise TransformError(f'{what} has shape {tuple(matrix.shape)}; [kv_heads, head_dim, head_dim] is needed')
    exact = matrix.double().cpu()
    if not exact.isfinite().all():
        raise TransformError(f'{what} has values that are not finite')
    condition = torch.linalg.cond(exact)
    if not (condition <= MAX_CONDITION).all():
        head = int(condition.nan_to_num(float('inf')).argmax())
        raise TransformError(f'{what}: the matrix of KV head {head} has condition number {float(condition[head]):.3g}; '
                             f'up to {MAX_CONDITION:g} is usable')
    exact = exact * torch.exp2(-torch.floor(torch.log2(exact.abs().amax((1, 2), keepdim=True))))
    forward = exact.half()
    inverse = torch.linalg.inv(forward.double()).half()
    defect = (forward.double() @ inverse.double() - torch.eye(exact.size(-1))).abs().max()
    if not defect <= MAX_DEFECT:
        raise TransformError(f'{what}: matrix times inverse is off the identity by {float(defect):.3g} in fp16; up to '
                             f'{MAX_DEFECT:g} is usable')
    return Transform(forward.mT.contiguous(), inverse.contiguous())


KINDS = ('balanced', 'diagonal')
"""How a matrix for K follows from statistics; see :func:`calibrated`."""

RIDGE = 1e-3
"""Added to the diagonal of second moments, in units of their mean eigenvalue: what was hardly seen stays bounded."""


def calibrated(kind: str, key_moment: torch.Tensor, query_moment: torch.Tensor, key_mean: torch.Tensor) -> torch.Tensor:
    """A for keys, from what queries and keys look like after RoPE.

    The error of a score is ``e A^-1 q`` for an error e of the stored row, so that a good A makes the stored elements
    alike (e is small) where queries are large (A^-1 takes it down). ``diagonal`` scales elements by
    ``(E q^2 / E k^2)^1/4`` (SmoothQuant: Xiao et al., 2022, arXiv:2211.10438, here between Q and K) and mixes them by
    Hadamard. ``balanced`` does it in the basis where it is exact: P = A A^T is the matrix geometric mean of Sk^-1 and
    Sq, which gives stored keys and transformed queries the same second moment; its free rotation puts the principal
    axes of the stored keys first and mixes them by Hadamard.

    Args:
        kind: one of :data:`KINDS`.
        key_moment: E[k k^T], query_moment: E[q q^T] over the query heads of a KV head, [kv_heads, dim, dim].
        key_mean: E[k], [kv_heads, dim].

    Returns:
        fp64 [kv_heads, dim, dim].

    Raises:
        TransformError: statistics with NaN or inf, or of nothing but zeros.
    """
    sk, sq = (_ridged(x.double().cpu(), what) for x, what in ((key_moment, 'keys'), (query_moment, 'queries')))
    dim = sk.size(-1)
    mix = hadamard(dim).forward_t[0].mT.double()
    mix /= mix[0].norm()  # orthonormal
    if kind == 'diagonal':
        scale = (sq.diagonal(dim1=1, dim2=2) / sk.diagonal(dim1=1, dim2=2)) ** 0.25
        return scale[:, :, None] * mix
    if kind != 'balanced':
        raise TransformError(f'unknown kind of transform {kind!r}; known are {", ".join(KINDS)}')
    root, unroot = _power(sk, 0.5), _power(sk, -0.5)
    half = _power(unroot @ _power(root @ sq @ root, 0.5) @ unroot, 0.5)  # P^1/2
    mean = key_mean.double().cpu()
    spread = half @ (key_moment.double().cpu() - mean[:, :, None] * mean[:, None]) @ half
    axes = torch.linalg.eigh((spread + spread.mT) / 2)[1]
    # the largest axes go to different Hadamard blocks, where there are several
    blocks = torch.arange(dim).view(block_size(dim), -1).mT.flatten()
    return half @ axes.flip(-1)[:, :, blocks] @ mix


def _ridged(moment: torch.Tensor, what: str) -> torch.Tensor:
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    if not (moment.isfinite().all() and (mean > 0).all()):
        raise TransformError(f'the second moments of {what} are not finite and positive')
    return (moment + moment.mT) / 2 + RIDGE * mean[:, None, None] * torch.eye(moment.size(-1), dtype=torch.float64)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric positive definite matrices, fp64 [..., dim, dim]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp(min=1e-300)[..., None, :] ** exponent @ vectors.mT


def digest_of(matrices: Mapping[int, torch.Tensor]) -> str:
    """Short hash of a model's matrices, by layer: the whole model's, not a rank's."""
    digest = hashlib.sha256()
    for layer, matrix in sorted(matrices.items()):
        digest.update(layer.to_bytes(4, 'little') + matrix.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
