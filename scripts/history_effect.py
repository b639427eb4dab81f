#!/usr/bin/env python3
"""What one token of a text depends on besides the text: how much of its prompt came from the prefix cache.

  scripts/history_effect.py [--hits N] [--out FOLDER]

A prompt attends to its own tokens unquantized, and to what was cached before as it is stored. So the same text has
other keys and values after a hit of another length, and what comes next is more or less likely. Here transformers, in
fp32, reads prompts of scripts/soak.py that way, and then texts token by token from the quantized cache, for answers
that soak.json found far from their references: ``gap`` is how far, in nats, the token with which an answer left its
reference is from the likeliest one, behind the same text. ``history`` is ``alone`` (no hit), ``hit N`` tokens, or
``exact``: all is read at once and unquantized, as after a preemption. Writes history_effect.json; on two cores five
minutes.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soak
import torch
from benchlib import print_table, write_results
from smollm2 import chosen_model

from lmdeploy_kvq.accuracy import gaps
from lmdeploy_kvq.evaluation.through_transformers import prepare
from lmdeploy_kvq.hf_cache import QuantizedCache

BLOCK = 64
_COPY = '\nface. It is built on the one piece of rising ground for miles, and it wears its history in its face.{}The ' \
    'train to Saltmere leaves from the shortest platform in the capital, and nobody hurries to catch it.{}are two ' \
    'carriages, painted the yellow of old piano keys, and the conductor spends the{}ten minutes walking up and down ' \
    'asking people which halts they want, because the driver will not stop at a place where'


@dataclass(frozen=True)
class Case:
    """A token, and what comes before it.

    Attributes:
        prompt: number among those of scripts/soak.py with its defaults. token: the text of the one that is watched.
        text: what lies between, or how many tokens the format itself gives.
    """
    prompt: int
    format: str
    token: str
    text: str | int


CASES = (Case(80, 'int4_per_token_head', '_', 24),
         # 93 tokens each, of the many that a copy of the prompt with other line breaks may have
         Case(85, 'fp8_per_token_head', ' nobody', _COPY.format('\n', '\nThere ', ' first\n')),
         Case(85, 'fp8_per_token_head', ' nobody', _COPY.format('\n\n', ' There ', '\nfirst ')))


def histories(model: Any, ids: list[int], name: str, hits: int) -> Iterator[tuple[str, torch.Tensor, QuantizedCache]]:
    """A prompt read after hits of various lengths: what it was, the last logits, and the cache that it leaves."""
    from transformers import DynamicCache
    step = max(len(ids) // BLOCK // (hits + 1), 1) * BLOCK
    for hit in range(0, len(ids), step):
        stored, read = QuantizedCache(name), DynamicCache()
        if hit:
            _last(model, ids[:hit], read)
            _store(stored, read, 0)
            read = DynamicCache()
            for number, layer in enumerate(stored.layers):
                nothing = torch.empty(1, model.config.num_key_value_heads, 0, model.config.head_dim,
                                      device=model.device)
                read.update(*layer.update(nothing, nothing), number)
        logits = _last(model, ids[hit:], read)
        _store(stored, read, hit)
        yield f'hit {hit}' if hit else 'alone', logits, stored


def _last(model: Any, ids: list[int], cache: Any = None) -> torch.Tensor:
    """What follows ``ids``, behind what the cache holds: logits [vocabulary]."""
    read = torch.tensor([ids], device=model.device)
    return model(read, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def _store(stored: QuantizedCache, read: Any, start: int) -> None:
    """Quantize what was read from token ``start`` on."""
    for number, layer in enumerate(read.layers):
        stored.update(layer.keys[:, :, start:].clone(), layer.values[:, :, start:].clone(), number)


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, ids: list[int], case: Case, hits: int) -> list[dict]:
    """A row per history."""
    watched = tokenizer.encode(case.token)[0]
    text = tokenizer.encode(case.text) if isinstance(case.text, str) else []
    rows = []

    def row(history: str, logits: torch.Tensor) -> dict:
        return {'prompt': case.prompt, 'format': case.format, 'token': case.token, 'at': len(text), 'history': history,
                'logprob': float(logits.log_softmax(-1)[watched]), 'gap': float(gaps(logits[None], [watched])),
                'likeliest': tokenizer.decode([int(logits.argmax())]), 'text': tokenizer.decode(text)}

    for history, logits, cache in histories(model, ids, case.format, hits):
        for number in range(len(text) or int(case.text)):
            if number == len(text):  # alone comes first
                text.append(int(logits.argmax()))
            logits = _last(model, [text[number]], cache)
        rows.append(row(history, logits))
        print(rows[-1], flush=True)
    return [*rows, row('exact', _last(model, ids + text))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hits', type=int, default=2, help='how many lengths of a hit, or more')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer
    folder = chosen_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = prepare(str(folder))
    prompts = soak.all_prompts(soak.parse(['--model', str(folder)])[2])
    rows = [row for case in CASES for row in measure(model, tokenizer, list(prompts[case.prompt].ids), case, args.hits)]
    print_table(rows, ['prompt', 'format', 'at', 'token', 'history', 'gap', 'logprob', 'likeliest'])
    print(write_results('history_effect', rows, args.out, model=folder.name))


if __name__ == '__main__':
    main()
