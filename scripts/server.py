"""LMDeploy's stock API server as a context manager, and a small load over HTTP. Standard library only."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STOP = 5
"""Seconds in which a server may end by itself; on a GPU, 13 were not enough, and nothing is lost by killing it."""

_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a proxy cannot reach 127.0.0.1


def lmdeploy_command() -> list[str]:
    """``lmdeploy`` of this Python's environment, else of the PATH, else the same through ``python -c``."""
    beside = Path(sys.executable).with_name('lmdeploy')
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which('lmdeploy')
    return [found] if found else [sys.executable, '-c', 'from lmdeploy.cli import run; run()']


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


class Server:
    """``lmdeploy serve api_server MODEL ...`` on a free port of this machine, stopped when the ``with`` block ends.

    Attributes:
        command: what was run. url: where it listens. log: file with its output.
    """

    def __init__(self, model: str, arguments: Sequence[str], timeout: float = 400,
                 progress: Callable[[str], None] = print):
        port = free_port()
        self.command = [*lmdeploy_command(), 'serve', 'api_server', model, *arguments]
        # INFO, because the engine logs the size of its cache there
        self._command = [*self.command, '--server-name', '127.0.0.1', '--server-port', str(port), '--log-level', 'INFO']
        self.url = f'http://127.0.0.1:{port}'
        with tempfile.NamedTemporaryFile(prefix='lmdeploy-', suffix='.log', delete=False) as log:
            self.log = Path(log.name)
        self._timeout, self._progress = timeout, progress
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        """Start, and wait until it answers.

        Raises:
            RuntimeError: it ended or did not answer in time; carries the end of its log.
        """
        with self.log.open('wb') as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT,
                                             start_new_session=True)  # so that its workers can be stopped with it
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop; the log stays where something went wrong."""
        self.stop()
        if kind is None:
            self.log.unlink()

    def _wait(self) -> None:
        assert self._process is not None
        start = said = time.monotonic()
        while self._process.poll() is None and time.monotonic() - start < self._timeout:
            with contextlib.suppress(OSError, ValueError):  # URLError is an OSError: not listening yet
                self.get('/v1/models')
                return
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self._progress('the server is still starting')
            time.sleep(0.5)
        code = self._process.poll()
        what = f'did not answer within {self._timeout:.0f} s' if code is None else f'ended with exit code {code}'
        raise RuntimeError(f'the server {what}; the end of {self.log}:\n{self.tail()}')

    def stop(self) -> None:
        """End the server and its workers; does nothing when called again."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(STOP)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        finally:  # also reaches workers that outlived the server, and happens when Ctrl-C is pressed again
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def pid(self) -> int:
        """Process id of the server; its workers are below it."""
        assert self._process is not None
        return self._process.pid

    def exit_code(self, timeout: float) -> int | None:
        """Wait until the server has ended by itself; None if it has not."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return '\n'.join(self.log.read_text(errors='replace').splitlines()[-lines:])

    def get(self, path: str) -> dict:
        """JSON of a GET request."""
        with _OPEN(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, payload: dict, timeout: float = 300) -> dict:
        """JSON of a POST request.

        Raises:
            RuntimeError: the server refused; carries its answer.
        """
        request = urllib.request.Request(self.url + path, json.dumps(payload).encode(),
                                         {'Content-Type': 'application/json'})
        try:
            with _OPEN(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f'{path}: HTTP {error.code}: {error.read().decode(errors="replace")[:500]}') from None

    def model_name(self) -> str:
        """The name it serves the model under."""
        return self.get('/v1/models')['data'][0]['id']

    def ask(self, question: str, max_tokens: int = 60) -> str:
        """Answer of the chat endpoint, greedy."""
        reply = self.post('/v1/chat/completions', {
            'model': self.model_name(), 'messages': [{'role': 'user', 'content': question}], 'max_tokens': max_tokens,
            'temperature': 0})
        return reply['choices'][0]['message']['content'].strip()

    def load(self, requests: int, tokens: int) -> tuple[int, float]:
        """Send ``requests`` completions of ``tokens`` tokens each at once; returns tokens generated and seconds."""
        name = self.model_name()

        def one(number: int) -> int:
            reply = self.post('/v1/completions', {
                'model': name, 'prompt': f'Story number {number}. Once upon a time', 'max_tokens': tokens,
                'ignore_eos': True, 'temperature': 0})
            return reply['usage']['completion_tokens']

        start = time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            generated = sum(pool.map(one, range(requests)))
        return generated, time.perf_counter() - start

    def cache_blocks(self) -> dict[str, int]:
        """``num_gpu_blocks``, ``block_size`` and ``kernel_block_size`` (tokens), as the engine logged them.

        Raises:
            RuntimeError: the log does not say.
        """
        text = self.log.read_text(errors='replace')
        found = {name: re.findall(rf'CacheConfig\(.*?\b(?<!_){name}=(\d+)', text)
                 for name in ('num_gpu_blocks', 'block_size', 'kernel_block_size')}
        if not all(found.values()):
            raise RuntimeError(f'the engine did not log its CacheConfig; see {self.log}')
        return {name: int(values[-1]) for name, values in found.items()}
