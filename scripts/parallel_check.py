#!/usr/bin/env python3
"""Tensor parallelism against one GPU: scales and transforms per head, replicated heads, scales found while serving.

  scripts/parallel_check.py --tp 4 [--kv-heads 8,2] [--ways mp,ray] [--checks scales,transforms,served] [--out FOLDER]

A random Llama whose KV heads have magnitudes of their own, by powers of two (taken back in queries and in the output
projection, so that nothing else changes), and whose answers depend on single keys. Fewer KV heads than GPUs are
replicated. Per way of running: mean KL of passages against tp=1 with the same cache and file (prefill reads the cache);
and how likely decoded tokens are in one prefill of the same engine. bf16's own difference is the floor. The control
gives every head another one's scales or transforms, on one GPU. The limit is half of what the cache costs against bf16
(other sums round to other codes here and there) and of the control, or four times the floor if that is more.
``served``: the engine finds the scales itself, on the same prompts one after the other, and the files of all ways have
to agree. Writes parallel_tpN.json; exit code 1 if a limit is missed. About a minute and a half.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from benchlib import print_table, write_results
from calibration_gain import compare
from eval_engine import passages, probe
from features_check import ENV, PROGRAM, SLACK
from random_models import reverse_heads, spread_heads, write_sharp
from smollm2 import chosen_model

from lmdeploy_kvq.scales import read_file

HEADS, DIM, LENGTH = 8, 64, 300
STATIC, TRANSFORMED = 'fp8', 'int4_per_token_head'
CALIBRATE = 1000  # tokens: the fourth prompt of 300 no longer fits
FILES_AGREE = 0.02  # relative: two roundings of bf16, in scales
FLOORS, SHARE = 4.0, 0.5


@dataclass(frozen=True)
class Run:
    """One engine: what it serves, how, and with which file.

    Attributes:
        kv_heads: of the model. check: ``floor``, ``scales``, ``transforms`` or ``served``. way: ``tp=1``, or a backend
            of executors; ``control``: tp=1 with the heads' file reversed.
    """
    kv_heads: int
    check: str
    way: str

    @property
    def policy(self) -> str:
        """The cache's."""
        return {'floor': 'none', 'transforms': TRANSFORMED}.get(self.check, STATIC)


def calibrate(folder: Path, check: str) -> None:
    """Write a model's file of scales or transforms, by the command, and the control's."""
    how = ['--granularity', 'head', '--format', STATIC] if check == 'scales' else ['--format', TRANSFORMED]
    subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(folder), '-o',
                    str(folder / f'{check}.safetensors'), '--engine', 'transformers', '--tokens', '4096',
                    '--new-tokens', '1', *how], check=True, timeout=200, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    reverse_heads(folder / f'{check}.safetensors', folder / f'{check}-control.safetensors')


def scale_file(work: Path, run: Run) -> Path | str:
    """The file that an engine reads, or writes."""
    if run.check == 'served':
        return work / f'{run.kv_heads}-{run.way}.safetensors'
    name = {'floor': '', 'control': f'{run.check}-control'}.get('floor' if run.check == 'floor' else run.way, run.check)
    return work / str(run.kv_heads) / f'{name}.safetensors' if name else ''


def serve(work: Path, run: Run, tp: int, prompts: list[list[int]]) -> tuple[list[torch.Tensor], dict]:
    """Log-probabilities of the passages, and what the engine says of its own decoding."""
    out = work / f'{run.kv_heads}-{run.check}-{run.way}.pt'
    parallel = {} if run.way in ('tp=1', 'control') else {'tp': tp, 'distributed_executor_backend': run.way}
    env = {**ENV, 'LMDEPLOY_KVQ_SCALES': str(scale_file(work, run)),
           'LMDEPLOY_KVQ_CALIBRATE': f'{CALIBRATE},head' if run.check == 'served' else ''}
    done = probe({'model': str(work / str(run.kv_heads)), 'quant_policy': run.policy, 'scenario': 'read',
                  'first': prompts[:4], 'prompts': prompts[4:], 'new_tokens': 16, 'out': str(out),
                  'engine': {'num_gpu_blocks': 200, 'session_len': 1024, 'max_batch_size': 8,
                             'cudagraph_capture_batch_sizes': [8], **parallel}}, env, 240, PROGRAM)
    return torch.load(out), done


def row(run: Run, found: dict[Run, tuple[list[torch.Tensor], dict]]) -> dict:
    """One engine against tp=1's, and that one against bf16's."""
    kept, done = found[run]
    bf16, one = (found[Run(run.kv_heads, check, 'tp=1')][0] for check in ('floor', run.check))
    return {'kv_heads': run.kv_heads, 'check': run.check, 'format': run.policy, 'way': run.way,
            **compare(one, kept), 'cost': compare(bf16, one)['mean_kl'],
            'decode_gap': max(gap['worst'] for gap in done['decode']), 'start_seconds': done['start_seconds']}


def files_differ(work: Path, run: Run) -> float:
    """Largest relative difference of a scale that was found while serving from tp=1's."""
    one, other = (read_file(scale_file(work, Run(run.kv_heads, 'served', way))).layers for way in ('tp=1', run.way))
    pairs = [(a, b) for n in one for a, b in zip(one[n].resolved('')[:2], other[n].resolved('')[:2], strict=True)]
    if any(a.shape != b.shape or a.numel() != run.kv_heads for a, b in pairs):
        return float('inf')
    return max(float(((a - b).abs() / a).max()) for a, b in pairs)


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    kl = {(r['kv_heads'], r['check'], r['way']): r['mean_kl'] for r in rows}
    gaps = {(r['kv_heads'], r['check'], r['way']): r['decode_gap'] for r in rows}
    failed = []
    for r in rows:
        heads, check, way = r['kv_heads'], r['check'], r['way']
        name = f'{heads} KV heads, {check}, {way}'
        if way in ('tp=1', 'control') or check == 'floor':
            continue
        control = kl.get((heads, 'scales' if check == 'served' else check, 'control'), 0.0)
        limit = max(FLOORS * kl[heads, 'floor', way], SHARE * min(control, r['cost']))
        if r['mean_kl'] > limit or control <= FLOORS * kl[heads, 'floor', way]:
            failed.append(f'{name}: mean KL {r["mean_kl"]:.3g}, the limit is {limit:.3g}, the control {control:.3g}')
        gap = 2 * max(gaps[heads, 'floor', way], gaps[heads, check, 'tp=1']) + SLACK
        if r['decode_gap'] > gap:
            failed.append(f'{name}: a decoded token is {r["decode_gap"]:.2f} from likely, the limit is {gap:.2f}')
        if r.get('files_differ', 0.0) > FILES_AGREE:
            failed.append(f'{name}: scales differ by {r["files_differ"]:.3g}')
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tp', type=int, default=2)
    parser.add_argument('--kv-heads', default='8')
    parser.add_argument('--ways', default='mp,ray', help='backends of executors')
    parser.add_argument('--checks', default='scales,transforms,served')
    parser.add_argument('--jobs', type=int, default=8, help='engines at once (default: %(default)s)')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    kv_heads, ways, checks = [int(n) for n in args.kv_heads.split(',')], args.ways.split(','), args.checks.split(',')
    if set(checks) - {'scales', 'transforms', 'served'} or 'served' in checks and 'scales' not in checks:
        parser.error('--checks: some of scales, transforms, served; served needs the control of scales')
    for n in kv_heads:
        if n < 2 or HEADS % n or max(n, args.tp) % min(n, args.tp):
            parser.error(f'--kv-heads {n}: two at least, for the control; has to divide {HEADS}, and {args.tp} or be '
                         'divided by it')
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(folder)
        smollm2 = chosen_model()
        prompts = make_passages(smollm2)[:8]
        for n in kv_heads:
            write_sharp(work / str(n), smollm2, heads=HEADS, kv_heads=n, head_dim=DIM, vocabulary=None)
            spread_heads(work / str(n), n, DIM)
        files = [(work / str(n), check) for n in kv_heads for check in checks if check != 'served']
        list(pool.map(lambda item: calibrate(*item), files))
        runs = [Run(n, check, way) for n in kv_heads for check in ('floor', *checks)
                for way in ('tp=1', *ways, *(['control'] if check in ('scales', 'transforms') else []))]
        found = dict(zip(runs, pool.map(lambda run: serve(work, run, args.tp, prompts), runs)))
        rows = [row(run, found) for run in runs]
        for r, run in zip(rows, runs):
            if run.check == 'served' and run.way != 'tp=1':
                r['files_differ'] = files_differ(work, run)
    failed = verdicts(rows)
    print_table(rows, ['kv_heads', 'check', 'format', 'way', 'mean_kl', 'cost', 'top1_agreement', 'decode_gap',
                       'files_differ', 'start_seconds'])
    print(write_results(f'parallel_tp{args.tp}', rows, args.out, tp=args.tp, failed=failed), *failed, sep='\n')
    return int(bool(failed))


def make_passages(tokenizer_from: Path) -> list[list[int]]:
    """Pieces of the built-in texts."""
    from transformers import AutoTokenizer
    return [ids for _, ids in passages(AutoTokenizer.from_pretrained(tokenizer_from), LENGTH)]


if __name__ == '__main__':
    sys.exit(main())
