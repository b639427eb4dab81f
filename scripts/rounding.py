#!/usr/bin/env python3
"""Whether rounding explains a token: many copies of a model, each rounded in its own way, choose again.

  scripts/rounding.py [--soak FILE ...] [--formats NAME,...] [--copies N] [--out FOLDER]
  scripts/rounding.py --floor [--out FOLDER]            how much log-probabilities change; writes rounding_floor.json

Two runs of an engine add in different orders, and differ in last bits. Where a number lies close to the middle between
two codes, that decides which one is stored, and where a model is undecided about a token's part in a text, what it says
next. How far that goes cannot be read off one reference. Here transformers, in fp32 (on a GPU, TF32) and with this
package's codecs, without engine and kernels, reads a prompt as the engine does and then a text token by token from the
quantized cache, in many copies. In each, the outputs of attention and of MLPs are off by up to 2^-9 of themselves,
bf16's largest rounding error; and as under load, part of the prompt is found in the prefix cache (nothing, all whole
blocks, or any number of them, another one for every eighth of the copies or fewer), which a prompt sees as it is
stored, and its other tokens as they are. An eighth of the copies, about, read the text like that, too, or a part of it,
at once, which is what an engine does with a request that it had to give up and takes up again. Copies are asked until
one finds the token likely enough (soak_checks.py) or all have been asked. Per token: how far, in nats, it is from the
likeliest one, in the copy that likes it best (``smallest_gap``) and in the median, and in what share of the copies it
is the likeliest. The other tokens that the reference found likely are the control: rounding that explains those, too,
explains nothing.

soak.py asks this of every answer that is farther from its reference than its limit. By itself, this script judges the
answers that soak.json, or other files of soak.py, list, and writes rounding.json. Whether copies are not rounded more
than an engine rounds is what ``--floor`` tells: how much the log-probabilities of greedy answers change between copies
with an unquantized cache, which compares with bf16's ``change`` in soak.json. Fast on a GPU; two cores read 300 tokens
of prompts a second.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib import RESULTS, print_table, write_results
from last_bit import NOISE, Noise
from soak_checks import GAP_LIMIT
from soak_load import Prompt
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lmdeploy_kvq import get_format
from lmdeploy_kvq.evaluation.through_transformers import continue_greedily, prepare
from lmdeploy_kvq.hf_cache import QuantizedLayer

COPIES, PER_VISIT, MOST_TOKENS, HITS, BLOCK = 2048, 32, 2**23, 8, 64
"""Copies of a text, and per time that load came by it, whichever is more; tokens that all copies of a prompt may have;
how many parts of a prompt are found in the prefix cache; and tokens of a block."""

AT_ONCE, SCORES = (2**18, 2**14), 2**28
"""Tokens of prompts that are read at once, on a GPU and on a CPU; and pairs of tokens, of which PyTorch's attention
keeps several fp32 numbers per head where heads share keys."""

FLOOR_PROMPT, FLOOR_COPIES = 700, 6
"""Of ``--floor``: tokens of the longest prompt, and copies."""


def copies_for(visits: int) -> int:
    """How many copies to ask, at most, about what came once in ``visits`` times.

    It is likely rarer than that: load comes by thousands of texts, and what is seen is the rarest that any of them
    does. Hence many more copies than visits.
    """
    return max(COPIES, PER_VISIT * visits)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Products of matrices in TF32 on a GPU: much faster, and off by 2^-11, a quarter of the noise."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class RoundTrip(DynamicLayer):
    """K and V of one layer as they come back from a format: what QuantizedLayer computes anew at every step, kept.

    Of the formats with a scale per token and head, whose tokens do not depend on each other.
    """

    def __init__(self, fmt: str):
        super().__init__()
        self.format = get_format(fmt)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens; K and V [batch, kv_heads, tokens, dim]."""
        once = QuantizedLayer(self.format, *torch.ones(2))
        return super().update(*once.update(key_states, value_states), *args, **kwargs)


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
    @tf32()
    def gaps(self, fmt: str, ids: Sequence[int], text: Sequence[int], tokens: Sequence[int], copies: int = COPIES,
             prefill: str = 'raw', seed: int = 0, enough: float | None = None) -> torch.Tensor:
        """How far tokens are from the likeliest one behind a prompt and a text: fp32 [copies, tokens], nats.

        Args:
            fmt: format, or ``none``. ids, text: the prompt, and what was answered so far. tokens: the candidates.
            prefill: ``LMDEPLOY_KVQ_PREFILL``: what tokens of the prompt see of each other.
            enough: nats; no more copies are asked once one has the first of the tokens as near.
        """
        self.noise.generator.manual_seed(seed)
        copies = max(1, min(copies, MOST_TOKENS // len(ids)))
        at_once = max(1, min(AT_ONCE[self.model.device.type == 'cpu'] // len(ids), SCORES // len(ids)**2,
                             -(-copies // HITS)))
        blocks, draw, found = (len(ids) - 1) // BLOCK, random.Random(seed), []
        for number, start in enumerate(range(0, copies, at_once)):
            hit = (0, blocks, blocks)[number] if number < 3 else draw.randint(0, blocks)
            taken = len(text) if number == 2 else 0  # tokens of the text that are read at once
            if number > 2 and draw.random() < 1 / HITS:
                taken = draw.randint(0, len(text))
            read = (*ids, *text[:taken])
            logits = self._read(fmt, read, text[len(read) - len(ids):], min(at_once, copies - start), prefill,
                                hit * BLOCK)
            found.append(logits.amax(-1, keepdim=True) - logits[:, list(tokens)])
            if enough is not None and found[-1][:, 0].min() <= enough:
                break
        return torch.cat(found).cpu()

    def _read(self, fmt: str, ids: Sequence[int], text: Sequence[int], copies: int, prefill: str,
              hit: int) -> torch.Tensor:
        """Logits [copies, vocabulary] behind the text, where ``hit`` tokens of the prompt come out of the cache."""
        device = self.model.device
        cache: Any = DynamicCache()
        if fmt != 'none':
            cache = Cache(layers=[RoundTrip(fmt) for _ in self.model.model.layers])
        prompt = torch.tensor([list(ids)], device=device).expand(copies, -1)
        for part in (prompt[:, :hit], prompt[:, hit:]) if hit else (prompt, ):
            logits = self._prefill(part, cache, prefill)
        for token in text:
            logits = self.model(torch.full((copies, 1), token, device=device), past_key_values=cache,
                                logits_to_keep=1).logits[:, -1]
        return logits

    def _prefill(self, ids: torch.Tensor, cache: Any, prefill: str) -> torch.Tensor:
        """Read ``ids`` [copies, tokens] behind what the cache holds, and store them; logits [copies, vocabulary]."""
        if prefill == 'cache':
            return self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        read, stored = DynamicCache(), cache.get_seq_length()
        if stored:
            for number, layer in enumerate(cache.layers):
                read.update(layer.keys, layer.values, number)
        logits = self.model(ids, past_key_values=read, logits_to_keep=1).logits[:, -1]
        for number, layer in enumerate(read.layers):
            cache.update(layer.keys[:, :, stored:], layer.values[:, :, stored:], number)
            layer.keys = layer.values = None
        return logits

    @torch.inference_mode()
    @tf32()
    def change(self, ids: Sequence[int], text: Sequence[int], copies: int) -> torch.Tensor:
        """What :func:`soak_checks.score` sums for answers that are ``text`` from first to last, without a format: how
        far log-probabilities of a copy are from another's; nats, fp32 [copies - 1, tokens of the text].

        Of logits in bf16, as engines have them.
        """
        read = torch.tensor([*ids, *text[:-1]], device=self.model.device).expand(copies, -1)
        logits = self.model(read, logits_to_keep=len(text)).logits.bfloat16().float().log_softmax(-1)
        chosen = torch.tensor(list(text), device=self.model.device).expand(copies, -1)
        found = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        return (found[1:] - found[:1]).abs().cpu()

    def explain(self, fmt: str, ids: Sequence[int], text: Sequence[int], token: int, others: Sequence[int],
                copies: int = COPIES, prefill: str = 'raw') -> dict[str, Any]:
        """A row: what the module's text says of ``token``, and how near the nearest of the ``others`` comes."""
        others = [other for other in others if other != token]
        found = self.gaps(fmt, ids, text, [token, *others], copies, prefill, enough=GAP_LIMIT)
        own = found[:, 0]
        return {'copies': len(found), 'smallest_gap': float(own.min()), 'median_gap': float(own.median()),
                'likeliest': float((own == 0).float().mean()), 'others': len(others),
                'nearest_other': float(found[:, 1:].min()) if others else None}


def floor(folder: str, prompts: Sequence[Prompt]) -> list[dict]:
    """One row: how much copies differ with an unquantized cache, over greedy answers to the prompts that are short."""
    rounding = Rounding(folder)
    short, found = [one for one in prompts if len(one.ids) <= FLOOR_PROMPT], []
    for number, prompt in enumerate(short):
        rounding.noise.amount = 0.0
        text = continue_greedily(rounding.model, list(prompt.ids), prompt.new_tokens, DynamicCache())
        rounding.noise.amount = NOISE
        rounding.noise.generator.manual_seed(number)
        found.append(rounding.change(prompt.ids, text, FLOOR_COPIES))
    tokens = torch.cat(found, 1)
    return [{'prompts': len(short), 'longest': FLOOR_PROMPT, 'tokens': tokens.size(1), 'copies': FLOOR_COPIES,
             'change': float(tokens.mean()), 'largest_change': float(tokens.max())}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--soak', type=Path, nargs='+', default=[RESULTS / 'soak.json'])
    parser.add_argument('--formats', help='of the files (default: all)')
    parser.add_argument('--copies', type=int, help='of each (default: as soak.py, by how often the load came by)')
    parser.add_argument('--floor', action='store_true', help='measure what noise changes, and nothing else')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    import soak
    from smollm2 import chosen_model
    folder = str(chosen_model())
    if args.floor:
        *_, settings = soak.parse(['--model', folder])
        rows = floor(folder, soak.all_prompts(settings))
        print_table(rows, list(rows[0]))
        print(write_results('rounding_floor', rows, args.out, model=Path(folder).name, noise=NOISE))
        return
    rounding, rows, seen = Rounding(folder), [], set()
    for path in args.soak:
        data = json.loads(path.read_text())
        settings = soak.Settings(**{name: data[name] for name in soak.Settings.__annotations__} | {'model': folder})
        prompts = soak.all_prompts(settings)
        for fmt, far in ((row['format'], far) for row in data['rows'] for far in row['farthest']):
            text = tuple(far['answer'][:far['at']])
            kind = fmt, far['prompt'], text, far['token']
            if kind in seen or args.formats and fmt not in args.formats.split(','):
                continue
            seen.add(kind)
            # the reference's own token is likely, and no control
            others = [token for _, token in far['top'] if token != far['reference'][far['at']]]
            visits = sum(one['answers'] for one in far['company'])
            found = rounding.explain(fmt, prompts[far['prompt']].ids, text, far['token'], others,
                                     args.copies or copies_for(visits), settings.prefill)
            rows.append({'file': path.name, 'format': fmt, 'prompt': far['prompt'], 'at': far['at'],
                         'token': far['token'], 'reference_gap': far['gap'], 'visits': visits,
                         'answers': next(one['answers'] for one in far['company'] if one['token'] == far['token']),
                         **found})
            print_table(rows[-1:], list(rows[0]))
            path_out = write_results('rounding', rows, args.out, model=Path(folder).name, noise=NOISE)
    if rows:
        print_table(rows, list(rows[0]))
        print(path_out)


if __name__ == '__main__':
    main()
