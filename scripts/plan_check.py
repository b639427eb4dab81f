#!/usr/bin/env python3
"""``lmdeploy-kvq plan`` against the engine: the blocks that it predicts and those that LMDeploy allocates.

  scripts/plan_check.py [--formats NAME,...] [--out FOLDER]

Three shapes: SmolLM2, a Llama with 8 KV heads of 128, a Qwen3 with 4 of 256. The plan is made by the command, which
looks at the GPU's size alone; then the engine starts with LMDeploy's defaults, which take most of a free GPU, so that
nothing else may run on it. Writes plan.json; exit code 1 where they are more than 3 % apart. About two minutes.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import probe
from features_check import ENV, PROGRAM
from random_models import write_sharp
from smollm2 import chosen_model

from lmdeploy_kvq import get_format

TOLERANCE = 0.03
SHAPES = {'llama': {'layers': 4, 'heads': 8, 'kv_heads': 8, 'head_dim': 128, 'vocabulary': 32_000},
          'qwen3': {'kind': 'qwen3', 'layers': 6, 'heads': 4, 'kv_heads': 4, 'head_dim': 256, 'vocabulary': 32_000}}


def planned(model: Path) -> dict[str, int]:
    """Blocks per format, as the command prints them for this machine's GPU."""
    done = subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'plan', str(model), '--json'], text=True,
                          capture_output=True)  # exit code 1: what is asked for does not fit
    return {row['format']: row['num_gpu_blocks'] for row in json.loads(done.stdout)['rows']}


def allocated(model: Path, policy: str) -> int:
    """Blocks that the engine allocates with LMDeploy's defaults; one small graph, to start soon."""
    spec = {'model': str(model), 'quant_policy': policy, 'scenario': 'memory',
            'engine': {'cudagraph_capture_batch_sizes': [8], 'session_len': 2048}}
    return probe(spec, ENV, 200, PROGRAM)['num_gpu_blocks']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', default='none,int4_per_token_head')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    formats = [name if name == 'none' else get_format(name).name for name in args.formats.split(',')]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        models = {'smollm2': chosen_model(), **{name: Path(work, name) for name in SHAPES}}
        for name, shape in SHAPES.items():
            write_sharp(models[name], models['smollm2'], **shape)
        for name, model in models.items():
            plan = planned(model)
            for fmt in formats:
                row = {'shape': name, 'format': fmt, 'planned': plan['bf16' if fmt == 'none' else fmt],
                       'num_gpu_blocks': allocated(model, fmt)}
                rows.append({**row, 'ratio': row['planned'] / row['num_gpu_blocks']})
                print(rows[-1], flush=True)
    failed = [f'{row["shape"]}, {row["format"]}: {row["planned"]} blocks planned, {row["num_gpu_blocks"]} allocated'
              for row in rows if abs(row['ratio'] - 1) > TOLERANCE]
    print_table(rows, ['shape', 'format', 'planned', 'num_gpu_blocks', 'ratio'])
    print(write_results('plan', rows, args.out, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
