#!/usr/bin/env python3
"""One real engine in a process of its own, for the checks of features: what it did, as JSON.

  scripts/engine_process.py SPEC.json ANSWER.json

SPEC.json has ``model``, ``quant_policy``, ``engine`` (arguments of PytorchEngineConfig), ``scenario`` (a function of
this file) and its arguments. Requests are token ids, through AsyncEngine as the server's are. Everything is generated
before anything is scored: asking LMDeploy 0.18 for prompt logits disturbs later generations of the same engine.
"""
from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

TIMEOUT = 240  # seconds of one call into the engine


class Engine:
    """A pipeline, asked with token ids.

    Attributes:
        sizing: what the executor divided when it sized the cache: ``budgets`` (bytes of each rank) and ``block_bytes``.
        evicted: blocks that the prefix cache gave up.
        replays: prefills that replayed a piecewise graph.
    """

    def __init__(self, spec: dict[str, Any]):
        from lmdeploy import PytorchEngineConfig, pipeline
        self.sizing: dict[str, list[int]] = {}
        self.evicted = self.replays = 0
        self._watch()
        config = PytorchEngineConfig(quant_policy=spec.get('quant_policy', 0), **spec.get('engine', {}))
        self.pipe = pipeline(os.path.expanduser(spec['model']), backend_config=config,
                             log_level=spec.get('log_level', 'WARNING'))
        self.asynchronous = self.pipe.async_engine
        self.engine = self.asynchronous.engine

    def _watch(self) -> None:
        """Count what happens inside; nothing is changed. In an engine of another process nothing is seen."""
        from lmdeploy.pytorch.backends.cuda.graph_runner.piecewise import PiecewiseGraphManager
        from lmdeploy.pytorch.engine.executor.base import ExecutorBase
        from lmdeploy.pytorch.paging.block_trie.trie import BlockTrie
        size, evict, replay = ExecutorBase._update_num_gpu_blocks, BlockTrie.evict, PiecewiseGraphManager.replay

        def sized(executor, free_mems, cache_block_sizes, spec_cache_config):
            ratio = executor.cache_config.cache_max_entry_count
            self.sizing = {'budgets': [int(free * ratio) for free in free_mems],
                           'block_bytes': [sizes.total for sizes in cache_block_sizes]}
            return size(executor, free_mems, cache_block_sizes, spec_cache_config)

        def evicting(trie, max_num_blocks):
            done = evict(trie, max_num_blocks)
            self.evicted += done
            return done

        def replaying(manager, *args, **kwargs):
            self.replays += 1
            return replay(manager, *args, **kwargs)

        ExecutorBase._update_num_gpu_blocks, BlockTrie.evict = sized, evicting
        PiecewiseGraphManager.replay = replaying

    def run(self, coroutine: Any, timeout: float = TIMEOUT) -> Any:
        """The result of a coroutine in the engine's loop."""
        return self.pipe._run(coro=coroutine).result(timeout)

    def call(self, function: Any, *args: Any) -> Any:
        """The result of a function in the engine's loop."""
        return self.pipe._run(fn=lambda: function(*args)).result(TIMEOUT)

    async def stream(self, ids: Sequence[int], new_tokens: int, session: Any = None, watch: Any = None) -> dict:
        """One request, greedy, as the server makes it; ``watch`` is told the number of tokens after each."""
        from lmdeploy import GenerationConfig
        session = session or self.asynchronous.session_mgr.get()
        request = await self.asynchronous.preprocess(
            messages=None, input_ids=list(ids), session_id=session,
            gen_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True))
        found = {'tokens': [], 'cached': 0, 'reason': None}
        async for out in self.asynchronous.generate(request):
            found['tokens'] += out.token_ids or []
            found['cached'], found['reason'] = max(found['cached'], out.cached_tokens), out.finish_reason
            if watch is not None:
                watch(len(found['tokens']))
        return found

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict]:
        """All prompts at once; every answer has as many tokens as asked for."""
        async def everything():
            return await asyncio.gather(*(self.stream(ids, new_tokens) for ids in prompts))

        found = self.run(everything())
        short = [answer for answer in found if len(answer['tokens']) != new_tokens or answer['reason'] != 'length']
        if short:
            raise RuntimeError(f'{len(short)} of {len(found)} answers are no {new_tokens} tokens: {short[0]}')
        return found

    def logits(self, ids: Sequence[int]) -> Any:
        """Predictions of every position, float32 [tokens, vocabulary] on the GPU."""
        return self.run(self.asynchronous.async_get_logits(input_ids=[list(ids)]))[0].cuda().float()

    def free_blocks(self, patience: float = 10) -> int:
        """Blocks that nobody holds, once every session has ended; the prefix cache's are given back first."""
        scheduler = self.engine.scheduler

        def free() -> int:
            scheduler.block_trie.evict(scheduler.block_manager.num_gpu_blocks)
            return scheduler.block_manager.get_num_free_gpu_blocks()

        self.idle(patience)
        return self.call(free)

    def idle(self, patience: float = 10) -> bool:
        """Wait for every session to end; whether they have."""
        deadline = time.monotonic() + patience
        while self.call(lambda: len(self.engine.scheduler.sessions)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True


def agreement(engine: Engine, ids: list[int], tokens: list[int]) -> dict[str, float]:
    """How far an answer's tokens are from the likeliest ones, when prompt and answer are read in one prefill.

    Returns:
        worst, mean: of the gaps of log-probabilities. agree: the share of tokens that are the likeliest.
    """
    from lmdeploy_kvq.accuracy import gaps
    found = gaps(engine.logits(ids + tokens)[len(ids) - 1:-1], tokens)
    return {'worst': float(found.max()), 'mean': float(found.mean()), 'agree': float((found == 0).float().mean())}


# ---- scenarios


def answers(engine: Engine, spec: dict) -> dict:
    """The prompts of every round at once, one round after the other."""
    rounds = [engine.ask(prompts, spec['new_tokens']) for prompts in spec['rounds']]
    return {'pairs': [[ids, answer['tokens']] for prompts, found in zip(spec['rounds'], rounds)
                      for ids, answer in zip(prompts, found)],
            'cached': [sum(answer['cached'] for answer in found) for found in rounds], 'replays': engine.replays}


def one_of_many(engine: Engine, spec: dict) -> dict:
    """:func:`answers` of one data-parallel rank, and what the same ranks say of them, all at work until all are done.

    Returns:
        As :func:`answers`, and ``gaps``: of each answer, see :func:`agreement`.
    """
    found = answers(engine, spec)
    meet(spec, 'answered')
    found['gaps'] = [agreement(engine, ids, tokens) for ids, tokens in found['pairs']]
    meet(spec, 'scored')
    return found


def meet(spec: dict, when: str) -> None:
    """Wait for the other ranks; this one's engine keeps stepping, as theirs need it to.

    Raises:
        TimeoutError: one does not come.
    """
    paths = [Path(f'{path}-{when}') for path in spec['done']]
    paths[spec['engine']['dp_rank']].touch()
    deadline = time.monotonic() + TIMEOUT
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f'another rank has not {when}')
        time.sleep(0.1)


def pressure(engine: Engine, spec: dict) -> dict:
    """Rounds in a pool that does not hold them, with requests that end early, in every way, in between.

    Returns:
        As :func:`answers`, and ``free``: free blocks at first, after the rounds, after the ended requests, and at last;
        ``evicted``: blocks the prefix cache gave up for others; ``ended``: requests that were stopped in mid-stream.
    """
    free, ended = [engine.free_blocks()], 0
    engine.evicted = 0
    half = len(spec['rounds']) // 2
    first = answers(engine, {**spec, 'rounds': spec['rounds'][:half]})
    evicted = engine.evicted
    free.append(engine.free_blocks())
    for way in ('abort', 'cancel', 'all'):
        ended += engine.run(_stop_in_mid_stream(engine, spec['rounds'][0], way, spec.get('long', 400)))
    free.append(engine.free_blocks())
    last = answers(engine, {**spec, 'rounds': spec['rounds'][half:]})
    free.append(engine.free_blocks())
    return {'pairs': first['pairs'] + last['pairs'], 'cached': first['cached'] + last['cached'], 'free': free,
            'evicted': evicted, 'ended': ended, 'asked': 3 * min(len(spec['rounds'][0]), 8)}


async def _stop_in_mid_stream(engine: Engine, prompts: list[list[int]], way: str, long: int) -> int:
    """Eight long requests, stopped after a few tokens each, as a server does when a client leaves or all are aborted.

    Returns:
        How many of them were cut short.
    """
    tasks, aborts, counts, started = [], [], [0] * len(prompts[:8]), asyncio.Event()

    def watch(number: int, session: Any, count: int) -> None:
        before, counts[number] = counts[number], count
        if count < 3 + number or before >= 3 + number:  # one time only; several tokens may come at once
            return
        if way == 'all':
            started.set()
        elif way == 'abort':
            aborts.append(asyncio.create_task(session.async_abort()))
        else:
            asyncio.get_running_loop().call_soon(tasks[number].cancel)

    for number, ids in enumerate(prompts[:8]):
        session = engine.asynchronous.session_mgr.get()
        tasks.append(asyncio.create_task(engine.stream(ids, long, session, partial(watch, number, session))))
    if way == 'all':
        await asyncio.wait_for(started.wait(), 60)
        await engine.asynchronous.stop_all_session()
    await asyncio.wait(tasks, timeout=120)
    await asyncio.gather(*aborts)
    return sum(count < long for count in counts)


def stranger(ids: list[int], pairs: list[list]) -> list[int]:
    """An answer to a prompt that begins otherwise."""
    return next(tokens for other, tokens in reversed(pairs) if other[:64] != ids[:64])


def score(engine: Engine, spec: dict) -> dict:
    """Every answer against what this engine finds likeliest; the controls give a prompt another one's answer.

    Returns:
        gaps: of each answer, see :func:`agreement`. control: the smallest ``worst`` of four controls (of more, one is
        a sentence that a small model says of everything). mean_control: the median ``mean`` of eight.
    """
    pairs = spec['pairs']
    controls = [agreement(engine, ids, stranger(ids, pairs)) for ids, _ in pairs[:8]]
    return {'gaps': [agreement(engine, ids, tokens) for ids, tokens in pairs],
            'control': min(found['worst'] for found in controls[:4]),
            'mean_control': statistics.median(found['mean'] for found in controls)}


def memory(engine: Engine, spec: dict) -> dict:
    """How the cache was sized, what was allocated, and what the graphs' block tables take (one GPU)."""
    config, agent = engine.engine.executor.cache_config, engine.engine.executor.model_agent
    graphs = getattr(agent.patched_model, '_full_graph_runners', {}).values()
    return {**engine.sizing, 'num_gpu_blocks': config.num_gpu_blocks,
            'pool_bytes': sum(pool.tensor.nbytes for pool in agent.cache_engine.gpu_allocation.pools),
            'graphs': len(graphs), 'max_batches': config.max_batches,
            'table_bytes': sum(graph.meta.input_buffers['block_offsets'].nbytes for graph in graphs)}


def many(engine: Engine, spec: dict) -> dict:
    """``requests`` of random lengths, in batches of all lengths; what PyTorch holds of the GPU after every tenth.

    Returns:
        allocated, reserved: bytes, PyTorch's; the first is from after a tenth. free: blocks at first and at last.
    """
    import random

    import torch
    draw, found, free = random.Random(0), [], [engine.free_blocks()]
    for _tenth in range(10):
        for _batch in range(spec['requests'] // 10 // spec['batch']):
            lengths = [draw.randrange(1, spec['longest']) for _ in range(spec['batch'])]
            engine.ask([[draw.randrange(3, 2000) for _ in range(length)] for length in lengths], spec['new_tokens'])
        torch.cuda.synchronize()
        found.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    allocated, reserved = zip(*found)
    return {'allocated': allocated, 'reserved': reserved, 'free': [*free, engine.free_blocks()]}


def long_context(engine: Engine, spec: dict) -> dict:
    """Greedy tokens after the first prompt and the last, then log-probabilities of the last positions into ``out``."""
    import torch
    asked, keep = (spec['prompts'][0], spec['prompts'][-1]), spec['keep']
    tokens = [engine.ask([prompt], spec['new_tokens'])[0]['tokens'] for prompt in asked]
    kept = [engine.logits(ids)[-keep:].log_softmax(-1).half().cpu() for ids in spec['prompts']]
    torch.save(kept, spec['out'])
    return {'decode': [agreement(engine, *pair) for pair in zip(asked, tokens)]}


def read(engine: Engine, spec: dict) -> dict:
    """``first``, one after the other; then the prompts' answers, and log-probabilities of the prompts into ``out``."""
    import torch
    for ids in spec['first']:
        engine.ask([ids], 1)
    found = engine.ask(spec['prompts'], spec['new_tokens'])
    torch.save([engine.logits(ids).log_softmax(-1).half().cpu() for ids in spec['prompts']], spec['out'])
    return {'decode': [agreement(engine, ids, answer['tokens']) for ids, answer in zip(spec['prompts'], found)]}


def _send_weights(folder: str, pipe: Any) -> None:
    """A trainer's process: a checkpoint on the GPU, handed to LMDeploy's update_params as CUDA IPC handles."""
    from lmdeploy.utils import serialize_state_dict
    from safetensors.torch import load_file
    weights = load_file(Path(folder, 'model.safetensors'), device='cuda')
    for wanted in iter(pipe.recv, None):  # the tensors live as long as this process
        pipe.send(serialize_state_dict({name: weight for name, weight in weights.items()
                                        if wanted == 'all' or not name.endswith('_scale')}))


def update(engine: Engine, spec: dict) -> dict:
    """Serve; take another model's weights; sleep at level 1; at level 2, and take the weights again without scales.

    LMDeploy's executor for one process has no ``update_params``; the model agent's is what it calls in Ray's workers.

    Returns:
        The tokens after each, by ``start``, ``updated``, ``level 1``, ``level 2``.
    """
    import torch.multiprocessing as mp
    from lmdeploy.serve.openai.protocol import UpdateParamsRequest
    here, there = mp.get_context('spawn').Pipe()
    trainer = mp.get_context('spawn').Process(target=_send_weights, args=(spec['weights'], there), daemon=True)
    trainer.start()

    def load(which: str) -> None:
        here.send(which)
        if not here.poll(TIMEOUT):
            raise RuntimeError('the process with the weights says nothing')
        agent = engine.engine.executor.model_agent
        engine.call(agent.update_params, UpdateParamsRequest(serialized_named_tensors=here.recv(), finished=True))

    tokens = partial(one_by_one, engine, spec)
    found = {'start': tokens()}
    load('all')
    found['updated'] = tokens()
    engine.run(engine.asynchronous.sleep(1))
    engine.call(engine.asynchronous.wakeup)
    found['level 1'] = tokens()
    engine.run(engine.asynchronous.sleep(2))
    engine.call(engine.asynchronous.wakeup, ['weights'])
    load('weights')
    engine.call(engine.asynchronous.wakeup, ['kv_cache'])
    found['level 2'] = tokens()
    here.send(None)
    trainer.join(10)
    return {'tokens': found}


def one_by_one(engine: Engine, spec: dict) -> list[list[int]]:
    """The prompts' answers, one after the other: the same shapes in every engine, so the same sums to the last bit."""
    return [engine.ask([ids], spec['new_tokens'])[0]['tokens'] for ids in spec['prompts']]


def start(engine: Engine, spec: dict) -> dict:
    """Serve once."""
    return {'tokens': {'start': one_by_one(engine, spec)}}


SCENARIOS = (answers, one_of_many, pressure, score, memory, many, long_context, read, update, start)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and run its scenario."""
    scenario = {function.__name__: function for function in SCENARIOS}[spec['scenario']]
    if 'prompts_file' in spec:  # 128k tokens as JSON would take seconds
        import torch
        spec['prompts'] = [ids.tolist() for ids in torch.load(spec['prompts_file'])]
    start = time.time()
    engine = Engine(spec)
    ready = time.time()
    found = scenario(engine, spec)
    return {**found, 'start_seconds': ready - start, 'seconds': time.time() - ready}


if __name__ == '__main__':
    from lmdeploy_kvq.backends.probe import as_program
    as_program(main)
