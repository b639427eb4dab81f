#!/usr/bin/env python3
"""What the last bit of bf16 does to answers: a cache of few bits makes much of it, and two engines never share it.

  scripts/last_bit.py [--formats NAME,...] [--prompts N] [--out FOLDER]

Engines that add in different orders (tensor or data parallelism, another batch) differ by what bf16 rounds. Where a
number is close to the middle between two codes, that decides which one is stored, and codes of few bits are far apart.
Here a model answers prompts by transformers in fp32, once as it is and once with every MLP's outputs off by up to 2^-9
of themselves, bf16's largest rounding error. Both answers are judged by the model as it is, reading them at once: how
far, in nats, their tokens are from the likeliest ones. The control is an answer to another prompt. Writes
last_bit.json; on two cores a quarter of an hour.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchlib import print_table, write_results
from engine_process import stranger
from features_check import NEW_TOKENS, make_prompts
from smollm2 import chosen_model

from lmdeploy_kvq import get_format
from lmdeploy_kvq.accuracy import gaps
from lmdeploy_kvq.evaluation.material import Contender
from lmdeploy_kvq.evaluation.through_transformers import cache_for, continue_greedily, prepare

NOISE = 2.0**-9


class Noise:
    """A forward hook that changes outputs by up to ``amount`` of themselves; 0 does nothing."""

    def __init__(self) -> None:
        self.amount, self.generator = 0.0, torch.Generator()

    def __call__(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        if not self.amount:
            return None
        noise = torch.empty(out.shape, device=self.generator.device)
        noise.uniform_(-self.amount, self.amount, generator=self.generator)
        return out * (1 + noise.to(out.device))


@torch.inference_mode()
def measure(model: Any, noise: Noise, contender: Contender, prompts: list[list[int]]) -> list[dict]:
    """A row per kind of answer: as the model is, with noise, and to another prompt."""
    found: dict[str, list[torch.Tensor]] = {'as it is': [], 'with noise': [], 'control': []}
    pairs = [[ids, continue_greedily(model, ids, NEW_TOKENS, cache_for(contender))] for ids in prompts]
    for number, (ids, own) in enumerate(pairs):
        noise.amount = NOISE
        noise.generator.manual_seed(number)
        off = continue_greedily(model, ids, NEW_TOKENS, cache_for(contender))
        noise.amount = 0.0
        for kind, tokens in zip(found, (own, off, stranger(ids, pairs))):
            read = torch.tensor([ids + tokens], device=model.device)
            logits = model(read, past_key_values=cache_for(contender)).logits[0, len(ids) - 1:-1]
            found[kind].append(gaps(logits, tokens))
    rows = []
    for kind, each in found.items():
        tokens = torch.stack(each)
        worst, mean = tokens.amax(1), tokens.mean(1)
        rows.append({'format': contender.name, 'answers': kind, 'count': len(each), 'worst_gap': float(worst.max()),
                     'median_worst_gap': float(worst.median()), 'least_worst_gap': float(worst.min()),
                     'worst_mean_gap': float(mean.max()), 'least_mean_gap': float(mean.min()),
                     'likeliest': float((tokens == 0).float().mean())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', default='fp8_per_token_head,int8_per_token_head,int4_per_token_head')
    parser.add_argument('--prompts', type=int, default=24, help='5 or more: four of a kind come first')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer
    folder = chosen_model()
    prompts = make_prompts(AutoTokenizer.from_pretrained(folder))[:args.prompts]
    model, noise = prepare(str(folder)), Noise()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(noise)
    rows = []
    formats = [get_format(name) for name in args.formats.split(',')]
    for contender in [Contender('none', 0), *(Contender(fmt.name, fmt.policy, fmt) for fmt in formats)]:
        rows += measure(model, noise, contender, prompts)
        print_table(rows[-3:], list(rows[0]))
    print(write_results('last_bit', rows, args.out, model=folder.name, noise=NOISE))


if __name__ == '__main__':
    main()
