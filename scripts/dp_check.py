#!/usr/bin/env python3
"""Data parallelism on two GPUs: each rank answers prompts of its own, and a plain engine has to confirm them.

  scripts/dp_check.py [--formats NAME,...] [--out FOLDER]

LMDeploy 0.18 with dp=2 and tp=2, as its launcher starts it: a server's engine per rank, attention whole on every GPU,
MLPs split over both. Here the engines run without the HTTP servers around them. An answer's tokens may be twice as far
from likely as those of a plain engine of the same format, see features_check.py. Writes dp.json; exit code 1 if a limit
is missed, 3 if LMDeploy's own bf16 cache does not run this way. Two GPUs, about a minute and a half.
"""
from __future__ import annotations

import argparse
import os
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


def ask(policy: str, model: Path, prompts: list[list[int]], work: Path) -> list[list]:
    """[prompt, answer] of all prompts, from both ranks at once.

    Raises:
        EngineError: a rank failed or was too slow.
    """
    done, port = [str(work / f'{policy}-{rank}') for rank in range(RANKS)], free_port()
    with ThreadPoolExecutor(RANKS) as pool:
        jobs = [pool.submit(probe, rank_spec(policy, rank, model, prompts, done), rank_env(rank, port), 150, PROGRAM)
                for rank in range(RANKS)]
        return [pair for job in jobs for pair in job.result()['pairs']]


def confirm(policy: str, model: Path, prompts: list[list[int]], pairs: list[list]) -> dict:
    """A plain engine's own answers and the ranks', as another plain engine sees them."""
    plain = {'model': str(model), 'quant_policy': policy, 'engine': {**PLAIN, **blocks(64)}}
    own = probe({**plain, 'scenario': 'answers', 'rounds': [prompts], 'new_tokens': NEW_TOKENS}, ENV, 150, PROGRAM)
    said = probe({**plain, 'scenario': 'score', 'pairs': own['pairs'] + pairs}, ENV, 150, PROGRAM)
    worst = [max(gap['worst'] for gap in part) for part in (said['gaps'][:len(prompts)], said['gaps'][len(prompts):])]
    return {'format': policy, 'answers': len(pairs), 'plain_gap': worst[0], 'worst_gap': worst[1],
            'control': said['control']}


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    return [f'{row["format"]}: a token is {row["worst_gap"]:.2f} from likely, with a plain engine '
            f'{row["plain_gap"]:.2f}, of another prompt\'s answer {row["control"]:.2f}' for row in rows
            if row['worst_gap'] > 2 * row['plain_gap'] + SLACK or row['control'] < CONTROL]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--formats', default='fp8_per_token_head,int4_per_token_head')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    formats = ['none', *(get_format(name).name for name in args.formats.split(','))]
    from transformers import AutoTokenizer
    model = chosen_model()
    prompts = make_prompts(AutoTokenizer.from_pretrained(model))
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
