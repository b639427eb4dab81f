#!/usr/bin/env python3
"""Accuracy of every cache format through the real engine, against the bf16 cache; writes accuracy_engine.json.

Prefill attends to the quantized cache here (LMDEPLOY_KVQ_PREFILL=cache; LMDeploy's own policies always do), because a
prompt without history is otherwise exact by design. A second bf16 run gives the floor: differences of bf16 to itself.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from benchlib import print_table, write_results

HERE = Path(__file__).resolve().parent
PROMPTS = ['The capital of France is', 'Water boils when', 'def fibonacci(n):\n', 'The three primary colours are']
UPSTREAM = {'none': 0, 'int8 (LMDeploy)': 8, 'int4 (LMDeploy)': 4, 'turbo_quant (LMDeploy)': 42, 'fp8 (LMDeploy)': 16,
            'fp8_e5m2 (LMDeploy)': 17}


def passages(tokenizer, length: int) -> list[tuple[str, list[int]]]:
    """(domain, token ids) pieces of the built-in texts."""
    out = []
    for domain in ('prose', 'technical'):
        ids = tokenizer.encode(files('lmdeploy_kvq').joinpath(f'data/{domain}.txt').read_text(encoding='utf-8'))
        out += [(domain, ids[i:i + length]) for i in range(0, len(ids) - length + 1, length)]
    return out


def probe(spec: dict, env: dict | None = None, timeout: int = 90) -> dict:
    """Run engine_probe.py in a fresh process."""
    done = subprocess.run([sys.executable, str(HERE / 'engine_probe.py'), json.dumps(spec)], text=True,
                          capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})
    for line in done.stdout.splitlines():
        if line.startswith('RESULT '):
            return json.loads(line[7:])
    raise RuntimeError(f'{spec.get("quant_policy")}: exit {done.returncode}\n{done.stdout[-2000:]}\n'
                       f'{done.stderr[-6000:]}')


def main() -> None:
    import torch
    import transformers

    from lmdeploy_kvq import FORMATS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='~/models/smollm2')
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--jobs', type=int, default=5)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.expanduser(args.model))
    pieces = passages(tokenizer, args.length)
    runs = {**UPSTREAM, 'none again': 0, **{fmt.name: fmt.policy for fmt in FORMATS}}
    with tempfile.TemporaryDirectory() as folder:

        def run(item: tuple[str, int]) -> tuple[str, dict]:
            name, policy = item
            blocks = 200 + list(runs).index(name)  # another pool: the second bf16 run is not a mere repetition
            return name, probe({
                'model': args.model, 'quant_policy': policy, 'passages': [ids for _, ids in pieces],
                'prompts': PROMPTS, 'new_tokens': 48, 'score_generated': True, 'out': f'{folder}/{name}.pt',
                'engine': {'num_gpu_blocks': blocks, 'session_len': 2048, 'max_batch_size': 8},
            }, {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_KVQ': '0' if 'LMDeploy' in name else '1'})

        with ThreadPoolExecutor(args.jobs) as pool:
            results = dict(pool.map(run, runs.items()))
        base = torch.load(f'{folder}/none.pt')
        rows = []
        for name, policy in runs.items():
            scores = torch.load(f'{folder}/{name}.pt')
            for domain in ('prose', 'technical'):
                kl, top1, nll, count = 0.0, 0.0, 0.0, 0
                for (where, ids), a, b in zip(pieces, base, scores):
                    if where != domain:
                        continue
                    a, b = (x.cuda().float().log_softmax(-1) for x in (a, b))
                    kl += float((a.exp() * (a - b)).sum())
                    top1 += float((a.argmax(-1) == b.argmax(-1)).sum())
                    nll -= float(b[:-1].gather(1, torch.tensor(ids[1:], device='cuda')[:, None]).sum())
                    count += len(ids)
                tokens = count - sum(d == domain for d, _ in pieces)
                rows.append({'policy': policy, 'format': name, 'domain': domain, 'tokens': count,
                             'perplexity': 2.718281828459045**(nll / tokens), 'mean_kl': kl / count,
                             'top1_agreement': top1 / count, 'num_gpu_blocks': results[name].get('num_gpu_blocks')})
            check = results[name]['decode_against_prefill']
            rows[-1]['decode_against_prefill_agreement'] = min(c['agreement'] for c in check)
            rows[-1]['decode_against_prefill_worst_gap'] = max(c['worst_gap'] for c in check)
    print_table(rows, ['format', 'policy', 'domain', 'tokens', 'perplexity', 'mean_kl', 'top1_agreement',
                       'decode_against_prefill_agreement', 'decode_against_prefill_worst_gap'])
    for name, result in results.items():
        print(name, '|', repr(result['rounds'][0]['text'][0][:100]))
    print(write_results('accuracy_engine', rows, args.out, model=args.model,
                        greedy={n: r['rounds'][0]['text'] for n, r in results.items()}))


if __name__ == '__main__':
    main()
