#!/usr/bin/env python3
"""Data parallelism on two GPUs: each rank answers prompts of its own; the ranks and a plain engine have to confirm it.

  scripts/dp_check.py [--formats NAME,...] [--sets N] [--out FOLDER]

LMDeploy 0.18 with dp=2 and tp=2, as its launcher starts it: a server's engine per rank, attention whole on every GPU,
MLPs split over both. Here the engines run without the HTTP servers around them.

* The ranks read each answer again, in one prefill of the same split MLPs. Its tokens may be twice as far from likely as
  those of a plain engine are in its own eyes, see features_check.py.
* A plain engine reads them too. It adds in another order, also in the prompt, and a cache of few bits makes much of the
  last bit of a bf16 number (last_bit.py has how much): single tokens can be far from likely. So it judges an answer by
  the mean of its tokens, at most a quarter of what answers to other prompts have.

Writes dp.json; exit code 1 if a limit is missed, 3 if LMDeploy's own bf16 cache does not run this way. Two GPUs, about
two minutes.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchlib import print_table, write_results
from eval_engine import probe
from features_check import CONTROL, ENV, NEW_TOKENS, PLAIN, PROGRAM, SLACK, blocks, make_prompts
from server import free_port
from smollm2 import chosen_model

from lmdeploy_kvq import get_format
from lmdeploy_kvq.evaluation.through_engine import EngineError

RANKS, UNSUPPORTED = 2, 3
LIMIT = 300  # seconds of an engine: on a machine without compiled kernels half of it is compiling
SHARE = 0.25  # of the mean gap of answers to other prompts


def rank_spec(policy: str, rank: int, model: Path, prompts: list[list[int]], done: list[str]) -> dict:
    """What one rank's process is to do."""
    parallel = {'dp': RANKS, 'tp': RANKS, 'dp_rank': rank, 'distributed_executor_backend': 'ray'}
    return {'model': str(model), 'quant_policy': policy, 'engine': {**PLAIN, **blocks(64), **parallel},
            'scenario': 'one_of_many', 'rounds': [prompts[rank::RANKS]], 'new_tokens': NEW_TOKENS, 'done': done}


def rank_env(rank: int, port: int) -> dict[str, str]:
    """LMDeploy's launcher gives every rank its GPUs; the address is where all ranks meet."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(RANKS)))
    return {**ENV, 'CUDA_VISIBLE_DEVICES': visible.split(',')[rank], 'LMDEPLOY_DP_MASTER_ADDR': '127.0.0.1',
            'LMDEPLOY_DP_MASTER_PORT': str(port)}


def ask(policy: str, model: Path, prompts: list[list[int]], work: Path) -> dict[str, list]:
    """``pairs``, [prompt, answer] of all prompts, and ``gaps``, what the ranks say of each.

    Raises:
        EngineError: a rank failed or was too slow.
    """
    done, port = [str(work / f'{policy}-{rank}') for rank in range(RANKS)], free_port()
    with ThreadPoolExecutor(RANKS) as pool:
        jobs = [pool.submit(probe, rank_spec(policy, rank, model, prompts, done), rank_env(rank, port), LIMIT, PROGRAM)
                for rank in range(RANKS)]
        found = [job.result() for job in jobs]
    return {name: [item for rank in found for item in rank[name]] for name in ('pairs', 'gaps')}


def confirm(policy: str, model: Path, prompts: list[list[int]], found: dict[str, list]) -> dict:
    """A plain engine's own answers and the ranks', as another plain engine sees them."""
    plain = {'model': str(model), 'quant_policy': policy, 'engine': {**PLAIN, **blocks(64)}}
    own = probe({**plain, 'scenario': 'answers', 'rounds': [prompts], 'new_tokens': NEW_TOKENS}, ENV, LIMIT, PROGRAM)
    said = probe({**plain, 'scenario': 'score', 'pairs': own['pairs'] + found['pairs']}, ENV, LIMIT, PROGRAM)
    gaps, others = said['gaps'][:len(prompts)], said['gaps'][len(prompts):]
    return {'format': policy, 'answers': len(others), 'plain_gap': max(gap['worst'] for gap in gaps),
            'ranks_gap': max(gap['worst'] for gap in found['gaps']), 'worst_gap': max(gap['worst'] for gap in others),
            'median_worst_gap': statistics.median(gap['worst'] for gap in others),
            'likeliest': statistics.fmean(gap['agree'] for gap in others),
            'mean_gap': max(gap['mean'] for gap in others), 'mean_control': said['mean_control'],
            'control': said['control']}


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    failed = [f'{row["format"]}: a token is {row["ranks_gap"]:.2f} from likely in the ranks\' own eyes, with a plain '
              f'engine {row["plain_gap"]:.2f}' for row in rows if row['ranks_gap'] > 2 * row['plain_gap'] + SLACK]
    failed += [f'{row["format"]}: the control, another prompt\'s answer, is {row["control"]:.2f} from likely'
               for row in rows if row['control'] < CONTROL]
    return failed + [f'{row["format"]}: the tokens of an answer are {row["mean_gap"]:.2f} from likely in the mean, of '
                     f'answers to other prompts {row["mean_control"]:.2f}' for row in rows
                     if row['mean_gap'] > SHARE * row['mean_control']]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', default='fp8_per_token_head,int4_per_token_head')
    parser.add_argument('--sets', type=int, default=1, help='of 24 prompts')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec('ray') is None:
        parser.error('ranks are started by Ray, which is not installed')
    formats = ['none', *(get_format(name).name for name in args.formats.split(','))]
    from transformers import AutoTokenizer
    model = chosen_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [ids for seed in range(args.sets) for ids in make_prompts(tokenizer, seed)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(formats)) as pool:
        jobs = [pool.submit(ask, policy, model, prompts, Path(folder)) for policy in formats]
        errors = [job.exception() for job in jobs]
        if isinstance(errors[0], EngineError):
            print(f'LMDeploy\'s bf16 cache does not run with dp={RANKS}, tp={RANKS} here: {errors[0]}\n{errors[0].log}')
            return UNSUPPORTED
        rows = list(pool.map(lambda item: confirm(item[0], model, prompts, item[1].result()), zip(formats, jobs)))
    failed = verdicts(rows)
    print_table(rows, list(rows[0]))
    print(write_results('dp', rows, args.out, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
