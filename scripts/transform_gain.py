#!/usr/bin/env python3
"""What calibrated transforms of K gain through LMDeploy's engine, on a GPU; writes transform_gain_engine.json.

Calibrated by the command on other passages of the built-in texts than are measured, by each kind of transform. Mean KL
against the bf16 cache, every prompt reading the quantized cache; a second bf16 run gives the floor. Fails if
calibration does not lower the error of a format whose Hadamard error is above twice the floor.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchlib import print_table, write_results
from calibration_gain import compare
from eval_engine import passages, probe
from smollm2 import HOME, find_or_convert
from transformers import AutoTokenizer

from lmdeploy_kvq import FORMATS
from lmdeploy_kvq.transforms import KINDS

TAKING = [fmt for fmt in FORMATS if fmt.takes_transform]


def calibrate(folder: Path, text: str, kind: str, out: Path) -> Path:
    """A file of one kind, which serves all formats, by the command."""
    subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(folder), '--data', '-', '-o', str(out),
                    '--format', TAKING[0].name, '--transform', kind, '--engine', 'lmdeploy', '--new-tokens', '16'],
                   input=text, text=True, check=True, timeout=180)
    return out


def scores(folder: Path, pieces: list[list[int]], policy: int, scales: Path | None, out: Path, tp: int) -> Path:
    """Log-probabilities of the passages, by a fresh engine."""
    engine = {'num_gpu_blocks': 200, 'session_len': 2048, 'max_batch_size': 8, 'tp': tp}
    probe({'model': str(folder), 'quant_policy': policy, 'passages': pieces, 'out': str(out), 'engine': engine},
          {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_KVQ_SCALES': str(scales) if scales else ''}, 180)
    return out


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    floor = next(row['mean_kl'] for row in rows if row['format'] == 'none again')
    kl = {(row['format'], row['transform']): row['mean_kl'] for row in rows}
    return [f'{fmt.name}: {kind} {kl[fmt.name, kind]:.4g}, hadamard {kl[fmt.name, "hadamard"]:.4g}'
            for fmt in TAKING for kind in KINDS
            if kl[fmt.name, 'hadamard'] > 2 * floor and kl[fmt.name, kind] >= kl[fmt.name, 'hadamard']]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--length', type=int, default=512, help='tokens of a passage (default: %(default)s)')
    parser.add_argument('--passages', type=int, default=8, help='to measure on (default: %(default)s)')
    parser.add_argument('--tp', type=int, default=1)
    parser.add_argument('--jobs', type=int, default=4, help='engines at once (default: %(default)s)')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    folder = find_or_convert(Path(os.path.expanduser(args.model)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [ids for _, ids in passages(tokenizer, args.length)]
    if len(pieces) < 2 * args.passages:
        parser.error(f'the built-in texts have {len(pieces)} passages of {args.length} tokens, too few to measure on '
                     f'{args.passages} and to calibrate on others')
    taken = {i * len(pieces) // args.passages for i in range(args.passages)}
    test, train = [[p for i, p in enumerate(pieces) if (i in taken) == chosen] for chosen in (True, False)]
    text = '\n'.join(map(tokenizer.decode, train))
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        files = {kind: calibrate(folder, text, kind, Path(work, f'{kind}.safetensors')) for kind in KINDS}
        runs = [('none', '', 0, None), ('none again', '', 0, None),
                *((fmt.name, kind, fmt.policy, files.get(kind)) for fmt in TAKING for kind in ('hadamard', *KINDS))]
        jobs = [pool.submit(scores, folder, test, policy, path, Path(work, f'{number}.pt'), args.tp)
                for number, (_, _, policy, path) in enumerate(runs)]
        base = torch.load(jobs[0].result())
        rows = [{'format': name, 'transform': kind, 'policy': policy, **compare(base, torch.load(job.result()))}
                for (name, kind, policy, _), job in zip(runs, jobs)]
    failed = verdicts(rows)
    print_table(rows, ['format', 'transform', 'mean_kl', 'top1_agreement'])
    print('\n'.join(f'no gain: {line}' for line in failed) or 'every calibrated transform gains')
    name = 'transform_gain_engine' if args.tp == 1 else f'transform_gain_tp{args.tp}'
    print(write_results(name, rows, args.out, model=folder.name, tp=args.tp, tokens=sum(map(len, test)),
                        calibrated_on=sum(map(len, train)), failed=failed))
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
