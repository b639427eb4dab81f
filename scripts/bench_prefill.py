#!/usr/bin/env python3
"""Time to first token of one long prompt through the engine, and the memory it takes, against bf16; prefill.json.

Cases, of --length tokens each:
  whole    no history, one forward
  chunked  forwards of --chunk tokens, which find the earlier ones in the cache
  prefix   all but --tail tokens are in the prefix cache

The model has Llama-3.1-8B's shape and random weights. All policies of a case are resident on one GPU at the same time,
each in its process, and take turns: every round asks each of them once, another one first each time, so that clocks
and temperature are the same for all. ``ttft_s`` is the median over the rounds, ``spread`` their (largest - smallest) /
median, ``vs_bf16`` the median of the rounds' ratios, ``vs_bf16_min`` the ratio of the smallest times, and
``peak_extra_bytes`` what PyTorch allocated at most during a prefill beyond what the idle engine holds.

  scripts/bench_prefill.py
  scripts/bench_prefill.py --layers 8 --cases chunked --policies none,fp8_per_token_head
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchlib import print_table, write_results
from random_llama import find_or_write
from targets import VERDICT, verdicts
from timed_engine import EngineError, TimedEngine

CASES = ('whole', 'prefix', 'chunked')
POLICIES = ('none', 'fp8_per_token_head', 'int8_per_token_head')
COLUMNS = ('contender', 'policy', 'case', 'tokens', 'cached_tokens', 'ttft_s', 'ttft_min_s', 'spread', 'vs_bf16',
           'vs_bf16_min', 'peak_extra_gib', 'peak_vs_bf16', 'error')
SHAPE, BLOCK = 'llama-3.1-8b', 64


def summary(times: list[float], bf16: list[float] | None) -> dict:
    """Columns of a row from the seconds of its rounds and of bf16's, round by round."""
    middle = statistics.median(times)
    return {'ttft_s': middle, 'ttft_min_s': min(times), 'spread': (max(times) - min(times)) / middle,
            'rounds': len(times), 'vs_bf16': statistics.median(a / b for a, b in zip(times, bf16)) if bf16 else None,
            'vs_bf16_min': min(times) / min(bf16) if bf16 else None}


def take_turns(engines: list[TimedEngine], case: str, args: argparse.Namespace, failed: dict) -> dict[str, list[dict]]:
    """Answers per policy, one per round, after two rounds that are not counted (the first fills the prefix cache)."""
    prefix = args.length - args.tail if case == 'prefix' else 0
    answers: dict[str, list[dict]] = {engine.name: [] for engine in engines}
    for number in range(-2, args.rounds):
        for turn in range(len(engines)):
            engine = engines[(turn + number) % len(engines)]
            if engine.name in failed:
                continue
            try:
                done = engine.ask(requests=1, length=args.length, new_tokens=1, prefix=prefix,
                                  seed=100 * CASES.index(case) + number + 2)
                cached = done['cached_tokens'][0]
                if number >= 0 and not prefix - BLOCK <= cached <= prefix:
                    raise EngineError(f'{engine.name}: {cached} tokens came from the prefix cache, not {prefix}')
                if number >= 0:
                    answers[engine.name].append(done)
            except EngineError as error:
                failed[engine.name] = str(error).splitlines()[0]
                print(error, flush=True)
    return answers


def measure(cases: list[str], engine_args: dict, model: Path, args: argparse.Namespace) -> list[dict]:
    """Rows of the cases that engines of these arguments serve."""
    rows: list[dict] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(TimedEngine(policy, args.limit)) for policy in args.policies]

        def open_engine(engine: TimedEngine) -> None:
            try:
                found = engine.open(model, session_len=args.length + 256, max_batch_size=8, block_size=BLOCK,
                                    cudagraph_capture_batch_sizes=[8], num_gpu_blocks=3 * args.length // BLOCK,
                                    **engine_args)['max_prefill_token_num']
                if found != engine_args['max_prefill_token_num']:
                    raise EngineError(f'{engine.name}: for want of memory LMDeploy cut forwards to {found} tokens')
            except EngineError as error:
                failed[engine.name] = str(error).splitlines()[0]
                print(error, flush=True)

        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(open_engine, engines))
        for case in cases:
            answers = take_turns(engines, case, args, failed)
            times = {name: [done['ttft_s'][0] for done in each] for name, each in answers.items()}
            peaks = {name: max((done['peak_extra_bytes'] for done in each), default=None)
                     for name, each in answers.items()}
            for engine in engines:
                row = {'contender': engine.contender, 'policy': engine.policy, 'shape': SHAPE, 'layers': args.layers,
                       'case': case, 'tokens': args.length}
                if engine.name in failed:
                    rows.append({**row, 'error': failed[engine.name]})
                    continue
                bf16 = None if 'none' in failed else times.get('none')
                rows.append({**row, **summary(times[engine.name], bf16),
                             'cached_tokens': answers[engine.name][-1]['cached_tokens'][0],
                             'peak_extra_bytes': peaks[engine.name],
                             'peak_extra_gib': peaks[engine.name] / 2**30,
                             'peak_vs_bf16': peaks[engine.name] / peaks['none'] if bf16 else None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (('cases', CASES), ('policies', POLICIES)):
        parser.add_argument(f'--{flag}', type=lambda text: tuple(text.split(',')), default=default,
                            help=f'default {",".join(default)}')
    parser.add_argument('--length', type=int, default=32768)
    parser.add_argument('--chunk', type=int, default=8192)
    parser.add_argument('--tail', type=int, default=4096, help='tokens that are not in the prefix cache')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--limit', type=float, default=200, help='seconds for the engines of a case (default 200)')
    parser.add_argument('--model', help='folder of the model, written if missing (default: in ~/models)')
    parser.add_argument('--out', type=Path, help='folder of the result file')
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f'unknown cases {sorted(unknown)}; known are {", ".join(CASES)}')
    model = find_or_write(args.layers, args.model)
    rows: list[dict] = []
    whole = [case for case in args.cases if case != 'chunked']
    if whole:
        rows += measure(whole, {'max_prefill_token_num': args.length, 'enable_prefix_caching': 'prefix' in whole},
                        model, args)
    if 'chunked' in args.cases:
        rows += measure(['chunked'], {'max_prefill_token_num': args.chunk}, model, args)
    print_table(rows, COLUMNS)
    print_table(verdicts('prefill', rows), VERDICT)
    print(write_results('prefill', rows, args.out))


if __name__ == '__main__':
    main()
