"""Faults, load and sanitizers on a GPU, with the stock server: bounded, each test with servers of its own.

Runs SmolLM2-135M-Instruct from ``KVQ_MODEL`` (default ~/models/smollm2). Side by side: ``-n 4 --dist loadgroup``; the
tests of the group ``alone`` take all memory or time of the GPU, and are to run by themselves (``-m gpu -k alone``).
"""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import hostile
import pytest
import torch
from helpers import MODEL

import lmdeploy_kvq as kvq

pytestmark = pytest.mark.gpu
SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'

SESSION_LEN = 2048
SMALL = ['--session-len', str(SESSION_LEN), '--max-batch-size', '8', '--num-gpu-blocks', '400', '--logprobs-mode',
         'raw_logprobs', '--max-log-len', '16']
EIGHT_BITS = next(fmt for fmt in kvq.FORMATS if fmt.per_token_head)
FOUR_BITS = next(fmt for fmt in kvq.FORMATS if fmt.key.codec.bits == 4)


def serve(fmt, *arguments: str, model: str = MODEL, timeout: float = 200):
    from server import Server
    return Server(model, ['--quant-policy', fmt.name, *arguments], timeout=timeout)


def greedy(url: str) -> list[list[int]]:
    """Answers to a few prompts, one after another."""
    from soak_load import make_prompts, references
    answers = asyncio.run(references(url, make_prompts(range(100, 20_000), 6, 1024, 32, seed=2)))
    assert not [a.error for a in answers if a.error]
    return [a.ids for a in answers]


class Stream(threading.Thread):
    """A long completion, streamed.

    Attributes:
        pieces: how many events have come. ended: when it was over. text: what came last. error: what broke it, or None.
    """

    def __init__(self, url: str, model: str):
        super().__init__(daemon=True)
        self.parts, self.model = urlsplit(url), model
        self.pieces, self.ended, self.text, self.error = 0, None, '', None
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.parts.hostname, self.parts.port, timeout=120)
        body = {'model': self.model, 'prompt': 'Once upon a time', 'max_tokens': 1800, 'ignore_eos': True,
                'stream': True}
        try:
            connection.request('POST', hostile.COMPLETIONS, json.dumps(body), {'Content-Type': 'application/json'})
            for line in connection.getresponse():
                if line.strip():
                    self.pieces, self.text = self.pieces + 1, line.decode()
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        self.ended = time.monotonic()


def processes(pid: int, name: str) -> list[int]:
    """Processes below ``pid`` whose name begins so."""
    import gpu_memory
    found = []
    for child in gpu_memory.descendants(pid) - {pid}:
        with contextlib.suppress(OSError):
            if Path(f'/proc/{child}/comm').read_text().startswith(name):
                found.append(child)
    return found


def status(url: str, path: str = '/health') -> int:
    """HTTP status of a GET request; 0 where nobody listens."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        connection.request('GET', path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@pytest.mark.covers('fault.worker')
@pytest.mark.xdist_group('worker')
def test_the_engine_is_killed_while_it_decodes():
    """Streams end with an error, new requests get one, and so does health; a new server answers as before."""
    with serve(EIGHT_BITS, *SMALL) as server:
        before, model = greedy(server.url), server.model_name()
        streams = [Stream(server.url, model) for _ in range(3)]
        deadline = time.monotonic() + 60
        while min(s.pieces for s in streams) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        engine, = processes(server.pid, 'ZMQMPEngine')
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            stream.join(40)
            assert stream.ended is not None and stream.ended - killed < 40, 'a stream hangs'
            assert 20 <= stream.pieces < 1800
            assert stream.error is not None or 'error' in stream.text or 'DONE' in stream.text, stream.text
        code = server.exit_code(1)
        if code is None:  # it stays up, and says what it is worth
            answer, _ = hostile.send(server.url, hostile.COMPLETIONS, hostile.completion(model), hostile.JSON, 40)
            assert answer >= 500
            deadline = time.monotonic() + 40  # LMDeploy looks every twelve seconds
            while status(server.url) != 503 and time.monotonic() < deadline:
                time.sleep(1)
            assert status(server.url) == 503
        else:
            assert code != 0
    with serve(EIGHT_BITS, *SMALL) as server:
        assert greedy(server.url) == before


@pytest.mark.covers('fault.worker')
@pytest.mark.xdist_group('worker tp')
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_a_rank_is_killed_while_it_decodes(monkeypatch, tmp_path):
    """tp=2 through mp: within LMDeploy's patience, shortened here, the server ends or its health says so."""
    from tp_check import write_llama
    write_llama(str(tmp_path / 'llama'), MODEL)
    for name, value in (('UNHEALTHY_AFTER', '10'), ('POLL_INTERVAL', '4'), ('PROBE_TIMEOUT', '3')):
        monkeypatch.setenv(f'LMDEPLOY_HEALTH_{name}', value)
    with serve(EIGHT_BITS, *SMALL, '--tp', '2', '--distributed-executor-backend', 'mp',
               model=str(tmp_path / 'llama')) as server:
        stream = Stream(server.url, server.model_name())
        deadline = time.monotonic() + 60
        while stream.pieces < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        engine, = processes(server.pid, 'ZMQMPEngine')
        ranks = {pid for pid in processes(engine, '') if 'multiprocessing.spawn' in _command(pid)}
        os.kill(max(ranks), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.exit_code(0.5) is None and status(server.url) != 503 and time.monotonic() < deadline:
            time.sleep(1)
        assert server.exit_code(0.1) not in (None, 0) or status(server.url) == 503


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/cmdline').read_bytes().decode(errors='replace')
    return ''


@pytest.mark.covers('fault.hostile', 'feature.abort')
@pytest.mark.xdist_group('hostile')
@pytest.mark.parametrize('fmt', [EIGHT_BITS, FOUR_BITS], ids=lambda fmt: fmt.name)
def test_hostile_requests(fmt):
    """The server stays up, answers as before, and no block is left in use; also by clients that hang up."""
    from soak import blocks_in_use
    with serve(fmt, *SMALL) as server:
        before, model = greedy(server.url), server.model_name()
        streams = [subprocess.Popen([sys.executable, '-c', _HANG_UP, server.url, model]) for _ in range(4)]
        found = hostile.answers(server.url, model, SESSION_LEN, skip=hostile.ENGINE)
        assert [s.wait(60) for s in streams] == [0] * 4
        assert hostile.problems(found) == []
        assert {'max_tokens negative', 'prompt too long', 'bad UTF-8', '1 MB of nested lists', 'unknown model'} <= {
            name for name, (code, _) in found.items() if 400 <= code < 500}
        assert found['max_tokens absurd'][0] == 200
        assert greedy(server.url) == before and status(server.url) == 200
        assert blocks_in_use(server.url, 400) == 0


_HANG_UP = """
import http.client, json, sys
from urllib.parse import urlsplit
parts = urlsplit(sys.argv[1])
for number in range(8):
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.request('POST', '/v1/completions', json.dumps({
        'model': sys.argv[2], 'prompt': f'Story {number}', 'max_tokens': 1000, 'ignore_eos': True,
        'stream': number % 2 == 0}), {'Content-Type': 'application/json'})
    if number % 2 == 0:
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline()
    connection.close()
"""


def refused_start(*arguments: str, model: str = MODEL) -> str:
    """The log of a server that ends by itself, with an exit code other than 0."""
    with pytest.raises(RuntimeError, match=r'ended with exit code [^0]') as ended, \
            serve(EIGHT_BITS, *arguments, model=model):
        pytest.fail('the server answers')
    return Path(str(ended.value).partition('the end of ')[2].partition(':')[0]).read_text(errors='replace')


@pytest.mark.covers('fault.model_folder')
@pytest.mark.xdist_group('folders')
def test_the_server_ends_where_files_of_the_model_are_missing(tmp_path):
    """Exit code other than 0, and the log names what is missing."""
    damage = {'weights missing': (lambda f: [p.unlink() for p in f.glob('*.safetensors')], 'weight|safetensors|index'),
              'weights cut short': (lambda f: _cut(next(f.glob('*.safetensors'))), 'safetensor|header|metadata'),
              'tokenizer missing': (lambda f: [p.unlink() for p in f.glob('tok*')], 'tokenizer'),
              'config missing': (lambda f: (f / 'config.json').unlink(), 'config')}

    def start(name: str) -> str:
        folder = tmp_path / name.replace(' ', '-')
        folder.mkdir()
        for file in Path(MODEL).iterdir():
            (folder / file.name).symlink_to(file.resolve())
        damage[name][0](folder)
        return refused_start(*SMALL, model=str(folder))

    with ThreadPoolExecutor(len(damage)) as pool:
        for name, text in zip(damage, pool.map(start, damage)):
            assert re.search(damage[name][1], text, re.I), f'{name}: {text[-3000:]}'


def _cut(path: Path) -> None:
    """A copy in place of the link, without its last megabyte."""
    source = path.resolve()
    path.unlink()
    shutil.copy(source, path)
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size - 2**20)


@pytest.mark.covers('fault.memory')
@pytest.mark.xdist_group('alone')
def test_alone_memory_runs_out():
    """A second server takes what the first one leaves; where nothing is left, or too much is asked for, it ends."""
    large = ['--session-len', str(SESSION_LEN), '--max-batch-size', '8', '--logprobs-mode', 'raw_logprobs']

    with serve(EIGHT_BITS, *large) as first, serve(EIGHT_BITS, *large) as second:
        blocks = [server.cache_blocks()['num_gpu_blocks'] for server in (first, second)]
        assert 16 < blocks[1] < blocks[0] / 2
        before = greedy(first.url)
        assert greedy(second.url) == before
        text = refused_start(*SMALL[:4], '--num-gpu-blocks', str(2 * blocks[0]))
        assert 'out of memory' in text.lower()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(max(free - 3 * 2**29, 0), dtype=torch.uint8, device='cuda')
        text = refused_start(*large)
        assert 'out of memory' in text.lower() or 'No enough gpu memory' in text or 'max_prefill_token_num' in text
        del hog
        torch.cuda.empty_cache()
        assert greedy(first.url) == greedy(second.url) == before


def script(name: str, *arguments: str, timeout: float, out: Path) -> dict:
    """Run a script; its results. Fails with what it printed."""
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *arguments, '--out', str(out)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout[-4000:])
    return json.loads(next(out.glob('*.json')).read_text())


@pytest.mark.covers('load.soak', 'feature.eviction', 'feature.abort')
@pytest.mark.xdist_group('alone')
def test_alone_a_mixed_load(tmp_path):
    """A minute of what scripts/soak.py does for as long as it is given; the committed figures are of longer runs."""
    found = script('soak.py', '--model', MODEL, '--minutes', '1', '--prompts', '40', '--parallel', timeout=590,
                   out=tmp_path)
    assert len(found['rows']) == 3 and found['failed'] == []
    for row in found['rows']:
        assert row['aborted'] > 0 and row['whole_answers'] > 100 and row['errors'] == row['wrong_answers'] == 0


@pytest.mark.covers('load.pages', 'feature.prefix', 'feature.eviction')
@pytest.mark.parametrize('name', ['none', 'fp8_per_token_head', 'int4_per_token_head'])
def test_pages_hold_what_their_tokens_say(name, tmp_path):
    """Two rounds of scripts/page_audit.py: blocks that requests left in the prefix cache, all of them read again."""
    found = script('page_audit.py', '--model', MODEL, '--format', name, '--rounds', '2', '--seconds', '15', timeout=240,
                   out=tmp_path)
    assert len(found['rows']) == 2
    for row in found['rows']:
        assert row['aborted'] > 10 and row['compared'] > 1000 and row['compared'] > 0.9 * row['blocks']
        assert row['first_layer'] == row['left'] == 0 and row['median'] < 0.1 and row['p999'] < found['limit']


@pytest.mark.covers('memory.growth')
@pytest.mark.xdist_group('alone')
def test_alone_memory_does_not_grow(tmp_path):
    """10,000 requests per format."""
    found = script('soak.py', '--model', MODEL, '--requests', '10000', '--minutes', '5', '--parallel', timeout=560,
                   out=tmp_path)
    assert found['failed'] == [] and all(row['requests'] == 10_000 for row in found['rows'])


@pytest.mark.covers('fault.sanitizer')
@pytest.mark.xdist_group('alone')
def test_alone_sanitizers(tmp_path):
    """memcheck and racecheck over every kernel and format."""
    from sanitize import find_sanitizer
    if find_sanitizer() is None:
        pytest.skip('there is no compute-sanitizer')
    found = script('sanitize.py', '--log', str(tmp_path / 'logs'), timeout=590, out=tmp_path)
    assert len(found['rows']) == 2 * len(kvq.FORMATS) and all(row['ok'] for row in found['rows'])
