"""Watches the attention of a Hugging Face causal language model, on any device: post-RoPE Q and K, and V, as it runs.

The model's own attention function is wrapped by one that is registered with transformers, so every model that follows
its attention interface can be watched unchanged. Needs transformers >= 5, which this package does not install.
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .console import UserError, reason
from .kvstats import ModelStatistics

_NAME = 'lmdeploy_kvq_observed'


class _Observer:
    """Counts what reaches attention. One sequence at a time, so that all rows are tokens and positions are known."""

    def __init__(self, statistics: ModelStatistics, base: str):
        self.statistics, self.base = statistics, base
        self.fresh: set[int] = set()  # layers that have seen the current sequence

    def __call__(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
                 **kwargs: Any) -> Any:
        """An attention function of transformers: tensors [1, heads, tokens, dim], K and V with the cached tokens."""
        layer, new = getattr(module, 'layer_idx', None), query.size(2)
        if layer is not None:
            first = torch.zeros(new, dtype=torch.bool, device=query.device)
            first[0] = layer not in self.fresh
            self.fresh.add(layer)
            q, k, v = (x[0, :, -new:].transpose(0, 1) for x in (query, key, value))
            self.statistics.update(layer, q, k, v, first)
        forward: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.base] if self.base != 'eager' else \
            sys.modules[type(module).__module__].eager_attention_forward
        return forward(module, query, key, value, *args, **kwargs)


@contextlib.contextmanager
def observed(model: PreTrainedModel, statistics: ModelStatistics) -> Iterator[_Observer]:
    """``model`` with its attention watched."""
    base = model.config.get_text_config()._attn_implementation
    if base not in ('sdpa', 'eager'):
        raise UserError(f'{type(model).__name__} attends with {base!r}, which cannot be watched; sdpa and eager can')
    observer = _Observer(statistics, base)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, observer)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(_NAME)
    try:
        yield observer
    finally:
        model.set_attn_implementation(base)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            type(registry)._global_mapping.pop(_NAME)


def load(folder: str, dtype: str | torch.dtype = 'auto') -> PreTrainedModel:
    """A causal language model, on the GPU where there is one.

    Args:
        folder: of the model.
        dtype: of its weights and its arithmetic; ``auto``: the checkpoint's.

    Raises:
        UserError: no causal language model that transformers can load.
    """
    logging.disable_progress_bar()  # the commands show their own
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.is_encoder_decoder:
            raise UserError(f'{folder} is an encoder-decoder model; only causal language models have the KV cache that '
                            'is calibrated')
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # damaged or missing files and unknown models: transformers', safetensors', json's
        raise UserError(f'transformers cannot load {folder}: {reason(error)}') from error
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()


@torch.inference_mode()
def observe(model: PreTrainedModel, pieces: Iterable[list[int]], new_tokens: int, statistics: ModelStatistics,
            done: Callable[[int], None]) -> None:
    """Run every piece and continue it greedily, counting prompt and generated tokens.

    Args:
        model: from :func:`load`.
        pieces: token ids of prompts.
        new_tokens: tokens to generate after each prompt; 0: none. The last one is not fed back, so not counted.
        statistics: counts.
        done: called with the prompt tokens of each piece when it is through.
    """
    with observed(model, statistics) as observer:
        for piece in pieces:
            observer.fresh.clear()
            ids = torch.tensor([piece], device=model.device)
            if new_tokens:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                               pad_token_id=0, eos_token_id=None, use_cache=True)
            else:
                model(ids, use_cache=False)
            done(len(piece))
