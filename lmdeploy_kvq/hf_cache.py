"""A KV cache for Hugging Face transformers that stores K and V in this package's formats, on any device.

It shows what a format does to a model where LMDeploy does not run, e.g. on a CPU. The semantics are those of the
engine's decoding: K comes in with RoPE applied, every token is quantized when it is written, and every query, also that
of the token just written, reads decoded K and V. Slow: the whole cache is decoded at every step.

    cache = QuantizedCache('int8_per_token_head')
    model.generate(**inputs, past_key_values=cache)

Needs transformers >= 5, which this package does not install.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .formats import KVFormat, get_format, part_dim
from .reference import decode, encode, pack, unpack
from .scales import ScaleError, read_file
from .transforms import Transform, from_matrix, hadamard


class QuantizedLayer(DynamicLayer):
    """K and V of one layer.

    Attributes:
        keys, values: uint8 [batch, kv_heads, tokens, bytes of a row], packed codes; None before the first update.
        key_scales, value_scales: fp32 [batch, kv_heads, tokens] of a per-token-head encoding; the static scale, fp32 []
            or [kv_heads], of a static one.
        key_transform, value_transform: what rows are multiplied with before they are quantized, or None.
    """

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, fmt: KVFormat, k_scale: torch.Tensor, v_scale: torch.Tensor,
                 k_transform: Transform | None = None):
        super().__init__()
        self.format = fmt
        self.key_transform, self.value_transform = k_transform, None
        self.key_scales, self.value_scales = k_scale, v_scale

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty pages of the right sizes.

        Raises:
            ValueError: head sizes the format cannot store.
        """
        self.format.check_head_dims(key_states.size(-1), value_states.size(-1))
        self.dtype, self.device = key_states.dtype, key_states.device
        for which, states in (('key', key_states), ('value', value_states)):
            encoding = getattr(self.format, which)
            empty = states.new_empty((*states.shape[:2], 0, part_dim(states.size(-1), encoding.codec.parts)),
                                     dtype=torch.uint8)
            scales = getattr(self, f'{which}_scales').to(self.device)
            transform = getattr(self, f'{which}_transform')
            if encoding.rotation is None:
                transform = None
            elif transform is None:
                transform = hadamard(states.size(-1))
            setattr(self, f'{which}_transform', transform and transform.to(self.device))
            if encoding.per_token_head:
                scales = states.new_empty((*states.shape[:2], 0), dtype=torch.float32)
            setattr(self, f'{which}s', empty)
            setattr(self, f'{which}_scales', scales)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize and append new tokens, and decode all that is stored.

        Args:
            key_states, value_states: [batch, kv_heads, new tokens, dim].

        Returns:
            K and V [batch, kv_heads, tokens, dim] in the dtype of ``key_states``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append('key', key_states), self._append('value', value_states)

    def _append(self, which: str, states: torch.Tensor) -> torch.Tensor:
        encoding, scales = getattr(self.format, which), getattr(self, f'{which}_scales')
        transform = getattr(self, f'{which}_transform')
        # reference.py has the heads next to the last axis, [batch, tokens, heads, dim]
        codes, new = encode(states.transpose(1, 2), encoding, None if encoding.per_token_head else scales, transform)
        packed = torch.cat([getattr(self, f'{which}s'), pack(codes, encoding.codec).transpose(1, 2)], dim=2)
        setattr(self, f'{which}s', packed)
        if encoding.per_token_head:
            scales = torch.cat([scales, new.transpose(1, 2)], dim=2)
            setattr(self, f'{which}_scales', scales)
            scales = scales.transpose(1, 2)
        codes = unpack(packed.transpose(1, 2), encoding.codec, states.size(-1))
        return decode(codes, encoding, scales, transform).transpose(1, 2).to(states.dtype)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.keys.size(2) if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of per-token-head scales."""
        if not self.is_initialized:
            return 0
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, *self._token_scales().values()))

    def _token_scales(self) -> dict[str, torch.Tensor]:
        return {f'{which}_scales': getattr(self, f'{which}_scales') for which in ('key', 'value')
                if getattr(self.format, which).per_token_head}

    def _change_scales(self, change: Any) -> None:
        if self.is_initialized:
            for name, scales in self._token_scales().items():
                setattr(self, name, change(scales))

    # The inherited methods change codes alone; their scales follow.

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the newest tokens."""
        super().crop(*args, **kwargs)
        self._change_scales(lambda scales: scales[:, :, :self.get_seq_length()])

    def reset(self) -> None:
        """Forget everything."""
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        self._change_scales(lambda scales: scales[:, :, :0])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Choose sequences, for beam search."""
        super().reorder_cache(beam_idx)
        self._change_scales(lambda scales: scales.index_select(0, beam_idx.to(scales.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._change_scales(lambda scales: scales.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self._change_scales(lambda scales: scales[indices])


class QuantizedCache(Cache):
    """A cache for ``model(..., past_key_values=cache)`` and ``model.generate(..., past_key_values=cache)``.

    Every layer keeps all tokens, also those with a sliding window (the model's mask hides the older ones). Layers that
    keep a state instead of K and V (Mamba, linear attention) are not supported.

    Args:
        fmt: format, name, alias or policy.
        k_scale, v_scale: scale of static encodings (the other formats ignore it): a number or fp32 [kv_heads], for all
            layers.
        scales: a scale file instead, with what the format needs per layer: a pair of scales, or K's transform.

    Raises:
        ValueError: unknown format, a scale file that cannot be used; or, at the first update, head sizes that the
            format cannot store, or a layer that the file does not have.
    """

    def __init__(self, fmt: str | int | KVFormat, k_scale: float | torch.Tensor = 1.0,
                 v_scale: float | torch.Tensor = 1.0, scales: str | Path | None = None):
        self.format = get_format(fmt)
        self._all = (torch.as_tensor(k_scale, dtype=torch.float32), torch.as_tensor(v_scale, dtype=torch.float32))
        self._file = None if scales is None else read_file(scales)
        super().__init__(layer_class_to_replicate=self._next_layer)

    def _next_layer(self) -> QuantizedLayer:
        """A further layer: transformers asks for them in their order."""
        index = len(self.layers)
        if self._file is None:
            return QuantizedLayer(self.format, *self._all)
        layer = f'scale file {self._file.path}: layer {index}'
        if self.format.needs_scales:
            if index not in self._file.layers:
                raise ScaleError(f'scale file {self._file.path} has no scales for layer {index}')
            k, v, _ = self._file.layers[index].resolved(layer)
            return QuantizedLayer(self.format, k, v)
        matrix = self._file.transforms.get(index) if self.format.takes_transform else None
        if matrix is None and self.format.takes_transform:
            raise ScaleError(f'scale file {self._file.path} has no transform for layer {index}')
        transform = None if matrix is None else from_matrix(matrix, f'{layer}: k_transform')
        return QuantizedLayer(self.format, *self._all, transform)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in all layers."""
        return sum(layer.nbytes for layer in self.layers)
