#!/usr/bin/env python3
"""A live weight update and both levels of sleep, with static scales and with calibrated transforms.

  scripts/update_check.py [--model MODEL] [--out FOLDER]

A second model is the first with a little noise on every weight, so that it says something else. An engine on the first
takes the second's weights from another process, as a trainer sends them (LMDeploy's update_params, CUDA IPC), then
sleeps at level 1, then at level 2 and takes the weights again. After each it has to say, token by token, what an engine
says that was started on the second model. With fp8, checkpoints carry scales, which the update brings along and the
last one leaves out; with int4_per_token_head, both engines read one file of transforms, which no update touches. Writes
update.json; exit code 1 if anything differs. One GPU, about a minute and a half.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchlib import print_table, write_results
from eval_engine import PROMPTS, probe
from features_check import ENV, PROGRAM
from smollm2 import HOME, find_or_convert

SCALES, TRANSFORMS = 'fp8', 'int4_per_token_head'
NOISE = 0.05  # of each tensor's standard deviation
NEW_TOKENS = 32
STAGES = ('updated', 'level 1', 'level 2')


def write_models(source: Path, first: Path, second: Path) -> None:
    """Two models with a K and a V scale per layer in their checkpoints; the second's weights and scales are others."""
    import shutil

    from safetensors.torch import load_file, save_file
    weights = load_file(source / 'model.safetensors')
    layers = json.loads((source / 'config.json').read_text())['num_hidden_layers']
    torch.manual_seed(0)
    for folder, noise, scale in ((first, 0.0, 0.25), (second, NOISE, 0.0625)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns('*.safetensors'))
        noisy = {name: (w.float() + noise * w.float().std() * torch.randn_like(w, dtype=torch.float32)).to(w.dtype)
                 if w.dim() > 1 else w for name, w in weights.items()}
        scales = {f'model.layers.{layer}.self_attn.{which}_scale': torch.tensor(scale * (1 + n))
                  for layer in range(layers) for n, which in enumerate('kv')}
        save_file({**noisy, **scales}, folder / 'model.safetensors', metadata={'format': 'pt'})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer
    source = find_or_convert(Path(os.path.expanduser(args.model)))
    prompts = [AutoTokenizer.from_pretrained(source).encode(text) for text in PROMPTS]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(4) as pool:
        first, second, file = Path(work, 'first'), Path(work, 'second'), Path(work, 'transforms.safetensors')
        write_models(source, first, second)
        subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(second), '-o', str(file), '--format',
                        TRANSFORMS, '--engine', 'transformers', '--tokens', '2048', '--new-tokens', '1'], check=True,
                       timeout=200)

        def run(policy: str, scenario: str, folder: Path) -> dict[str, list]:
            env = {**ENV, 'LMDEPLOY_KVQ_SCALES': str(file) if policy == TRANSFORMS else ''}
            return probe({'model': str(folder), 'quant_policy': policy, 'scenario': scenario, 'prompts': prompts,
                          'new_tokens': NEW_TOKENS, 'weights': str(second),
                          'engine': {'num_gpu_blocks': 200, 'session_len': 1024, 'max_batch_size': 8,
                                     'cudagraph_capture_batch_sizes': [8]}}, env, 240, PROGRAM)['tokens']

        jobs = {(policy, scenario): pool.submit(run, policy, scenario, folder)
                for policy in (SCALES, TRANSFORMS) for scenario, folder in (('update', first), ('start', second))}
        found = {key: job.result() for key, job in jobs.items()}
    rows = [{'format': policy, 'after': stage, 'sequences': len(prompts),
             'equal_sequences': sum(a == b for a, b in zip(found[policy, 'update'][stage],
                                                           found[policy, 'start']['start']))}
            for policy in (SCALES, TRANSFORMS) for stage in ('start', *STAGES)]
    failed = [f'{row["format"]}, {row["after"]}: {row["equal_sequences"]} of {row["sequences"]} are the same'
              for row in rows if row['after'] in STAGES and row['equal_sequences'] < row['sequences']]
    failed += [f'{row["format"]}: both models say the same, so nothing is seen'
               for row in rows if row['after'] == 'start' and row['equal_sequences'] == row['sequences']]
    print_table(rows, list(rows[0]))
    print(write_results('update', rows, args.out, noise=NOISE, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
