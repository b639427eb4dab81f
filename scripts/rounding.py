#!/usr/bin/env python3
"""Whether rounding explains a token: many copies of a model, each rounded in its own way, choose again.

  scripts/rounding.py [--soak benchmarks/results/soak.json] [--copies N] [--out FOLDER]

Two runs of an engine add in different orders, and differ in last bits. Where a number lies close to the middle between
two codes, that decides which one is stored, and where a model is undecided about a token's part in a text, what it says
next. How far that goes cannot be read off one reference. Here transformers, in fp32 and with this package's codecs,
without engine and kernels, reads a prompt as the engine does and then a text token by token from the quantized cache,
in many copies; in each, the outputs of attention and of MLPs are off by up to 2^-9 of themselves, bf16's largest
rounding error. Per token: how far, in nats, it is from the likeliest one, in the copy that likes it best
(``smallest_gap``) and in the median, and in what share of the copies it is the likeliest. The other tokens that the
reference found likely are the control: rounding that explains those, too, explains nothing.

soak.py asks this of every answer that is farther from its reference than its limit. By itself, this script judges the
answers that soak.json lists, and writes rounding.json. Fast on a GPU; on two cores a minute per thousand tokens of
prompt and sixteen copies.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib import RESULTS, print_table, write_results
from last_bit import NOISE, Noise

from lmdeploy_kvq.evaluation.through_transformers import prepare
from lmdeploy_kvq.hf_cache import QuantizedCache

COPIES, MOST_TOKENS = 512, 2**22
"""Copies, and fewer where their prompts would be more tokens than that."""

AT_ONCE = 2**18, 2**14
"""Tokens of prompts that are read at once, on a GPU and on a CPU."""


class Rounding:
    """A model whose rounding is drawn at random."""

    def __init__(self, folder: str, noise: float = NOISE):
        self.model, self.noise = prepare(folder), Noise()
        self.noise.amount = noise
        self.noise.generator = torch.Generator(self.model.device)
        for layer in self.model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(self.noise)
            layer.mlp.register_forward_hook(self.noise)

    @torch.inference_mode()
    def gaps(self, fmt: str, ids: Sequence[int], text: Sequence[int], tokens: Sequence[int], copies: int = COPIES,
             prefill: str = 'raw', seed: int = 0) -> torch.Tensor:
        """How far tokens are from the likeliest one behind a prompt and a text: fp32 [copies, tokens], nats.

        Args:
            fmt: format, or ``none``. ids, text: the prompt, and what was answered so far. tokens: the candidates.
            prefill: ``LMDEPLOY_KVQ_PREFILL``: what tokens of the prompt see of each other.
        """
        self.noise.generator.manual_seed(seed)
        copies = max(1, min(copies, MOST_TOKENS // len(ids)))
        at_once = max(1, AT_ONCE[self.model.device.type == 'cpu'] // len(ids))
        found = []
        for start in range(0, copies, at_once):
            predictions = self._read(fmt, ids, text, min(at_once, copies - start), prefill)
            found.append(predictions.amax(-1, keepdim=True) - predictions[:, list(tokens)])
        return torch.cat(found).cpu()

    def _read(self, fmt: str, ids: Sequence[int], text: Sequence[int], copies: int, prefill: str) -> torch.Tensor:
        """Log-probabilities behind the text: [copies, vocabulary]."""
        from transformers import DynamicCache
        device = self.model.device
        cache: Any = DynamicCache() if fmt == 'none' else QuantizedCache(fmt)
        read = cache if prefill == 'cache' else DynamicCache()
        prompt = torch.tensor([list(ids)], device=device).expand(copies, -1)
        logits = self.model(prompt, past_key_values=read, logits_to_keep=1).logits[:, -1]
        if read is not cache:
            for number, layer in enumerate(read.layers):
                cache.update(layer.keys, layer.values, number)
                layer.keys = layer.values = None
        for token in text:
            logits = self.model(torch.full((copies, 1), token, device=device), past_key_values=cache,
                                logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)

    def explain(self, fmt: str, ids: Sequence[int], text: Sequence[int], token: int, others: Sequence[int],
                copies: int = COPIES, prefill: str = 'raw') -> dict[str, Any]:
        """A row: what the module's text says of ``token``, and how near the nearest of the ``others`` comes."""
        others = [other for other in others if other != token]
        found = self.gaps(fmt, ids, text, [token, *others], copies, prefill)
        own = found[:, 0]
        return {'copies': len(found), 'smallest_gap': float(own.min()), 'median_gap': float(own.median()),
                'likeliest': float((own == 0).float().mean()), 'others': len(others),
                'nearest_other': float(found[:, 1:].min()) if others else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--soak', type=Path, default=RESULTS / 'soak.json')
    parser.add_argument('--formats', help='of the file (default: all)')
    parser.add_argument('--copies', type=int, default=COPIES)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    import soak
    from smollm2 import chosen_model
    from soak_checks import GAP_LIMIT
    data, folder = json.loads(args.soak.read_text()), str(chosen_model())
    settings = soak.Settings(**{name: data[name] for name in soak.Settings.__annotations__} | {'model': folder})
    prompts, rounding, rows, seen = soak.all_prompts(settings), Rounding(folder), [], set()
    for row in data['rows']:
        for far in row['farthest']:
            text = tuple(far['answer'][:far['at']])
            name = row['format'], far['prompt'], text, far['token']
            if name in seen or args.formats and row['format'] not in args.formats.split(','):
                continue
            seen.add(name)
            # the reference's own token is likely, and no control
            others = [token for _, token in far['top'] if token != far['reference'][far['at']]]
            found = rounding.explain(row['format'], prompts[far['prompt']].ids, text, far['token'], others,
                                     args.copies, settings.prefill)
            rows.append({'format': row['format'], 'prompt': far['prompt'], 'at': far['at'], 'token': far['token'],
                         'reference_gap': far['gap'], **found})
            print_table(rows[-1:], list(rows[0]))
    print_table(rows, list(rows[0]) if rows else [])
    print(write_results('rounding', rows, args.out, model=data['model'], noise=NOISE, within=GAP_LIMIT,
                        soak_commit=data['environment']['commit']))


if __name__ == '__main__':
    main()
