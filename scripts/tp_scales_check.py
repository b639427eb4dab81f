#!/usr/bin/env python3
"""Scales per KV head under tensor parallelism: tp=2 through Ray and mp against tp=1; writes tp_scales.json.

A scale of the wrong head is only seen where heads differ, so every KV head of a random Llama gets another magnitude:
powers of two from 2^-8 to 2^6, taken back in queries and in the output projection, so that scores and outputs stay. Its
scale file is calibrated per head. The last row is the control: the same file with the heads reversed, on one GPU.
About two minutes on two GPUs.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import PROMPTS, passages, probe
from random_models import reverse_heads, spread_heads
from tp_check import WAYS, write_llama

HEADS, DIM = 8, 128
LIMIT = 2e-3  # mean KL of tp=2 against tp=1, far above what summation order makes and far below a wrong head


def main() -> int:
    import torch
    import transformers
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--tokenizer', default='~/models/smollm2')
    parser.add_argument('--keep', type=Path, default=Path('~/models/spread-llama').expanduser())
    parser.add_argument('--ways', default=','.join(WAYS))
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    tokenizer_from = os.path.expanduser(args.tokenizer)
    scales, wrong = args.keep / 'heads.safetensors', args.keep / 'wrong.safetensors'
    if not scales.exists():
        write_llama(str(args.keep), tokenizer_from, decisive=False)
        spread_heads(args.keep, HEADS, DIM)
        subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(args.keep), '-o', str(scales),
                        '--granularity', 'head', '--engine', 'transformers', '--tokens', '4096', '--new-tokens', '1'],
                       check=True, timeout=300)
        reverse_heads(scales, wrong)
    texts = [ids for _, ids in passages(transformers.AutoTokenizer.from_pretrained(tokenizer_from), 256)][:8]
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def score(name: str, policy: int | str, way: str, file: Path | None) -> tuple[torch.Tensor, dict]:
            out = f'{folder}/{name}.pt'
            result = probe({'model': str(args.keep), 'quant_policy': policy, 'prompts': PROMPTS, 'new_tokens': 16,
                            'passages': texts, 'out': out,
                            'engine': {'num_gpu_blocks': 300, 'session_len': 2048, 'max_batch_size': 8, **WAYS[way]}},
                           {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_KVQ_SCALES': str(file or '')})
            return torch.cat(torch.load(out)).float().log_softmax(-1), result

        def row(name: str, base: tuple, found: tuple) -> dict:
            tokens = [x[1]['rounds'][0]['tokens'] for x in (base, found)]
            return {'run': name, 'mean_kl': float((base[0].exp() * (base[0] - found[0])).sum(-1).mean()),
                    'equal_sequences': sum(a == b for a, b in zip(*tokens)), 'sequences': len(PROMPTS),
                    'start_seconds': found[1]['start_seconds']}

        bf16, one = score('bf16', 0, 'tp=1', None), score('one', 'fp8', 'tp=1', scales)
        rows.append(row('fp8 tp=1 against bf16', bf16, one))
        rows += [row(f'fp8 {way} against tp=1', one, score(way, 'fp8', way, scales))
                 for way in args.ways.split(',') if way != 'tp=1']
        rows.append(row('heads reversed, tp=1, against tp=1', one, score('wrong', 'fp8', 'tp=1', wrong)))
    print_table(rows, list(rows[0]))
    failed = [r['run'] for r in rows[1:-1] if r['mean_kl'] > LIMIT] + \
        (['the control: reversed heads are not seen'] if rows[-1]['mean_kl'] < 10 * LIMIT else [])
    print(write_results('tp_scales', rows, args.out, limit=LIMIT, failed=failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
