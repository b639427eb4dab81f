#!/usr/bin/env python3
"""Calibration while serving, in the real engine: a model whose keys exceed fp8's range comes back by itself.

  scripts/served_calibration.py [--model MODEL] [--out FOLDER]

The model is calibration_gain's: keys x 200, queries / 200. Its engine starts with LMDEPLOY_KVQ_CALIBRATE and no scale
file. Rows, as mean KL against the bf16 cache of the same model: while scales are pending, after they were set, after a
restart that reads the file, and the original model with scale 1.0 for comparison. Writes served_calibration.json; exit
code 1 if a limit is missed, if the file does not fit the model, or if graphs decode other tokens before a restart than
after it. One GPU, about two minutes.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchlib import print_table, write_results
from calibration_gain import FMT, LIMITS, compare, write_model
from eval_engine import passages, probe
from smollm2 import HOME, find_or_convert
from transformers import AutoTokenizer

from lmdeploy_kvq.scales import read_file, validate

ROUNDS = [1, 4, 4]  # prompts at once: the first is served pending, the second sets the scales, the third has them
PENDING_LIMIT = 0.1  # of the KL that fp8 costs: what summation order makes
EQUAL = 3  # of the four sequences of the last round


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--tokens', type=int, default=1024, help='of LMDEPLOY_KVQ_CALIBRATE')
    parser.add_argument('--length', type=int, default=512, help='tokens of a prompt and of a passage to measure on')
    parser.add_argument('--factor', type=float, default=200.0)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    source = find_or_convert(Path(os.path.expanduser(args.model)))
    tokenizer = AutoTokenizer.from_pretrained(source)
    pieces = [ids for _, ids in passages(tokenizer, args.length)]
    if len(pieces) < 8:
        parser.error(f'the built-in texts have {len(pieces)} passages of {args.length} tokens, 8 are needed')
    chosen = [pieces[i * len(pieces) // 8] for i in range(8)]  # both domains, taking turns
    train, test = list(map(tokenizer.decode, chosen[::2])), chosen[1::2]
    with tempfile.TemporaryDirectory() as work:
        folder, file = Path(work, 'rescaled'), Path(work, 'scales.safetensors')
        config = write_model(source, folder, args.factor)

        def run(name: str, where: Path, policy: int, **env: str) -> tuple[list[torch.Tensor], dict]:
            out = f'{work}/{name}.pt'
            result = probe({'model': str(where), 'quant_policy': policy, 'passages': test, 'out': out,
                            'prompts': train, 'new_tokens': 24, 'batches': ROUNDS,
                            'engine': {'num_gpu_blocks': 200, 'session_len': 2048, 'max_batch_size': 8}},
                           {'LMDEPLOY_KVQ_PREFILL': 'cache', **env}, limit=150)
            return torch.load(out), result

        with ThreadPoolExecutor(3) as pool:
            jobs = {'original bf16': (source, 0, {}), 'original': (source, FMT.policy, {}), 'bf16': (folder, 0, {}),
                    'pending': (folder, FMT.policy, {'LMDEPLOY_KVQ_CALIBRATE': '100000'}),
                    'served': (folder, FMT.policy, {'LMDEPLOY_KVQ_CALIBRATE': str(args.tokens),
                                                    'LMDEPLOY_KVQ_SCALES': str(file)})}
            started = {name: pool.submit(run, name, where, policy, **env)
                       for name, (where, policy, env) in jobs.items()}
            found = {name: job.result() for name, job in started.items()}
        found['restarted'] = run('restarted', folder, FMT.policy, LMDEPLOY_KVQ_CALIBRATE=str(args.tokens),
                                 LMDEPLOY_KVQ_SCALES=str(file))
        scales = read_file(file)
        validate(scales, range(config.num_hidden_layers), config.num_key_value_heads)
    rows = [{'engine': name, **compare(found[base][0], found[name][0])} for name, base in
            (('original', 'original bf16'), ('pending', 'bf16'), ('served', 'bf16'), ('restarted', 'bf16'))]
    limits = {'pending': PENDING_LIMIT, 'served': LIMITS['rescaled'], 'restarted': LIMITS['rescaled']}
    failed = []
    for row in rows:
        row['against_original_at_1'] = row['mean_kl'] / rows[0]['mean_kl']
        if row['against_original_at_1'] > limits.get(row['engine'], 1.0):
            failed.append(f'{row["engine"]}: {row["against_original_at_1"]:.3f} > {limits[row["engine"]]}')
    last = [found[name][1]['rounds'][-1]['tokens'] for name in ('served', 'restarted')]
    equal = sum(a == b for a, b in zip(*last))
    if equal < EQUAL:
        failed.append(f'only {equal} of {ROUNDS[-1]} sequences are the same after a restart')
    if scales.metadata.get('data') != 'served' or int(scales.metadata['tokens']) < args.tokens:
        failed.append(f'the file says {scales.metadata}')
    print_table(rows, ['engine', 'mean_kl', 'against_original_at_1', 'top1_agreement'])
    print(write_results('served_calibration', rows, args.out, format=FMT.name, factor=args.factor, tokens=args.tokens,
                        limits=limits, equal_sequences=equal, failed=failed), *failed, sep='\n')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
