#!/usr/bin/env python3
"""What calibrated scales gain: fp8's error on a model, and on the same model with keys beyond fp8's range.

The second model is the first with keys x 200 and queries / 200: its scores are the same, and with scale 1.0 its keys
saturate. Calibrated on other passages of the built-in texts than it is measured on. Mean KL against the unquantized
cache of the same model. Writes calibration_gain.json: on a CPU, through transformers; or, with --engine,
calibration_gain_engine.json: on a GPU, through LMDeploy, calibration too.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchlib import print_table, write_results
from eval_engine import passages, probe
from smollm2 import HOME, find_or_convert
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from lmdeploy_kvq import hf_observer
from lmdeploy_kvq.calibrate import STATIC
from lmdeploy_kvq.hf_cache import QuantizedCache
from lmdeploy_kvq.kvstats import GRANULARITIES, METHODS, ModelStatistics
from lmdeploy_kvq.scales import write_file

FMT = STATIC[0]
LIMITS = {'original': 1.15, 'rescaled': 1.2}  # of the original model's KL at scale 1.0, for the default calibration
DEFAULT = (METHODS[0], GRANULARITIES[0])


def rescale(model: torch.nn.Module, factor: float) -> None:
    """Keys x factor, queries / factor, in place: RoPE is linear and the scores stay."""
    for name, parameter in model.named_parameters():
        for part, by in (('.q_proj.', 1 / factor), ('.k_proj.', factor)):
            if part in name:
                parameter.data *= by


def write_model(source: Path, target: Path, factor: float | None = None) -> PretrainedConfig:
    """Write a model in bf16 with its tokenizer, rescaled if there is a factor; returns its configuration."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if factor is not None:
        rescale(model, factor)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return model.config


def compare(base: list[torch.Tensor], scores: list[torch.Tensor]) -> dict[str, float]:
    """Mean KL and top-1 agreement of log-probabilities [tokens, vocabulary] per passage."""
    a, b = (torch.cat(list(x)).float().log_softmax(-1) for x in (base, scores))
    return {'mean_kl': float((a.exp() * (a - b)).sum(-1).mean()),
            'top1_agreement': float((a.argmax(-1) == b.argmax(-1)).float().mean())}


@torch.inference_mode()
def through_transformers(folder: Path, train: list[list[int]], test: list[list[int]], factor: float,
                         work: Path) -> list[dict]:
    """Rows of both models, on a CPU in fp32."""
    rows = []
    for name in LIMITS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if name == 'rescaled':
            rescale(model, factor)

        def score(cache: QuantizedCache | None) -> list[torch.Tensor]:
            return [model(torch.tensor([ids]), past_key_values=cache() if cache else None).logits[0] for ids in test]

        base = score(None)
        rows.append({'model': name, 'scales': '1.0', **compare(base, score(lambda: QuantizedCache(FMT)))})
        statistics = ModelStatistics()
        hf_observer.observe(model, train, 0, statistics, lambda tokens: None)
        for method in METHODS:
            for granularity in GRANULARITIES:
                path = work / f'{name}-{method}-{granularity}.safetensors'
                write_file(path, statistics.scales(FMT, method, granularity), {'format': FMT.name, 'method': method})
                rows.append({'model': name, 'scales': 'calibrated', 'method': method, 'granularity': granularity,
                             **compare(base, score(lambda: QuantizedCache(FMT, scales=path)))})
                print(rows[-1], flush=True)
    return rows


def through_lmdeploy(folder: Path, train: str, test: list[list[int]], factor: float, work: Path) -> list[dict]:
    """Rows of both models, by LMDeploy's engine in bf16, calibrated by the command."""
    rows = []
    for name in LIMITS:
        write_model(folder, work / name, factor if name == 'rescaled' else None)
        scales = work / f'{name}.safetensors'
        subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(work / name), '--data', '-', '-o',
                        str(scales), '--engine', 'lmdeploy', '--new-tokens', '16'], input=train, text=True, check=True,
                       timeout=180)

        def score(policy: int, path: Path | None = None, name: str = name) -> list[torch.Tensor]:
            out = work / f'{name}-{policy}-{path is not None}.pt'
            probe({'model': str(work / name), 'quant_policy': policy, 'passages': test, 'out': str(out),
                   'engine': {'num_gpu_blocks': 200, 'session_len': 2048, 'max_batch_size': 8}},
                  {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_KVQ_SCALES': str(path) if path else ''}, limit=150)
            return torch.load(out)

        base = score(0)
        rows.append({'model': name, 'scales': '1.0', **compare(base, score(FMT.policy))})
        rows.append({'model': name, 'scales': 'calibrated', 'method': DEFAULT[0], 'granularity': DEFAULT[1],
                     **compare(base, score(FMT.policy, scales))})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--engine', action='store_true', help="through LMDeploy's engine, on a GPU")
    parser.add_argument('--tokens', type=int, default=2048, help='to measure on, and as many to calibrate on')
    parser.add_argument('--length', type=int, default=512)
    parser.add_argument('--factor', type=float, default=200.0)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    folder = find_or_convert(Path(os.path.expanduser(args.model)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [ids for _, ids in passages(tokenizer, args.length)]
    count = args.tokens // args.length
    if len(pieces) < 2 * count:
        parser.error(f'the built-in texts have {len(pieces)} passages of {args.length} tokens, 2 x {count} are needed')
    step = len(pieces) / (2 * count)
    chosen = [pieces[int(i * step)] for i in range(2 * count)]  # both domains, taking turns
    train, test = chosen[::2], chosen[1::2]
    with tempfile.TemporaryDirectory() as work:
        if args.engine:
            rows = through_lmdeploy(folder, '\n'.join(map(tokenizer.decode, train)), test, args.factor, Path(work))
        else:
            rows = through_transformers(folder, train, test, args.factor, Path(work))
    reference = next(row['mean_kl'] for row in rows if (row['model'], row['scales']) == ('original', '1.0'))
    failed = []
    for row in rows:
        row['against_original_at_1'] = row['mean_kl'] / reference
        limit = LIMITS[row['model']]
        if (row.get('method'), row.get('granularity')) == DEFAULT and row['against_original_at_1'] > limit:
            failed.append(f'{row["model"]}: {row["against_original_at_1"]:.3f} > {limit}')
    print_table(rows, ['model', 'scales', 'method', 'granularity', 'mean_kl', 'against_original_at_1',
                       'top1_agreement'])
    print(write_results('calibration_gain_engine' if args.engine else 'calibration_gain', rows, args.out,
                        format=FMT.name, factor=args.factor, tokens=sum(map(len, test)), limits=LIMITS, failed=failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
