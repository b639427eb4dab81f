#!/usr/bin/env python3
"""The engine end to end, on a random-weight Llama of Llama-3.1-8B's shape: decode step, tokens per second, time to
first token, and how many tokens fit, per cache policy; writes engine.json.

A load is REQUESTSxTOKENS: that many requests at once, each of so many random tokens. Greedy, exactly --new-tokens
tokens each, CUDA graphs, no prefix caching. One fresh process per policy, one at a time on the GPU; how times are taken
stands in scripts/timed_engine.py. A policy that fails or passes its time limit is a row that says why.

  scripts/bench_engine.py                                       both loads, five policies, one GPU
  scripts/bench_engine.py --tp 2 --policies none,fp8_per_token_head --loads 64x8192
  scripts/bench_engine.py --layers 8 --new-tokens 64            a quick look
"""
from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchlib import add_vs_bf16, print_table, write_results
from random_llama import find_or_write
from targets import VERDICT, verdicts
from timed_engine import EngineError, TimedEngine, decode_phase

LOADS = ('64x8192', '256x2048')
POLICIES = ('none', 'fp8_per_token_head', 'int8_per_token_head', 'fp8', 'lmdeploy:16')
COLUMNS = ('contender', 'policy', 'load', 'tp', 'step_ms', 'vs_bf16', 'forward_ms', 'decode_tokens_per_s',
           'tokens_per_s', 'ttft_s', 'prefill_s', 'num_gpu_blocks', 'start_seconds', 'error')
SHAPE = 'llama-3.1-8b'


def parse_load(text: str) -> tuple[int, int]:
    """(requests, tokens) of a load."""
    requests, tokens = map(int, text.split('x'))
    return requests, tokens


def measure(engine: TimedEngine, model: Path, args: argparse.Namespace) -> list[dict]:
    """One row per load; where the engine fails, the rows that it still owes say why."""
    rows: list[dict] = []
    common = {'contender': engine.contender, 'policy': engine.policy, 'shape': SHAPE, 'layers': args.layers,
              'tp': args.tp, 'new_tokens': args.new_tokens}
    loads = [parse_load(load) for load in args.loads]
    try:
        opened = engine.open(
            model, tp=args.tp, session_len=max(tokens for _, tokens in loads) + args.new_tokens + 64,
            max_batch_size=max(args.max_batch_size, *(requests for requests, _ in loads)),
            cudagraph_capture_batch_sizes=sorted({requests for requests, _ in loads}), enable_prefix_caching=False,
            distributed_executor_backend=args.executor if args.tp > 1 else None)
        for name, (requests, tokens) in zip(args.loads, loads):
            # compiles what a prefill of this load needs: LMDeploy's default puts 8,192 tokens into one forward
            engine.ask(requests=max(1, 8192 // tokens), length=tokens, new_tokens=8, seed=1)
            done = engine.ask(requests=requests, length=tokens, new_tokens=args.new_tokens, seed=0)
            phase = decode_phase(done['steps'], requests, args.new_tokens)
            rows.append({**common, 'load': name, **phase, 'forward_ms': done['forward_ms'],
                         'tokens_per_s': requests * args.new_tokens / done['seconds'],
                         'ttft_s': statistics.median(done['ttft_s']), 'prefill_s': max(done['ttft_s']),
                         'num_gpu_blocks': opened['num_gpu_blocks'], 'block_size': opened['block_size'],
                         'start_seconds': opened['start_seconds']})
            print(f'{engine.name} {name}: step {phase["step_ms"]:.2f} ms, {phase["decode_tokens_per_s"]:.0f} tokens/s, '
                  f'last prompt after {rows[-1]["prefill_s"]:.1f} s', flush=True)
    except (EngineError, ValueError) as error:
        print(error, flush=True)
        reason = str(error).splitlines()[0]
        rows += [{**common, 'load': name, 'error': reason} for name in args.loads[len(rows):]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (('loads', LOADS), ('policies', POLICIES)):
        parser.add_argument(f'--{flag}', type=lambda text: tuple(text.split(',')), default=default,
                            help=f'default {",".join(default)}')
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--new-tokens', type=int, default=128)
    parser.add_argument('--max-batch-size', type=int, default=256)
    parser.add_argument('--tp', type=int, default=1)
    parser.add_argument('--executor', choices=('ray', 'mp'), help='for --tp; default: what LMDeploy chooses (Ray)')
    parser.add_argument('--limit', type=float, default=110, help='seconds per policy (default 110)')
    parser.add_argument('--model', help='folder of the model, written if missing (default: in ~/models)')
    parser.add_argument('--name', default='engine', help='result file name')
    parser.add_argument('--out', type=Path, help='folder of the result file')
    args = parser.parse_args()
    engines = [TimedEngine(policy, args.limit) for policy in args.policies]  # all import LMDeploy while the first runs
    try:
        model = find_or_write(args.layers, args.model)
        rows: list[dict] = []
        for engine in engines:
            with engine:
                rows += measure(engine, model, args)
            add_vs_bf16(rows, 'step_ms', ('load', 'tp', 'layers'))
            path = write_results(args.name, rows, args.out)  # what is there if the rest is cut off
    finally:
        for engine in engines:
            engine.close()
    print_table(rows, COLUMNS)
    print_table(verdicts('engine', rows), VERDICT)
    print(path)


if __name__ == '__main__':
    main()
