#!/usr/bin/env python3
"""Features of the engine, with each cache: what one engine answers, another one without the feature has to confirm.

  scripts/features_check.py [--groups blocks,cache,chunks,piecewise] [--formats NAME,NAME] [--jobs N] [--out FOLDER]

Groups: ``blocks``: block sizes 16 to 256, kernel blocks smaller than blocks; ``cache``: prefix caching in a pool that
does not hold the prompts, with requests aborted and cancelled in mid-stream; ``chunks``: chunked prefill, in the engine
of another process; ``piecewise``: CUDA graphs of prefill, with and without history.

Every answer is read in one prefill by a plain engine of the same format (prefill reads the cache everywhere, so that
history changes nothing), which says how far each token is from the one it finds likeliest. Those gaps are what another
order of summation makes: at most twice the largest of the same format's plain engine, or of bf16 in the same case. The
control, answers that belong to other prompts, shows what a wrong page would do. Writes features.json; exit code 1 if
anything fails. One GPU, about two minutes.
"""
from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchlib import print_table, write_results
from eval_engine import probe
from random_models import write_sharp
from smollm2 import chosen_model

from lmdeploy_kvq import get_format
from lmdeploy_kvq.texts import built_in

Key = TypeVar('Key', bound=Hashable)
PROGRAM = (str(Path(__file__).with_name('engine_process.py')), )
ENV = {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_ENABLE_CHECK_ENV': '0', 'TQDM_DISABLE': '1'}
NEW_TOKENS = 24
SLACK = 0.25  # of log-probabilities: two steps of a bf16 logit of 16 to 32
CONTROL = 3.0  # an answer to another prompt is at least this far from likely
BATCH = 8
PLAIN = {'session_len': 2048, 'max_batch_size': BATCH, 'cudagraph_capture_batch_sizes': [BATCH]}
POOL = 160  # blocks of 64 tokens: more than the prompts of a batch need
SMALL = 48  # fewer than eight long requests need, and a third of what the prompts leave behind


@dataclass(frozen=True)
class Case:
    """One way of running the engine.

    Attributes:
        group: what ``--groups`` names it by. model: ``smollm2``, or one that :func:`write_sharp` writes.
        engine: further arguments of PytorchEngineConfig. bf16: LMDeploy's own cache is a row too.
    """
    group: str
    engine: dict = field(default_factory=dict)
    model: str = 'smollm2'
    scenario: str = 'answers'
    bf16: bool = False


def blocks(size: int, kernel: int | None = None, **engine: object) -> dict:
    """Engine arguments of a block size; whatever it is, the pool has as many tokens."""
    return {'block_size': size, 'kernel_block_size': kernel or size, 'num_gpu_blocks': POOL * 64 // size, **engine}


CASES = {
    'plain': Case('', blocks(64), bf16=True),
    **{f'blocks of {size}': Case('blocks', blocks(size)) for size in (16, 32, 128, 256)},
    # a prompt holds more than a quarter of the pool, where LMDeploy's own tables would cut it off: backends/tables.py
    'blocks of 64 in kernel blocks of 16': Case('blocks', blocks(64, 16, num_gpu_blocks=30)),
    'blocks of 256 in kernel blocks of 64': Case('blocks', blocks(256, 64)),
    'small pool': Case('cache', {'num_gpu_blocks': SMALL, 'enable_prefix_caching': True}, scenario='pressure',
                       bf16=True),
    'mp engine, chunks': Case('chunks', blocks(64, enable_mp_engine=True, max_prefill_token_num=256), bf16=True),
    'qwen3': Case('piecewise', blocks(64), model='qwen3', bf16=True),
    # steps of at most 1,024 tokens, so that each finds its graph
    'qwen3, prefill graphs': Case('piecewise', blocks(64, enable_prefix_caching=True, max_prefill_token_num=1024,
                                                      piecewise_cudagraph_max_tokens=1024), model='qwen3', bf16=True),
}


def make_prompts(tokenizer, seed: int = 0) -> list[list[int]]:
    """24 prompts of 490 to 700 tokens, in six families that begin alike for seven blocks of 64."""
    ids, draw = tokenizer.encode('\n'.join(built_in().values())), random.Random(seed)
    begins = [ids[n * 800:n * 800 + 448] for n in range(6)]
    return [begin + ids[at:at + draw.randrange(42, 252)] for begin in begins
            for at in (draw.randrange(5000, len(ids) - 260) for _ in range(4))]


def make_rounds(tokenizer) -> list[list[list[int]]]:
    """The prompts in four orders: hits depend on what was evicted in between."""
    found, draw = make_prompts(tokenizer), random.Random(1)
    return [draw.sample(found, len(found)) for _ in range(4)]


def judge(model: Path | str, policy: str | int, engine: dict, answers: Mapping[Key, Sequence]) -> dict[Key, dict]:
    """What a fresh engine that reads the cache everywhere says of answers, which it reads in one prefill each.

    Args:
        engine: arguments of PytorchEngineConfig. answers: [prompt, answer] as token ids, in groups.

    Returns:
        Of each group ``answers``, how many; ``worst_gap``, of log-probabilities, from a token to the one found
        likeliest; ``likeliest``, the share of tokens that are that one; and ``control``, see engine_process.py.
    """
    found = probe({'model': str(model), 'quant_policy': policy, 'engine': engine, 'scenario': 'score',
                   'pairs': [pair for of in answers.values() for pair in of]}, ENV, 240, PROGRAM)
    gaps = iter(found['gaps'])
    each = {key: [next(gaps) for _ in of] for key, of in answers.items()}
    return {key: {'answers': len(of), 'worst_gap': max(gap['worst'] for gap in of),
                  'likeliest': sum(gap['agree'] for gap in of) / len(of), 'control': found['control']}
            for key, of in each.items()}


def run(formats: list[str], groups: list[str], jobs: int, work: Path) -> list[dict]:
    """A row per case and cache."""
    from transformers import AutoTokenizer
    smollm2 = chosen_model()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folders, rounds = {'smollm2': smollm2, 'qwen3': work / 'qwen3'}, make_rounds(tokenizer)
    if 'piecewise' in groups:
        write_sharp(folders['qwen3'], smollm2, 'qwen3')
        limit = 2000  # of its vocabulary
        sharp = [[[token % limit for token in ids] for ids in prompts] for prompts in rounds]
    chosen = {name: case for name, case in CASES.items() if case.group in ('', *groups)}
    keys = [(name, policy) for name, case in chosen.items() for policy in (['none'] if case.bf16 else []) + formats]

    def ask(key: tuple[str, str]) -> dict:
        case = chosen[key[0]]
        texts = rounds if case.model == 'smollm2' else sharp
        if case.scenario != 'pressure':  # scoring takes the vocabulary's logits of every position
            texts = texts[:2] if case.model == 'qwen3' else [texts[0][:12]]
        spec = {'model': str(folders[case.model]), 'quant_policy': key[1], 'engine': {**PLAIN, **case.engine},
                'scenario': case.scenario, 'rounds': texts, 'new_tokens': NEW_TOKENS}
        return probe(spec, ENV, 240, PROGRAM)

    def confirm(item: tuple[str, str]) -> dict[str, dict]:
        """What a plain engine of one model and cache says of all answers given with it."""
        model, policy = item
        return judge(folders[model], policy, {**PLAIN, **blocks(64)}, {
            name: done[name, policy]['pairs'] for name, case in chosen.items()
            if case.model == model and (name, policy) in done})

    with ThreadPoolExecutor(jobs) as pool:
        done = dict(zip(keys, pool.map(ask, keys)))
        models = list(dict.fromkeys((chosen[name].model, policy) for name, policy in keys))
        said = dict(zip(models, pool.map(confirm, models)))
    return [row(name, policy, done[name, policy], said[chosen[name].model, policy][name]) for name, policy in keys]


def row(name: str, policy: str, done: dict, said: dict) -> dict:
    """One case with one cache."""
    return {'case': name, 'format': policy, **said, 'cached_tokens': sum(done['cached']), 'seconds': done['seconds'],
            'start_seconds': done['start_seconds'],
            **{key: done[key] for key in ('replays', 'free', 'evicted', 'ended', 'asked') if key in done}}


def verdicts(rows: list[dict]) -> list[str]:
    """What is not as it should be."""
    worst = {(found['case'], found['format']): found['worst_gap'] for found in rows}
    failed = []
    for found in rows:
        case, policy = found['case'], found['format']
        plain = worst['qwen3' if CASES[case].model == 'qwen3' else 'plain', policy]
        limit = 2 * max(plain, worst.get((case, 'none'), 0.0)) + SLACK
        wrong = [text for text, bad in (
            (f'a token is {found["worst_gap"]:.2f} from likely, the limit is {limit:.2f}', found['worst_gap'] > limit),
            (f'the control is {found["control"]:.2f} from likely', found['control'] < max(CONTROL, limit)),
            ('nothing came from the prefix cache', 'pool' in case and not found['cached_tokens']),
            ('nothing was evicted', found.get('evicted') == 0),
            (f'free blocks: {found.get("free")}', len(set(found.get('free', []))) > 1),
            (f'{found.get("ended")} of {found.get("asked")} requests were cut short',
             found.get('ended') != found.get('asked')),
            ('no prefill graph was replayed', 'graphs' in case and not found['replays'])) if bad]
        failed += [f'{case}, {policy}: {text}' for text in wrong]
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--groups', default='blocks,cache,chunks,piecewise')
    parser.add_argument('--formats', default='fp8_per_token_head,int4_per_token_head')
    parser.add_argument('--jobs', type=int, default=12, help='engines at once (default: %(default)s)')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    groups, known = args.groups.split(','), {case.group for case in CASES.values()} - {''}
    if set(groups) - known:
        parser.error(f'unknown groups {sorted(set(groups) - known)}; known are {sorted(known)}')
    formats = [get_format(name).name for name in args.formats.split(',')]
    with tempfile.TemporaryDirectory() as work:
        rows = run(formats, groups, args.jobs, Path(work))
    failed = verdicts(rows)
    print_table(rows, ['case', 'format', 'answers', 'worst_gap', 'likeliest', 'control', 'cached_tokens', 'seconds'])
    print(write_results('features', rows, args.out, groups=groups, failed=failed), *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
