"""Measures caches through LMDeploy's engine on a GPU: a fresh engine, in a process of its own, per cache.

Prefill reads the quantized cache here (``LMDEPLOY_KVQ_PREFILL=cache``; LMDeploy's own policies always do): a prompt
without history is otherwise exact by design, and nothing would show.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .._autoload import OPT_OUT, SCALES
from ..accuracy import Scores
from ..console import UserError, first_line
from .material import Contender, Found, Material, Run

BATCH, BLOCK = 8, 64
PROGRAM = ('-m', 'lmdeploy_kvq.backends.probe')
LIMIT = 1800
"""Seconds after which an engine is given up."""


class EngineError(RuntimeError):
    """The engine failed or was too slow.

    Attributes:
        log: the end of what it printed.
    """

    def __init__(self, message: str, log: str = ''):
        super().__init__(message)
        self.log = log


def probe(spec: Mapping[str, Any], env: Mapping[str, str] | None = None, limit: float = LIMIT,
          program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """Run :mod:`lmdeploy_kvq.backends.probe`, or another such program, in a fresh process that ends with this one.

    Args:
        spec: what it is to do. env: further environment variables. limit: seconds.
        program: arguments of Python; two are added, the files of specification and answer.

    Returns:
        Its answer.

    Raises:
        EngineError: it failed; the message is one line.
    """
    with tempfile.TemporaryDirectory() as folder, Path(folder, 'log').open('w+', errors='replace') as log:
        question, answer = Path(folder, 'spec.json'), Path(folder, 'answer.json')
        question.write_text(json.dumps({**spec, 'parent': os.getpid()}), encoding='utf-8')
        command = [sys.executable, *program, str(question), str(answer)]
        late = ''
        # its output goes to a file: workers that outlive it would keep a pipe open
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **(env or {})})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f'not done after {limit:.0f} s'
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the workers it may have left
            code = process.wait()
        log.seek(0)
        text = log.read()[-8000:]
        found = json.loads(answer.read_text(encoding='utf-8')) if answer.exists() and not late else {}
    if not found or 'error' in found:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), '')
        raise EngineError(found.get('error') or late or f'exit code {code}: {first_line(last)}', text)
    return found


def run(folder: str, material: Material, contenders: Sequence[Contender], done: Callable[[int], None], tp: int = 1,
        jobs: int = 1) -> list[Run]:
    """Measure every contender, each in an engine of its own.

    Args:
        folder: the model.
        material: what to measure on.
        contenders: the first is the unquantized cache, and runs first.
        done: called with 1 for every contender.
        tp: GPUs of tensor parallelism. jobs: engines at once after the first, on the same GPU.

    Returns:
        One per contender; an engine that failed has only an error.

    Raises:
        UserError: LMDeploy cannot run the model unquantized.
    """
    with tempfile.TemporaryDirectory() as work:
        reference = Path(work, 'reference.pt')

        def one(number: int) -> Run:
            try:
                found = _measure(folder, material, contenders[number], number, Path(work), reference, tp)
            except EngineError as error:
                if number == 0:
                    raise UserError(f'LMDeploy cannot run {folder}: {error}') from error
                found = Run(error=str(error))
            done(1)
            return found

        runs = [one(0)]
        with ThreadPoolExecutor(jobs) as pool:
            runs += pool.map(one, range(1, len(contenders)))
    return runs


def _measure(folder: str, material: Material, contender: Contender, number: int, work: Path, reference: Path,
             tp: int) -> Run:
    scores = work / f'{number}.pt'
    session = material.longest + material.new_tokens + 2 * BLOCK
    blocks = BATCH * -(-session // BLOCK) + 2 * BLOCK
    spec = {
        'model': folder, 'quant_policy': contender.policy,
        # another pool for each: the repetition of the unquantized cache is not to find the same addresses
        'engine': {'num_gpu_blocks': blocks + number, 'session_len': session, 'max_batch_size': BATCH, 'tp': tp},
        'prompts': material.prompts, 'new_tokens': material.new_tokens,
        'score_generated': bool(material.prompts),
        'questions': [needle.prompt for needle in material.needles],
        'answer_tokens': max([len(needle.answer_ids) + 4 for needle in material.needles], default=0),
        'passages': [passage.ids for passage in material.passages], 'scores': str(scores),
        **({'reference': str(reference)} if number else {'out': str(reference)}),
        'ranked': [[needle.ids, len(needle.answer_ids)] for needle in material.needles],
    }
    return read(probe(spec, environment(contender)), material, scores)


def environment(contender: Contender) -> dict[str, str]:
    """Variables of a contender's process."""
    env = {'LMDEPLOY_KVQ_PREFILL': 'cache', OPT_OUT: str(int(not contender.stock))}
    return {**env, SCALES: os.path.abspath(contender.scales)} if contender.scales else env


def read(answer: Mapping[str, Any], material: Material, scores: Path) -> Run:
    """What a probe answered and wrote."""
    found = [Found(text.strip().startswith(needle.answer), places)
             for needle, text, places in zip(material.needles, answer.get('answers', []), answer.get('ranks', []))]
    block = (answer['block_bytes'], answer['block_size']) if 'block_bytes' in answer else None
    return Run(scores=[Scores(**fields) for fields in torch.load(scores)], found=found, block_bytes=block,
               decoding=answer.get('decode_against_prefill', []),
               tokens=answer['rounds'][0]['tokens'] if material.prompts else [])
