"""Streaming statistics of the K, V and Q that attention sees, and the static scales that follow from them.

Pure torch, on any device, and fed the same way by both ways of calibrating: transformers on a CPU and LMDeploy's engine
on a GPU. Per layer: 10 kB per KV head and histogram, and two fp32 matrices [head_dim, head_dim] per KV head.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .formats import Codec, KVFormat
from .reference import MAX_INPUT, MIN_SCALE, decode_codes, encode_codes
from .transforms import TransformError, calibrated, from_matrix

METHODS = ('absmax', 'percentile', 'mse')
GRANULARITIES = ('tensor', 'head')

BINS_PER_OCTAVE = 32
MIN_EXPONENT, MAX_EXPONENT = -24, 16  # the histogram spans 2^-24 to 2^16; a cache stores no more than MAX_INPUT
BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE
_POINTS = 4  # values per bin at which the error of a scale is taken; a bin is 2 % wide, a step of e4m3 6 to 12 %
_CANDIDATES = 4  # magnitudes per octave that "mse" tries, over eight octaves below the largest value


@dataclass
class Magnitudes:
    """How large one tensor's values are, per KV head.

    Attributes:
        absmax: fp32 [kv_heads].
        counts: int64 [kv_heads, BINS], values per bin of |x| on a logarithmic grid; the first also has what is smaller.
    """
    absmax: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, kv_heads: int, device: torch.device) -> Magnitudes:
        """Nothing seen yet."""
        return cls(torch.zeros(kv_heads, device=device),
                   torch.zeros(kv_heads, BINS, dtype=torch.int64, device=device))

    def update(self, x: torch.Tensor) -> None:
        """Count x [tokens, kv_heads, dim], any float dtype; values saturate like those that a cache stores."""
        size = x.float().abs().clamp(max=MAX_INPUT)
        heads = size.size(1)
        self.absmax = torch.maximum(self.absmax, size.amax((0, 2)))
        place = ((size.log2() - MIN_EXPONENT) * BINS_PER_OCTAVE).nan_to_num(0.0).clamp(0, BINS - 1).long()
        place += torch.arange(heads, device=x.device)[:, None] * BINS
        self.counts += torch.bincount(place.flatten(), minlength=heads * BINS).view(heads, BINS)

    def merged(self) -> Magnitudes:
        """All heads as one."""
        return Magnitudes(self.absmax.amax(0, keepdim=True), self.counts.sum(0, keepdim=True))

    def scale(self, codec: Codec, method: str, granularity: str, percentile: float) -> torch.Tensor:
        """fp32 static scale, [] or [kv_heads]: the chosen magnitude over the largest of the number format.

        Args:
            codec: what codes are stored as.
            method: ``absmax``: the largest value seen; ``percentile``: the value that so many percent do not exceed;
                ``mse``: the magnitude of least squared error after saturating and rounding, the largest of equals.
            granularity: ``tensor`` (one per layer) or ``head``.
            percentile: for that method, above 0 and up to 100.
        """
        seen = self.merged() if granularity == 'tensor' else self
        if method == 'absmax':
            size = seen.absmax
        elif method == 'percentile':
            size = seen._percentile(percentile)
        elif method == 'mse':
            size = torch.stack([_least_error(m, n, codec) for m, n in zip(seen.absmax, seen.counts)])
        else:
            raise ValueError(f'unknown method {method!r}; known are {", ".join(METHODS)}')
        scale = (size / codec.qmax).clamp(min=MIN_SCALE)  # a head of zeros keeps a usable scale, NaN stays
        return scale[0] if granularity == 'tensor' else scale

    def _percentile(self, percentile: float) -> torch.Tensor:
        share = self.counts.cumsum(1).double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        first = (share < percentile / 100).sum(1).clamp(max=BINS - 1)
        return torch.minimum(torch.exp2(MIN_EXPONENT + (first + 1) / BINS_PER_OCTAVE), self.absmax)


def _least_error(absmax: torch.Tensor, counts: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Magnitude [] for which values distributed like ``counts`` [BINS] lose least; the largest where several do."""
    position = (torch.arange(BINS * _POINTS, device=counts.device) + 0.5) / (BINS_PER_OCTAVE * _POINTS)
    x = torch.exp2(MIN_EXPONENT + position).clamp(max=max(float(absmax), 2.0**MIN_EXPONENT))
    weight = counts.double().repeat_interleave(_POINTS)
    best, least = absmax, float('inf')
    for step in range(8 * _CANDIDATES):
        size = absmax * 2.0**(-step / _CANDIDATES)
        scale = (size / codec.qmax).clamp(min=MIN_SCALE)
        error = float((weight * (decode_codes(encode_codes(x / scale, codec), codec) * scale - x).double()**2).sum())
        if error < least * (1 - 1e-6):
            best, least = size, error
    return best


@dataclass
class LayerStatistics:
    """What one attention layer has seen.

    Attributes:
        key, value: magnitudes of post-RoPE K and of V, every token.
        key_moment: fp32 [kv_heads, dim, dim], sum of k k^T; query_moment: the same of post-RoPE Q, averaged over the
            query heads that share a KV head; key_sum: fp32 [kv_heads, dim], sum of k. The first token of a sequence is
            left out of them: its K is an outlier in most models, and its query sees nothing else.
        tokens: in the magnitudes; moment_tokens: in the moments; updates: how often something was counted.
    """
    key: Magnitudes
    value: Magnitudes
    key_moment: torch.Tensor
    query_moment: torch.Tensor
    key_sum: torch.Tensor
    tokens: int = 0
    moment_tokens: int = 0
    updates: int = 0

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int, device: torch.device) -> LayerStatistics:
        """Nothing seen yet."""
        key, query = torch.zeros(2, kv_heads, head_dim, head_dim, device=device)
        return cls(Magnitudes.empty(kv_heads, device), Magnitudes.empty(kv_heads, device), key, query,
                   torch.zeros(kv_heads, head_dim, device=device))

    def update(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: torch.Tensor) -> None:
        """Count new tokens.

        Args:
            query: [tokens, heads, head_dim]; key: [tokens, kv_heads, head_dim], both with RoPE applied.
            value: [tokens, kv_heads, v_head_dim].
            first: bool [tokens], True for the first token of a sequence.
        """
        self.key.update(key)
        self.value.update(value)
        k = key.float()[~first]
        q = query.float()[~first].unflatten(1, (key.size(1), -1))
        self.key_sum += k.sum(0)
        self.key_moment += torch.einsum('thd,the->hde', k, k)
        self.query_moment += torch.einsum('thgd,thge->hde', q, q) / q.size(2)
        self.tokens += key.size(0)
        self.moment_tokens += k.size(0)
        self.updates += 1

    def scales(self, fmt: KVFormat, method: str, granularity: str,
               percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
        """K scale and V scale, fp32 [] or [kv_heads]; see :meth:`Magnitudes.scale`."""
        return (self.key.scale(fmt.key.codec, method, granularity, percentile),
                self.value.scale(fmt.value.codec, method, granularity, percentile))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a scale file keeps beside the scales, fp32.

        Second moments [kv_heads, dim, dim], the mean of K [kv_heads, dim], and absmax [kv_heads].
        """
        count = max(self.moment_tokens, 1)
        return {'k_second_moment': self.key_moment / count, 'q_second_moment': self.query_moment / count,
                'k_mean': self.key_sum / count, 'k_absmax': self.key.absmax, 'v_absmax': self.value.absmax}

    def transform(self, kind: str) -> torch.Tensor:
        """A for the layer's keys, fp32 [kv_heads, dim, dim]; see :func:`~lmdeploy_kvq.transforms.calibrated`."""
        seen = self.tensors()
        return calibrated(kind, seen['k_second_moment'], seen['q_second_moment'], seen['k_mean']).float()


@dataclass
class ModelStatistics:
    """Statistics of every attention layer of a model, by layer index; layers appear as they are seen."""
    layers: dict[int, LayerStatistics] = field(default_factory=dict)

    @torch.inference_mode()
    def update(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               first: torch.Tensor) -> None:
        """Count new tokens of one layer; see :meth:`LayerStatistics.update`."""
        if layer not in self.layers:
            self.layers[layer] = LayerStatistics.empty(key.size(1), key.size(2), key.device)
        self.layers[layer].update(query, key, value, first)

    @property
    def tokens(self) -> int:
        """Tokens that all layers have seen."""
        return min((layer.tokens for layer in self.layers.values()), default=0)

    @property
    def complete(self) -> bool:
        """True if all layers have been seen: the first one has been seen again."""
        return any(layer.updates > 1 for layer in self.layers.values())

    def transforms(self, kind: str) -> dict[int, torch.Tensor]:
        """A for the keys of every layer; see :meth:`LayerStatistics.transform`.

        Raises:
            TransformError: statistics from which no usable matrix follows; names the layer.
        """
        found = {}
        for index, layer in sorted(self.layers.items()):
            try:
                found[index] = layer.transform(kind)
            except TransformError as error:
                raise TransformError(f'layer {index}: {error}') from error
            from_matrix(found[index], f'layer {index}: k_transform')
        return found

    def scales(self, fmt: KVFormat, method: str = 'absmax', granularity: str = 'tensor',
               percentile: float = 99.99) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
        """K scale and V scale per layer; see :meth:`Magnitudes.scale`."""
        return {index: layer.scales(fmt, method, granularity, percentile)
                for index, layer in sorted(self.layers.items())}
