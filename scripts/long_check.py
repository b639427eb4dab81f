#!/usr/bin/env python3
"""128k tokens of context through LMDeploy's engine: prefill in chunks, decode, and how far each cache is from bf16's.

  scripts/long_check.py [--tokens 131072] [--formats NAME,...] [--jobs N] [--out FOLDER]

A random model that finds single keys among all of them (random_models.py). Per cache, as mean KL against bf16 over the
last 256 positions: of the long prompt, and of a short one. Chunks after the first read the quantized cache; the short
prompt reads it too (LMDEPLOY_KVQ_PREFILL=cache). Limits: length adds no error (at most twice the short prompt's KL, and
four times the floor, a second bf16 engine); greedy tokens decoded after the long prompt are as likely in one prefill as
those of bf16, or those after the short prompt (twice the gap). The control, a prompt whose first half is another one,
shows that the far half counts. Writes long.json; exit code 1 if a limit is missed. One GPU, about a minute.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchlib import print_table, write_results
from calibration_gain import compare
from eval_engine import probe
from features_check import ENV, PROGRAM, SLACK
from random_models import write_sharp
from smollm2 import chosen_model

from lmdeploy_kvq import get_format

KEEP, NEW_TOKENS, SHORT, VOCABULARY = 256, 32, 2048, 1024
FLOORS, SHORTS, CONTROL = 4.0, 2.0, 10.0


def write_prompts(path: Path, tokens: int, seed: int = 0) -> None:
    """The long prompt, one that differs from it in its first half, and a short one: int64 each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (count, ), generator=generator)

    near = draw(tokens // 2)
    torch.save([torch.cat([draw(tokens - len(near)), near]), torch.cat([draw(tokens - len(near)), near]), draw(SHORT)],
               path)


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be. The first row is bf16's control, the second its second engine."""
    control, floor, *formats = rows
    failed = []
    for row in [floor, *formats]:
        limit = FLOORS * floor['mean_kl'] + SHORTS * row['short_kl']
        gap = 2 * max(floor['decode_gap'], row['short_gap']) + SLACK
        failed += [f'{row["format"]}: {text}' for text, bad in (
            (f'mean KL {row["mean_kl"]:.3g}, the limit is {limit:.3g}', row['mean_kl'] > limit and row is not floor),
            (f'a decoded token is {row["decode_gap"]:.2f} from likely, the limit is {gap:.2f}',
             row['decode_gap'] > gap),
        ) if bad]
    least = max(row['mean_kl'] for row in [floor, formats[0]])
    if control['mean_kl'] < CONTROL * least:
        failed.append(f'the control: a KL of {control["mean_kl"]:.3g} for another first half')
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=131_072)
    parser.add_argument('--formats', default='int8_per_token_head,fp8_per_token_head,k8v4,int4_per_token_head',
                        help='the first one is what the control is compared with')
    parser.add_argument('--jobs', type=int, default=6)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.tokens < 4 * SHORT:
        parser.error(f'--tokens {args.tokens}: at least {4 * SHORT}')
    runs = [('none', 'none'), ('none again', 'none')]
    runs += [(name, name) for name in (get_format(name).name for name in args.formats.split(','))]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        folder, prompts = Path(work, 'model'), Path(work, 'prompts.pt')
        smollm2 = chosen_model()
        write_sharp(folder, smollm2, vocabulary=VOCABULARY, positions=args.tokens + 1024)
        write_prompts(prompts, args.tokens)
        engine = {'session_len': args.tokens + 1024, 'num_gpu_blocks': args.tokens // 64 + 64, 'max_batch_size': 4,
                  'max_prefill_token_num': 8192, 'cudagraph_capture_batch_sizes': [1]}

        def run(item: tuple[str, str]) -> tuple[list[torch.Tensor], dict]:
            out = Path(work, f'{item[0]}.pt')
            done = probe({'model': str(folder), 'quant_policy': item[1], 'engine': engine, 'scenario': 'long_context',
                          'prompts_file': str(prompts), 'keep': KEEP, 'new_tokens': NEW_TOKENS, 'out': str(out)},
                         ENV, 240, PROGRAM)
            return torch.load(out), done

        found = dict(zip(runs, pool.map(run, runs)))
    base = found[runs[0]][0]
    rows = [{'format': 'none, another first half', **compare(base[:1], base[1:2])}]
    for key in runs[1:]:
        kept, done = found[key]
        rows.append({'format': key[0], **compare(base[:1], kept[:1]),
                     'short_kl': compare(base[2:], kept[2:])['mean_kl'], 'decode_gap': done['decode'][0]['worst'],
                     'short_gap': done['decode'][1]['worst'], 'decode_likeliest': done['decode'][0]['agree'],
                     'seconds': done['seconds']})
    failed = verdicts(rows)
    print_table(rows, ['format', 'mean_kl', 'top1_agreement', 'short_kl', 'decode_gap', 'short_gap', 'seconds'])
    print(write_results('long', rows, args.out, tokens=args.tokens, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
