"""A real LMDeploy engine in a process of its own, asked for timed rounds of requests by bench_engine and bench_prefill.

The process imports LMDeploy, waits for an engine's specification on its standard input, then for rounds, one JSON
object a line, and answers each with one line. So several engines can wait, warm, while one of them is measured.
Requests are token ids given to the engine's own instances (``EngineInstance.async_stream_infer``, what LMDeploy's
pipeline and server call); no text is made of the answers, so the tokenizer's vocabulary does not matter.

What is measured, and where:

* A step's time comes from the time stamps that the engine's model agent puts on every forward's tokens when they have
  reached the host (``BatchedOutputs.new_token_timestamp``), collected where the engine loop awaits them,
  ``executor.get_output_async``. That is one list append per step, works alike in one process, mp and Ray, and sees
  every step, while clients may receive two tokens at once. A step counts if every request of the round got a token in
  it. The agent looks for results every millisecond, so single steps are quantized; ``step_ms`` is the median over
  windows of 16 steps, in which that is 0.06 ms.
* ``forward_ms`` is the GPU's time between two CUDA events around the model's forward of those steps (one GPU only):
  the decoder layers without logits and sampling. Much less than ``step_ms`` means that something else holds the step.
* A time to first token is what a client waits: from the submission of the round to the first token it receives.
* ``peak_extra_bytes`` is what PyTorch allocated in the engine's process at most during the round, beyond what was
  allocated before it (one GPU only: LMDeploy's executor for one GPU runs in the engine's process).
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WINDOW = 16  # steps
GRACE = 12  # seconds to end in good order
_ENV = {
    'LMDEPLOY_ENABLE_CHECK_ENV': '0',  # ten seconds of imports in yet another process
    'TQDM_DISABLE': '1', 'TOKENIZERS_PARALLELISM': 'false',
}


def parse_policy(text: str) -> tuple[str, int]:
    """(contender, policy number) of ``none``, a name of this package's formats, or ``lmdeploy:NUMBER``.

    Raises:
        ValueError: neither; lists what exists.
    """
    from lmdeploy_kvq import get_format
    kind, _, number = text.rpartition(':')
    if text == 'none':
        return 'lmdeploy', 0
    return ('lmdeploy', int(number)) if kind == 'lmdeploy' else ('kvq', get_format(text).policy)


class EngineError(RuntimeError):
    """The engine failed, or was too slow; says which policy, and why."""


class TimedEngine:
    """One engine's process. Use as a context manager, or call :meth:`close`.

    Args:
        policy: as :func:`parse_policy` takes it. LMDeploy's own policies run with this package switched off.
        limit: seconds for everything it does from :meth:`open` on, after which it is stopped.
    """

    def __init__(self, policy: str, limit: float):
        self.name, self.limit, self.deadline = policy, limit, float('inf')
        self.contender, self.policy = parse_policy(policy)
        self._closed = False
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            start_new_session=True, env={**os.environ, **_ENV, 'LMDEPLOY_KVQ': str(int(self.contender == 'kvq'))})
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> TimedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open(self, model: str | Path, **engine: object) -> dict:
        """Start the engine with further PytorchEngineConfig arguments; its cache's size and the seconds it took."""
        self.deadline = time.monotonic() + self.limit
        return self.ask(model=str(model), quant_policy=self.policy, engine=engine)

    def ask(self, **command: object) -> dict:
        """Send one line and wait for its answer.

        Raises:
            EngineError: the engine answered with an error, ended, or passed its time limit.
        """
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._answers.get(timeout=max(0.0, self.deadline - time.monotonic())
                                     if self.deadline < float('inf') else None)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            raise EngineError(f'{self.name}: not done after {self.limit:.0f} s\n{self._tail()}') from None
        if line is None:
            time.sleep(1)  # for its exit status
            raise EngineError(f'{self.name}: ended with exit status {self._process.poll()}\n{self._tail()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise EngineError(f'{self.name}: {answer["error"]}\n{self._tail()}')
        return answer

    def close(self) -> None:
        """Stop the engine and the workers it started; the second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()  # the end of its input: it closes the engine and ends
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _tail(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors='replace')[-4000:]


def decode_phase(steps: list[tuple[float, int]], requests: int, new_tokens: int) -> dict[str, float]:
    """Step times of the phase in which all requests decode.

    Args:
        steps: (seconds, sequences that got a token) of every forward. requests: of the round. new_tokens: of each.

    Returns:
        steps: how many; step_ms: median over windows of 16 steps; decode_tokens_per_s: over the whole phase.

    Raises:
        ValueError: fewer than three such steps.
    """
    full = [seconds for seconds, sequences in steps if sequences == requests]
    if len(full) == new_tokens:  # one prefill held all requests, and is no decode step
        full = full[1:]
    if len(full) < 3:
        raise ValueError(f'{len(full)} steps in which all {requests} requests decode, of {len(steps)} steps: does the '
                         'cache hold them, and is max_batch_size large enough?')
    window = min(WINDOW, len(full) - 1)
    return {'steps': len(full) - 1,
            'step_ms': 1e3 * statistics.median((b - a) / window for a, b in zip(full, full[window:])),
            'decode_tokens_per_s': requests * (len(full) - 1) / (full[-1] - full[0])}


# --- the engine's process -------------------------------------------------------------------------------------------


class Probe:
    """Collects what one engine does: see the module's docstring."""

    def __init__(self, executor):
        self.steps: list[tuple[float, int]] = []
        self.forwards: list[tuple[int, object, object]] = []
        self.agent = getattr(executor, 'model_agent', None)  # the executor of one GPU has it in this process
        receive = executor.get_output_async

        async def get_output_async(*args, **kwargs):
            out = await receive(*args, **kwargs)
            tokens = getattr(out, 'next_token_ids', None)
            if tokens is not None:
                self.steps.append((float(out.new_token_timestamp), len(tokens)))
            return out

        executor.get_output_async = get_output_async
        if self.agent is not None:
            self._time_forwards()

    def _time_forwards(self) -> None:
        import torch
        forward = self.agent._forward_impl

        def timed(inputs, *args, **kwargs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(self.agent.stream)
            output = forward(inputs, *args, **kwargs)
            end.record(self.agent.stream)
            if inputs.is_decoding:
                self.forwards.append((inputs.seq_length.size(0), start, end))
            return output

        self.agent._forward_impl = timed

    def reset(self) -> None:
        """Forget earlier rounds."""
        import torch
        self.steps.clear()
        self.forwards.clear()
        if self.agent is not None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def report(self, requests: int) -> dict:
        """Of the round since :meth:`reset`."""
        import torch
        if self.agent is None:
            return {'steps': self.steps, 'forward_ms': None, 'peak_extra_bytes': None}
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for size, start, end in self.forwards if size == requests]
        return {'steps': self.steps, 'forward_ms': statistics.median(times) if times else None,
                'peak_extra_bytes': torch.cuda.max_memory_allocated() - self.before}


def make_prompts(requests: int, length: int, seed: int, prefix: int, vocab_size: int) -> list[list[int]]:
    """Random token ids, different per request; the first ``prefix`` of each are the same for every seed and request."""
    import numpy as np
    shared = np.random.default_rng(0).integers(0, vocab_size, prefix)
    generator = np.random.default_rng(seed + 1)
    return [np.concatenate([shared, generator.integers(0, vocab_size, length - prefix)]).tolist()
            for _ in range(requests)]


async def timed_round(engine, probe: Probe, sessions, *, requests: int, length: int, new_tokens: int, seed: int,
                      prefix: int = 0) -> dict:
    """Submit all requests at once, greedy, to exactly ``new_tokens`` tokens each."""
    import asyncio

    from lmdeploy.messages import GenerationConfig, ResponseType
    prompts = make_prompts(requests, length, seed, prefix, engine.model_config.vocab_size)
    instances = [engine.create_instance() for _ in prompts]
    probe.reset()
    begin = time.time()

    async def one(instance, prompt):
        first = last = None
        tokens = cached = 0
        # greedy, as LMDeploy's pipeline states it to the engine
        config = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, top_k=1, temperature=1.0)
        async for out in instance.async_stream_infer(next(sessions), prompt, gen_config=config):
            if out.status not in (ResponseType.SUCCESS, ResponseType.FINISH):
                raise RuntimeError(f'a request of {length} tokens ended with {out.status}')
            if out.token_ids:
                last = time.time() - begin
                first = last if first is None else first
            tokens += len(out.token_ids)
            cached = out.req_metrics.cached_tokens if out.req_metrics else cached
        if tokens != new_tokens:
            raise RuntimeError(f'a request of {length} tokens ended after {tokens} of {new_tokens} new tokens')
        return first, last, cached

    done = await asyncio.gather(*map(one, instances, prompts))
    first, last, cached = zip(*done)
    return {'ttft_s': first, 'seconds': max(last), 'cached_tokens': cached, **probe.report(requests)}


def commands() -> Iterator[dict]:
    """Lines of standard input. When it ends, because the benchmark did, so does this process with all its workers."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(GRACE)  # to close the engine, unless a round hangs
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


def serve() -> None:
    """Answer the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever else prints goes to the log
    from lmdeploy import PytorchEngineConfig, pipeline
    from lmdeploy.pytorch.engine import Engine  # noqa: F401  imported before the clock of the engine's start runs

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    engine = pipe = None
    for command in commands():
        try:
            if engine is None:
                start = time.time()
                config = PytorchEngineConfig(quant_policy=command['quant_policy'], **command['engine'])
                pipe = pipeline(command['model'], backend_config=config, log_level='WARNING')
                engine = pipe.async_engine.engine
                probe, sessions, cache = Probe(engine.executor), itertools.count(1), engine.executor.cache_config
                answer(start_seconds=time.time() - start, num_gpu_blocks=cache.num_gpu_blocks,
                       block_size=cache.block_size, max_prefill_token_num=cache.max_prefill_token_num)
            else:
                answer(**pipe._run(coro=timed_round(engine, probe, sessions, **command)).result())
        except Exception as error:
            import traceback
            traceback.print_exc()
            answer(error=f'{type(error).__name__}: {error}')
    if pipe is not None:
        pipe.close()
    os._exit(0)  # engine threads may still hold CUDA graphs; the answers are out


if __name__ == '__main__':
    serve()
