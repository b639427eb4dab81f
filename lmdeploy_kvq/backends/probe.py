"""Runs one real engine in a process of its own and reports what it did: greedy text, prompt log-probabilities, cache.

    python -m lmdeploy_kvq.backends.probe SPEC.json ANSWER.json

SPEC.json has ``model`` (folder), ``quant_policy``, and, as wanted,

* ``engine``: further arguments of PytorchEngineConfig; ``log_level``;
* ``prompts`` (texts) with ``new_tokens``, continued greedily in ``batches`` (sizes: the first N prompts at once, one
  round after the other; default: all at once); ``score_generated``: compare them with prefill's predictions;
* ``questions`` (texts) with ``answer_tokens``: continued greedily too;
* ``passages`` (lists of token ids) scored, with ``out``: file for their log-probabilities, fp16 [tokens, vocabulary];
  ``reference``: such a file of another run, and ``scores``: file for what differs
  (:class:`~lmdeploy_kvq.accuracy.Scores`);
* ``ranked``: lists of [token ids, number of answer tokens at their end], for the answers' ranks;
* ``parent``: the process that waits for the answer; without it this one ends.

ANSWER.json has what was found, or ``error``: why there is nothing. Everything is generated before anything is scored:
asking LMDeploy 0.18 for prompt logits disturbs later generations of the same engine.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..accuracy import Scores, gaps, ranks, score
from ..console import reason


def as_program(main: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be a program that :func:`~lmdeploy_kvq.evaluation.through_engine.probe` runs: SPEC.json to ANSWER.json, and exit.

    What ``main`` raises is the answer's ``error``; its traceback goes to the log.
    """
    try:
        spec = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
        if 'parent' in spec:
            threading.Thread(target=_end_with, args=(spec['parent'], ), daemon=True).start()
        result = main(spec)
    except Exception as error:
        import traceback
        traceback.print_exc()
        result = {'error': reason(error)}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding='utf-8')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engine threads may still hold CUDA graphs; the answer is out


def _end_with(parent: int) -> None:
    """Kill this process, and the workers of its session, once ``parent`` is gone: nobody else would free the GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, and do what the specification asks for."""
    from lmdeploy import PytorchEngineConfig, pipeline
    start = time.time()
    config = PytorchEngineConfig(quant_policy=spec.get('quant_policy', 0), **spec.get('engine', {}))
    pipe = pipeline(os.path.expanduser(spec['model']), backend_config=config,
                    log_level=spec.get('log_level', 'WARNING'))
    answer: dict[str, Any] = {'quant_policy': int(config.quant_policy), 'start_seconds': time.time() - start,
                              **_cache(pipe)}
    if spec.get('prompts'):
        answer['rounds'] = _rounds(pipe, spec)
        answer['prompt_ids'] = [pipe.async_engine.tokenizer.encode(p, add_bos=True) for p in spec['prompts']]
    if spec.get('questions'):
        answer['answers'] = [out.text for out in _generate(pipe, spec['questions'], spec['answer_tokens'])]
    if spec.get('score_generated'):
        answer['decode_against_prefill'] = [
            _agreement(_logits(pipe, ids + tokens)[len(ids) - 1:-1], tokens)
            for ids, tokens in zip(answer['prompt_ids'], answer['rounds'][0]['tokens'])]
    if spec.get('passages'):
        answer['perplexity'] = [float(found.nll.mean().exp()) for found in _score(pipe, spec)]
    if spec.get('ranked'):
        answer['ranks'] = [ranks(_logits(pipe, ids)[-count - 1:-1], ids[-count:]) for ids, count in spec['ranked']]
    pipe.close()
    return answer


def _cache(pipe: Any) -> dict[str, Any]:
    """Size of the cache, where the executor tells: blocks, tokens and bytes of one (all layers of one GPU)."""
    executor = getattr(pipe.async_engine.engine, 'executor', None)
    if executor is None:
        return {}
    config = executor.cache_config
    found = {'num_gpu_blocks': config.num_gpu_blocks, 'block_size': config.block_size}
    # the executor of one GPU has its model agent in this process
    plan = getattr(getattr(executor, 'model_agent', None), 'block_cache_plan', None)
    return found if plan is None else {**found, 'block_bytes': int(plan.logical_block_nbytes)}


def _generate(pipe: Any, prompts: list[str], new_tokens: int) -> list[Any]:
    from lmdeploy import GenerationConfig
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
    return pipe(prompts, gen_config=config, do_preprocess=False)


def _rounds(pipe: Any, spec: dict[str, Any]) -> list[dict[str, Any]]:
    rounds = []
    for size in spec.get('batches', [len(spec['prompts'])]):
        start = time.time()
        outputs = _generate(pipe, spec['prompts'][:size], spec.get('new_tokens', 32))
        rounds.append({'seconds': time.time() - start, 'text': [o.text for o in outputs],
                       'tokens': [o.token_ids for o in outputs], 'cached_tokens': [o.cached_tokens for o in outputs]})
    return rounds


def _logits(pipe: Any, ids: list[int]) -> torch.Tensor:
    """Predictions of every position, on the GPU where there is one: [tokens, vocabulary]."""
    logits = pipe._run(coro=pipe.async_engine.async_get_logits(input_ids=[ids])).result()[0]
    return logits.cuda() if torch.cuda.is_available() else logits


def _agreement(logits: torch.Tensor, tokens: list[int]) -> dict[str, float]:
    """How far generated tokens are from prefill's likeliest ones."""
    same = logits.float().argmax(-1) == torch.tensor(tokens, device=logits.device)
    return {'agreement': float(same.float().mean()), 'worst_gap': float(gaps(logits, tokens).max())}


def _score(pipe: Any, spec: dict[str, Any]) -> list[Scores]:
    """Score the passages, and write what the specification names."""
    # mapped: a vocabulary of 128k and 16k tokens are 4 GB
    references = torch.load(spec['reference'], mmap=True) if spec.get('reference') else None
    kept, found = [], []
    for number, ids in enumerate(spec['passages']):
        logits = _logits(pipe, ids)
        found.append(score(ids, logits, None if references is None else references[number]))
        if spec.get('out'):
            kept.append(logits.float().log_softmax(-1).half().cpu())
    if spec.get('out'):
        torch.save(kept, spec['out'])
    if spec.get('scores'):
        torch.save([vars(scores) for scores in found], spec['scores'])
    return found


if __name__ == '__main__':
    as_program(main)
