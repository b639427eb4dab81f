#!/usr/bin/env python3
"""Accuracy of every format beside LMDeploy's and vLLM's, emulated, in one run on a CPU; writes accuracy_cpu.json.

A small model in fp32, with the semantics of a paged cache: every query, its own token included, reads quantized K and
V. Passages of two domains; K's transforms are calibrated on other passages of the first domain only. Mean KL divergence
from the unquantized cache, perplexity, and how often the most likely token is the same. Ends with the targets.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchlib import print_table, write_results
from emulations import EMULATIONS, EmulatedCache
from eval_engine import passages
from smollm2 import HOME, find_or_convert
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from lmdeploy_kvq import FORMATS, hf_observer
from lmdeploy_kvq.hf_cache import QuantizedCache
from lmdeploy_kvq.kvstats import ModelStatistics
from lmdeploy_kvq.scales import write_file
from lmdeploy_kvq.transforms import KINDS

DOMAINS = ('technical', 'prose')
"""The first one is also calibrated on: it is the longer text."""

OURS = 'lmdeploy_kvq'

TARGETS = (  # format and transform of ours, whose KL is at most so many times that of
    ('int8_per_token_head', 'hadamard', 0.40, 'LMDeploy', 'int8'),
    ('int4_per_token_head', 'hadamard', 0.60, 'LMDeploy', 'int4'),
    ('int4_per_token_head', 'balanced', 0.30, 'LMDeploy', 'int4'),
    ('k8v4_per_token_head', 'hadamard', 0.10, 'LMDeploy', 'int4'),
    ('k4v2_per_token_head', 'balanced', 0.68, 'LMDeploy', 'turbo_quant'),
    ('int2_per_token_head', 'balanced', 0.60, 'Lloyd-Max', 'int2'),
)


@dataclass(frozen=True)
class Contender:
    """A cache to measure: whose, its format, the transform of its keys, its size, and how to make an empty one."""
    owner: str
    name: str
    transform: str
    bits: float
    make: Callable[[], Cache]

    def row(self) -> dict:
        """What every row says of it."""
        return {'owner': self.owner, 'format': self.name, 'transform': self.transform, 'bits_per_element': self.bits}


def contenders(head_dim: int, files: dict[str, Path]) -> Iterator[Contender]:
    """Ours with every transform they take, then the others."""
    for fmt in FORMATS:
        default = 'none' if fmt.key.rotation is None and fmt.value.rotation is None else 'hadamard'
        for kind in (default, *(files if fmt.takes_transform else ())):
            yield Contender(OURS, fmt.name, kind, fmt.bits_per_element(head_dim),
                            lambda fmt=fmt, kind=kind: QuantizedCache(fmt, scales=files.get(kind)))
    for other in EMULATIONS:
        yield Contender(other.owner, other.name, 'none', other.bits_per_element(head_dim),
                        lambda other=other: EmulatedCache(other))


def calibrate(model: torch.nn.Module, pieces: list[list[int]], folder: Path) -> dict[str, Path]:
    """A file of transforms per kind."""
    statistics = ModelStatistics()
    hf_observer.observe(model, pieces, 0, statistics, lambda tokens: None)
    paths = {kind: folder / f'{kind}.safetensors' for kind in KINDS}
    for kind, path in paths.items():
        write_file(path, {}, {'transform': kind},
                   {n: {'k_transform': layer.transform(kind)} for n, layer in statistics.layers.items()})
    return paths


def measure(model: torch.nn.Module, ids: list[int], cache: Cache | None, base: torch.Tensor | None) -> tuple:
    """Log-probabilities [tokens, vocabulary] with a cache, and per token: KL from ``base``, loss, same top token."""
    tokens = torch.tensor([ids])
    scores = model(tokens, past_key_values=cache, use_cache=cache is not None).logits[0].log_softmax(-1)
    loss = -scores[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    if base is None:
        return scores, torch.zeros(len(ids)), loss, torch.ones(len(ids))
    return scores, (base.exp() * (base - scores)).sum(-1), loss, (base.argmax(-1) == scores.argmax(-1)).float()


def summary(parts: list[tuple]) -> dict[str, float]:
    """Figures of some passages; the standard error is that of passages' means."""
    kl = torch.stack([part[0].mean() for part in parts])
    return {'mean_kl': float(torch.cat([part[0] for part in parts]).mean()),
            'kl_standard_error': float(kl.std() / math.sqrt(len(parts))) if len(parts) > 1 else 0.0,
            'perplexity': math.exp(torch.cat([part[1] for part in parts]).mean()),
            'top1_agreement': float(torch.cat([part[2] for part in parts]).mean())}


@torch.inference_mode()
def compare(model: torch.nn.Module, pieces: list[tuple[str, list[int]]], caches: list[Contender]) -> list[dict]:
    """A row per contender and domain; the unquantized cache first."""
    found: dict[tuple[int, str], list[tuple]] = {}
    for number, (domain, ids) in enumerate(pieces):
        start = time.monotonic()
        base, *own = measure(model, ids, None, None)
        found.setdefault((-1, domain), []).append(own)
        for index, cache in enumerate(caches):
            _, *figures = measure(model, ids, cache.make(), base)
            found.setdefault((index, domain), []).append(figures)
        print(f'passage {number + 1} of {len(pieces)} ({domain}): {time.monotonic() - start:.0f} s', file=sys.stderr,
              flush=True)
    none = {'owner': 'transformers', 'format': 'fp32', 'transform': 'none', 'bits_per_element': 32.0}
    return [{**(none if index < 0 else caches[index].row()), 'domain': domain, 'passages': len(parts),
             **summary(parts)} for (index, domain), parts in sorted(found.items(), key=lambda item: item[0][0])]


def verdicts(rows: list[dict]) -> list[dict]:
    """Ratio of every target per domain; it is met if it holds in both."""
    kl = {(row['owner'], row['format'], row['transform'], row['domain']): row['mean_kl'] for row in rows}
    out = []
    for name, transform, limit, owner, other in TARGETS:
        ratios = {domain: kl[OURS, name, transform, domain] / kl[owner, other, 'none', domain] for domain in DOMAINS}
        out.append({'format': name, 'transform': transform, 'against': f'{owner} {other}', 'limit': limit, **ratios,
                    'verdict': 'met' if max(ratios.values()) <= limit else 'missed'})
    return out


def choose(tokenizer, length: int, count: int) -> tuple[list[list[int]], list[tuple[str, list[int]]]]:
    """Passages to calibrate on, of the first domain, and ``count`` per domain to measure on, spread over the texts."""
    train, test = [], []
    for domain in DOMAINS:
        pieces = [ids for name, ids in passages(tokenizer, length) if name == domain]
        if len(pieces) < count + (domain == DOMAINS[0]):
            raise SystemExit(f'accuracy_cpu: {domain} has {len(pieces)} passages of {length} tokens, too few for '
                             f'--passages {count}')
        taken = {i * len(pieces) // count for i in range(count)}
        test += [(domain, pieces[i]) for i in sorted(taken)]
        if domain == DOMAINS[0]:
            train = [piece for i, piece in enumerate(pieces) if i not in taken]
    return train, test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--length', type=int, default=512, help='tokens of a passage (default: %(default)s)')
    parser.add_argument('--passages', type=int, default=4, help='of each domain (default: %(default)s)')
    parser.add_argument('--only', nargs='*', help='formats to measure, by name (default: all; writes no file)')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    folder = find_or_convert(Path(os.path.expanduser(args.model)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    head_dim = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    train, test = choose(AutoTokenizer.from_pretrained(folder), args.length, args.passages)
    with tempfile.TemporaryDirectory() as work:
        files = calibrate(model, train, Path(work))
        caches = [c for c in contenders(head_dim, files) if not args.only or c.name in args.only]
        rows = compare(model, test, caches)
    values_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    for row in rows:
        row['bytes_per_token'] = row['bits_per_element'] * values_per_token / 8
    print_table(rows, ['owner', 'format', 'transform', 'domain', 'bits_per_element', 'mean_kl', 'kl_standard_error',
                       'perplexity', 'top1_agreement'])
    if args.only:
        return 0
    targets = verdicts(rows)
    print()
    print_table(targets, ['format', 'transform', 'against', 'limit', *DOMAINS, 'verdict'])
    print(write_results('accuracy_cpu', rows, args.out, model=folder.name, head_dim=head_dim, length=args.length,
                        calibration={'domain': DOMAINS[0], 'tokens': sum(map(len, train))}, targets=targets,
                        minutes=round((time.monotonic() - start) / 60, 1)))
    return int(any(target['verdict'] == 'missed' for target in targets))


if __name__ == '__main__':
    sys.exit(main())
