"""Measures caches through transformers, in fp32, on any device: every query reads what the format stored.

fp32, so that what shows is the cache and not the arithmetic; also on a GPU. Needs transformers >= 5.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..accuracy import Scores, ranks, score
from ..console import UserError, first_line, reason
from ..formats import KVFormat
from ..hf_cache import QuantizedCache
from ..hf_observer import load
from ..scales import ScaleError, check_format, read_file
from .material import Contender, Found, Material, Needle, Passage, Run


class OneLayerCache(DynamicCache):
    """An unquantized cache in which one layer holds what a quantized one would read back.

    Args:
        fmt: the format. layer: index of the layer. scales: a file of static scales.
    """

    def __init__(self, fmt: KVFormat, layer: int, scales: str | None = None):
        super().__init__()
        self.quantized, self.layer = QuantizedCache(fmt, scales=scales), layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens [batch, kv_heads, new tokens, dim]; returns K and V of all tokens."""
        if layer_idx == self.layer:
            new = key_states.size(2)
            read = self.quantized.update(key_states, value_states, layer_idx)
            key_states, value_states = (states[:, :, -new:] for states in read)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def prepare(folder: str) -> PreTrainedModel:
    """Load a model in fp32, and see that it runs with a cache of K and V.

    Raises:
        UserError: it cannot be loaded, or keeps something else than K and V.
    """
    model = load(folder, torch.float32)
    cache = DynamicCache()
    try:
        with torch.inference_mode():
            model(torch.tensor([[0, 1]], device=model.device), past_key_values=cache)
    except Exception as error:  # whatever a model with a cache class of its own makes of ours
        raise UserError(f'{type(model).__name__} does not run with a plain KV cache in transformers '
                        f'({reason(error)}); on a GPU, LMDeploy may run it (--engine lmdeploy)') from error
    stored = [layer for layer in cache.layers if layer.get_seq_length() == 2]
    layers = model.config.get_text_config().num_hidden_layers
    if len(stored) != layers:
        raise UserError(f'{type(model).__name__} keeps K and V in {len(stored)} of its {layers} layers, which '
                        'transformers cannot quantize alone; on a GPU, LMDeploy may run it (--engine lmdeploy)')
    return model


@torch.inference_mode()
def run(model: PreTrainedModel, tokenizer: Any, material: Material, contenders: Sequence[Contender],
        done: Callable[[int], None]) -> list[Run]:
    """Measure every contender.

    Args:
        model: from :func:`prepare`.
        tokenizer: of the model.
        material: what to measure on.
        contenders: the first is the unquantized cache.
        done: called with 1 for every contender and item of the material.

    Returns:
        One per contender; a format that cannot store this model has only an error.
    """
    runs = [Run(error=_misfit(contender)) for contender in contenders]

    def each(measure: Callable[[Contender, Run], None]) -> None:
        for contender, found in zip(contenders, runs):
            try:
                if found.error is None:
                    measure(contender, found)
            except ValueError as error:  # head sizes that the format cannot store, a scale file that does not fit
                if contender.format is None:
                    raise
                found.error = first_line(str(error))
            done(1)

    for passage in material.passages:
        each(_Passage(model, passage))
    for text in material.prompts:
        ids = list(tokenizer.encode(text))
        each(lambda contender, found, ids=ids: found.tokens.append(  # type: ignore[misc]
            continue_greedily(model, ids, material.new_tokens, cache_for(contender))))
    for needle in material.needles:
        each(lambda contender, found, needle=needle: found.found.append(  # type: ignore[misc]
            _search(model, needle, cache_for(contender))))
    return runs


def steps(material: Material, contenders: Sequence[Contender]) -> int:
    """How often :func:`run` reports progress."""
    return len(contenders) * (len(material.passages) + len(material.prompts) + len(material.needles))


def _misfit(contender: Contender) -> str | None:
    """Why a scale file cannot be used, as the engine would say it; None: it can, or there is none."""
    if contender.format is not None and contender.scales is not None:
        try:
            check_format(read_file(contender.scales), contender.format)
        except ScaleError as error:
            return str(error)
    return None


def cache_for(contender: Contender) -> Any:
    """A new cache."""
    if contender.format is None:
        return DynamicCache()
    return QuantizedCache(contender.format, scales=contender.scales)


class _Passage:
    """Scores one passage with cache after cache; the first one's predictions are the reference."""

    def __init__(self, model: PreTrainedModel, passage: Passage):
        self.model, self.passage = model, passage
        self.reference: torch.Tensor | None = None

    def __call__(self, contender: Contender, found: Run) -> None:
        found.scores.append(self.score(cache_for(contender)))

    def score(self, cache: Any) -> Scores:
        ids = torch.tensor([self.passage.ids], device=self.model.device)
        logits = self.model(ids, past_key_values=cache).logits[0]
        scores = score(self.passage.ids, logits, self.reference)
        self.reference = logits if self.reference is None else self.reference
        return scores


def continue_greedily(model: PreTrainedModel, ids: list[int], new_tokens: int, cache: Any) -> list[int]:
    """The likeliest tokens after ``ids``, which read the cache too."""
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
                         max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None)
    return out[0, len(ids):].tolist()


def _search(model: PreTrainedModel, needle: Needle, cache: Any) -> Found:
    """One pass over prompt and answer. All of the answer's tokens are the likeliest: greedy decoding writes it."""
    count = len(needle.answer_ids)
    few = {'logits_to_keep': count + 1} if 'logits_to_keep' in inspect.signature(model.forward).parameters else {}
    logits = model(torch.tensor([needle.ids], device=model.device), past_key_values=cache, **few).logits[0]
    places = ranks(logits[-count - 1:-1], needle.answer_ids)
    return Found(all(place == 1 for place in places), places)


@torch.inference_mode()
def rank_layers(model: PreTrainedModel, passages: Sequence[Passage], contender: Contender,
                done: Callable[[int], None]) -> list[tuple[int, list[Scores]]]:
    """Quantize one layer at a time.

    Args:
        model: from :func:`prepare`.
        passages: scored with every layer.
        contender: a format of this package.
        done: called with 1 for every layer and passage.

    Returns:
        (layer, scores per passage), in the order of layers.

    Raises:
        UserError: the format cannot store this model.
    """
    assert contender.format is not None
    layers = model.config.get_text_config().num_hidden_layers
    scores: list[tuple[int, list[Scores]]] = [(layer, []) for layer in range(layers)]
    for passage in passages:
        scored = _Passage(model, passage)
        scored.score(DynamicCache())
        for layer, found in scores:
            try:
                found.append(scored.score(OneLayerCache(contender.format, layer, contender.scales)))
            except ValueError as error:
                raise UserError(str(error)) from error
            done(1)
    return scores
