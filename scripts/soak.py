#!/usr/bin/env python3
"""The real server under a mixed random load, every answer checked; writes soak.json, exit code 1 if a check fails.

  scripts/soak.py --minutes 6 --parallel            three formats side by side on one GPU: about nine minutes, and up to
                                                    ten more for what rounding.py is asked
  scripts/soak.py --seed 1 ...                      other prompts and requests; soak_seed_1.json
  scripts/soak.py --requests 10000 --parallel       short requests: device memory must not grow; soak_requests.json

Per format: LMDeploy's server with prefix caching and a cache of --pool-tokens tokens, of which the load needs more than
there are, so that pages are evicted and used again. Every prompt is answered once by itself (greedy; the reference),
then --concurrency clients send prompts in random order for --minutes, streamed or not, and hang up on some. Checked are
every answer, against its reference by the limits that soak_checks.py states; errors; and that no block leaks: at the
end no block belongs to a request, and a prompt that needs all but a few blocks is answered as before the load. The
answers farthest from their references are in the file, with what their prompts say by themselves after the load, and
those beyond the limit with what transformers makes of them (rounding.py).
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import gpu_memory
from benchlib import print_table, write_results
from server import Server
from smollm2 import HOME, find_or_convert
from soak_checks import (
    MOST_RARE,
    Kind,
    came_by,
    deviation,
    explained,
    farthest,
    gap_limit,
    growth,
    judge,
    rare,
    score,
    speed,
)
from soak_load import Answer, Prompt, Request, ask_one, load, make_prompts, make_requests, references

from lmdeploy_kvq import get_format
from lmdeploy_kvq.texts import built_in, tokenize

WARM_UP = 20.0  # seconds of load before memory is watched
IDLE_LIMIT = 45.0  # seconds; the server takes its engine's metrics every ten
GAUGE = re.compile(r'^lmdeploy:(num_requests_running|num_requests_waiting|gpu_cache_usage_perc)\{.*\} (\S+)$', re.M)
SPARES = (8, 64, 256)
"""Blocks that a prompt which takes all others may leave: the first of these that works before the load."""

SHORT = {'prompts': 64, 'longest': 64, 'new_tokens': 8, 'pool_tokens': 16384}  # of --requests


@dataclass(frozen=True)
class Settings:
    """The command's options, with the names and meaning they have there."""
    model: str
    minutes: float
    requests: int
    concurrency: int
    prompts: int
    longest: int
    new_tokens: int
    pool_tokens: int
    prefill: str
    seed: int

    @property
    def load_seconds(self) -> float:
        """Seconds of load after the warm-up."""
        return self.minutes * 60


def server_arguments(policy: str, settings: Settings) -> list[str]:
    """Options of ``lmdeploy serve api_server``."""
    return ['--backend', 'pytorch', '--quant-policy', policy, '--enable-prefix-caching',
            '--num-gpu-blocks', str(settings.pool_tokens // 64), '--cache-block-seq-len', '64',
            '--session-len', str(settings.pool_tokens + 64), '--max-batch-size', str(max(settings.concurrency, 8)),
            '--logprobs-mode', 'raw_logprobs', '--max-log-len', '16']


def all_prompts(settings: Settings) -> list[Prompt]:
    """The prompts of every format: the same ones."""
    text = tokenize(settings.model, '\n'.join(built_in().values()))
    return make_prompts(text, settings.prompts, settings.longest, settings.new_tokens, settings.seed)


def gauges(url: str) -> dict[str, float]:
    """The engine's figures from the metrics endpoint, the first of each name."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url + '/metrics/', timeout=30) as reply:
        found: dict[str, float] = {}
        for name, value in GAUGE.findall(reply.read().decode()):
            found.setdefault(name, float(value))
    return found


def blocks_in_use(url: str, blocks: int, settle: float = 11) -> int | None:
    """Blocks that belong to requests when all have ended; waits for them. None: the server does not say."""
    deadline, found = time.monotonic() + IDLE_LIMIT, {}
    time.sleep(settle)  # what the endpoint shows may be ten seconds old
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = gauges(url)
            if len(found) == 3 and not any(found.values()):
                return 0
        time.sleep(1)
    return round(found['gpu_cache_usage_perc'] * blocks) if 'gpu_cache_usage_perc' in found else None


def whole_cache(url: str, blocks: int, prompts: Sequence[Prompt]) -> bool:
    """Whether a prompt of so many blocks is answered: cached prefixes have to go for it, leaked blocks are missing."""
    ids = tuple(itertools.islice(itertools.cycle(itertools.chain.from_iterable(p.ids for p in prompts)), blocks * 64))
    answer = asyncio.run(ask_one(url, Prompt(ids, 1), limit=60))
    if answer.error:
        print(f'a prompt of {len(ids)} tokens: {answer.error}', flush=True)
    return answer.error is None


def ask_again(url: str, prompts: Sequence[Prompt], first: Sequence[Answer], answers: Sequence[Answer]) -> list[dict]:
    """The answers farthest from their references, and what the server says of them after the load, without company.

    ``again``: the gap of the prompt's answer; what is damaged in the cache stays, what the load did not. ``rescored``:
    what :func:`rescore` says, asked twice; the second time, all but the newest block comes from the prefix cache.
    """
    found = farthest(answers, dict(enumerate(first)))
    repeated = asyncio.run(references(url, [prompts[row['prompt']] for row in found]))
    for row, answer, *twice in zip(found, repeated, *(rescore(url, prompts, found) for _ in range(2))):
        row['prompt_tokens'] = len(prompts[row['prompt']].ids)
        row['again'] = None if answer.error else score(answer, first[row['prompt']]).gap
        row['rescored'] = twice
    return found


def rescore(url: str, prompts: Sequence[Prompt], rows: Sequence[dict]) -> list[float | None]:
    """How much less likely than the likeliest the server finds the token with which each answer left its reference,
    behind the tokens before it, read in one prefill. Where a page of the prefix cache is damaged, this is another
    number once the page is gone."""
    behind = [Prompt(prompts[row['prompt']].ids + tuple(row['answer'][:row['at']]), 1) for row in rows]
    return [None if one.error else score(Answer(Request(0), ids=[row['token']], logprobs=[0.0]), one).gap
            for row, one in zip(rows, asyncio.run(references(url, behind)))]


def meet(barrier: Barrier | None) -> None:
    """Wait for the other servers, so that all are under load at a time; not for those that failed."""
    if barrier is not None:
        with contextlib.suppress(BrokenBarrierError):
            barrier.wait(300)


def run_format(policy: str, settings: Settings, barrier: Barrier | None) -> tuple[dict, list[Answer], list[Answer]]:
    """Serve one format; its row, its references, and its answers under load. Runs in a process of its own."""
    os.environ['LMDEPLOY_KVQ_PREFILL'] = settings.prefill
    prompts, row = all_prompts(settings), {'format': policy}

    def say(text: str) -> None:
        print(f'[{time.strftime("%H:%M:%S")}] {policy}: {text}', flush=True)

    with Server(settings.model, server_arguments(policy, settings), timeout=240, progress=say) as server:
        pid, blocks = server.pid, server.cache_blocks()['num_gpu_blocks']
        row |= {'num_gpu_blocks': blocks, 'memory_start_mib': gpu_memory.used_mib(pid)[0],
                'memory_of': gpu_memory.used_mib(pid)[1]}
        say('references')
        first = asyncio.run(references(server.url, prompts))
        wrong = next((a.error for a in first if a.error), None)
        if wrong:
            raise RuntimeError(f'a prompt by itself is not answered: {wrong}')
        row['spare_blocks'] = next((n for n in SPARES if whole_cache(server.url, blocks - n, prompts)), None)
        requests = make_requests(prompts, settings.seed + 1)
        say('warming up')
        early = asyncio.run(load(server.url, prompts, requests, settings.concurrency, WARM_UP))
        meet(barrier)
        row['memory_warm_mib'] = gpu_memory.used_mib(pid)[0]
        say('load')
        count = settings.requests or None
        with gpu_memory.Samples(pid) as memory:
            answers = asyncio.run(load(server.url, prompts, itertools.islice(requests, count), settings.concurrency,
                                       settings.load_seconds))
        row |= speed(answers, [len(p.ids) for p in prompts])
        row['errors'] += sum(a.error is not None for a in early)
        row['first_error'] = next((a.error for a in [*early, *answers] if a.error), None)
        row['unfinished'] = max(settings.requests - len(answers), 0)
        say(f'{len(answers)} requests, {row["errors"]} errors; looking for leaked blocks')
        row['farthest'] = ask_again(server.url, prompts, first, early + answers)
        row['blocks_in_use'] = blocks_in_use(server.url, blocks)
        spare = SPARES[0] if row['spare_blocks'] is None else row['spare_blocks']
        row['whole_cache_after'] = whole_cache(server.url, blocks - spare, prompts)  # nothing of before is cached then
        for far, gap in zip(row['farthest'], rescore(server.url, prompts, row['farthest'])):
            far['rescored_afresh'] = gap
        row |= {'memory_end_mib': gpu_memory.used_mib(pid)[0], 'memory_growth_mib': growth(memory.rows)}
    return row, first, early + answers


def attempt(policy: str, settings: Settings, barrier: Barrier | None) -> tuple[dict, list[Answer], list[Answer]]:
    """:func:`run_format`; a server that fails is a row that says so."""
    try:
        return run_format(policy, settings, barrier)
    except Exception as error:  # every format has its row; the exit code tells
        if barrier is not None:
            barrier.abort()
        return {'format': policy, 'error': f'{type(error).__name__}: {error}'}, [], []


def explain(settings: Settings, policy: str, kinds: Mapping[Kind, int], first: Sequence[Answer],
            answers: Sequence[Answer]) -> list[dict]:
    """Rows of rounding.py, of answers too far from their references; none where those are too many kinds.

    The more often the load came by a text, the rarer is what it may find there, and the more copies are asked.
    """
    if not kinds or len(kinds) > MOST_RARE:
        return []
    from rounding import Rounding, copies_for  # the servers have ended: the GPU is free
    rounding, prompts, rows = Rounding(settings.model), all_prompts(settings), []
    for (prompt, text, token), count in kinds.items():
        own, *others = (other for _, other in first[prompt].top[len(text)])
        visits = len(came_by(answers, prompt, text))
        gap = score(Answer(Request(prompt), ids=[*text, token]), first[prompt]).gap
        try:
            found = rounding.explain(policy, prompts[prompt].ids, text, token, others, copies_for(visits),
                                     settings.prefill)
        except RuntimeError as error:  # of memory that somebody else has, for one: the run's figures must not go, too
            found = {'copies': 0, 'smallest_gap': None, 'median_gap': None, 'error': str(error)[:300]}
        rows.append({'prompt': prompt, 'at': len(text), 'token': token, 'own': own, 'text': text, 'answers': count,
                     'visits': visits, 'reference_gap': gap, **found})
        print(f'{policy}: {rows[-1]}', flush=True)
    return rows


def verdict(results: Sequence[tuple[dict, list[Answer], list[Answer]]],
            ask: Callable[..., list[dict]] | None = None) -> list[str]:
    """Complete the rows, bf16's the first; the sentences of all that failed.

    Args:
        results: of :func:`attempt`. ask: :func:`explain` without its first argument; without it, nothing is explained.
    """
    failed = [f'{row["format"]}: {row["error"]}' for row, _, _ in results if 'error' in row]
    base, base_references, base_answers = results[0]
    if 'error' in base:
        return failed
    floor = deviation(base_answers, dict(enumerate(base_references)))
    for row, first, answers in results:
        if 'error' in row:
            continue
        own = deviation(answers, dict(enumerate(first)))
        effect = None if row is base else deviation(first, dict(enumerate(base_references)))
        row |= {'compared': own.answers, 'equal_answers': own.equal, 'equal_prefix': own.prefix,
                'change': own.change, 'largest_gap': own.gap,
                'change_by_format': None if effect is None else effect.change,
                'gap_by_format': None if effect is None else effect.gap}
        for name in ('tokens_per_s', 'first_token_ms_p50', 'between_tokens_ms_p50', 'answer_ms_p50'):
            row[f'{name}_vs_bf16'] = row[name] / base[name] if row[name] and base[name] else None
        kinds = rare(answers, dict(enumerate(first)), gap_limit(floor, effect))
        row['rare'] = ask(row['format'], kinds, first, answers) if ask else []
        failed += judge(row, floor, effect, own, explained(row['rare'], len(kinds)))
    return failed


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str], Settings]:
    """Options, formats (bf16 first), and settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--formats', default='none,fp8_per_token_head,int4_per_token_head')
    parser.add_argument('--minutes', type=float, default=8.0, help='of load per format; the whole takes three more')
    parser.add_argument('--requests', type=int, default=0, help='short requests, as many; --minutes is their limit')
    parser.add_argument('--parallel', action='store_true', help='all servers at a time, on one GPU')
    parser.add_argument('--concurrency', type=int, default=48)
    parser.add_argument('--prompts', type=int, help='how many different ones (default: 160)')
    parser.add_argument('--longest', type=int, help='tokens of a prompt (default: 16384)')
    parser.add_argument('--new-tokens', type=int, help='tokens of an answer, at most (default: 128)')
    parser.add_argument('--pool-tokens', type=int, help='tokens of the cache (default: 131072)')
    parser.add_argument('--prefill', choices=('raw', 'cache'), default='raw', help='LMDEPLOY_KVQ_PREFILL')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args(argv)
    formats = [name if name == 'none' else get_format(name).name for name in args.formats.split(',')]
    if formats[0] != 'none' or len(set(formats)) < len(formats):
        parser.error('--formats: none (the bf16 cache) comes first, it is what the others are compared with; each once')
    sizes = SHORT if args.requests else {'prompts': 160, 'longest': 16384, 'new_tokens': 128, 'pool_tokens': 131072}
    sizes = {name: getattr(args, name) or size for name, size in sizes.items()}
    if sizes['longest'] + sizes['new_tokens'] > sizes['pool_tokens'] - 4 * 64:
        parser.error('--pool-tokens: the longest prompt with its answer must fit the cache')
    return args, formats, Settings(str(args.model.expanduser()), args.minutes, args.requests, args.concurrency,
                                   prefill=args.prefill, seed=args.seed, **sizes)


def main() -> int:
    args, formats, settings = parse()
    find_or_convert(Path(settings.model))
    began = time.monotonic()
    context = multiprocessing.get_context('spawn')  # each format's client has an interpreter of its own
    with context.Manager() as manager, \
            ProcessPoolExecutor(len(formats) if args.parallel else 1, mp_context=context) as pool:
        barrier = manager.Barrier(len(formats)) if args.parallel else None
        results = list(pool.map(attempt, formats, itertools.repeat(settings), itertools.repeat(barrier)))
    rows = [row for row, _, _ in results]

    def save(failed: list[str]) -> Path:
        name = 'soak_requests' if settings.requests else 'soak' + f'_seed_{settings.seed}' * bool(settings.seed)
        return write_results(name, rows, args.out, **vars(settings), parallel=args.parallel,
                             took_seconds=time.monotonic() - began, failed=failed)

    save(verdict(results))  # rare answers are asked about for minutes, and count as wrong until then
    failed = verdict(results, partial(explain, settings))
    path = save(failed)
    print_table(rows, ['format', 'requests', 'aborted', 'errors', 'rare_answers', 'wrong_answers', 'equal_answers',
                       'equal_prefix', 'change', 'limit', 'largest_gap', 'gap_limit', 'blocks_in_use',
                       'memory_growth_mib'])
    print_table(rows, ['format', 'tokens_per_s', 'requests_per_s', 'first_token_ms_p50', 'first_token_ms_p99',
                       'between_tokens_ms_p50', 'between_tokens_ms_p99', 'answer_ms_p50', 'answer_ms_p99',
                       'memory_start_mib', 'memory_warm_mib', 'memory_end_mib', 'spare_blocks'])
    print(path, *failed, sep='\n')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
