"""LMDeploy's server on a CPU (see cpu_server.py): the client of scripts/soak.py, a run, lm-eval, hostile requests."""
from __future__ import annotations

import asyncio
import functools
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import hostile
import pytest
from helpers import clean_environment

pytest.importorskip('transformers', minversion='5')
pytest.importorskip('aiohttp')
import soak
import soak_checks as checks
import soak_load as load
from soak_load import Answer, Prompt, Request
from test_calibrate import folder as small_model  # noqa: F401  a fixture: a small Llama with a tokenizer
from test_eval_tasks import QUESTIONS
from test_eval_tasks import task as lm_eval_task  # noqa: F401  a fixture: writes a task

HERE = Path(__file__).resolve().parent
SESSION_LEN = 160


@pytest.fixture(scope='module')
def url(small_model, tmp_path_factory):  # noqa: F811
    """A server that answers."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp('server') / 'log'
    command = [sys.executable, str(HERE / 'cpu_server.py'), str(small_model), str(port), str(SESSION_LEN)]
    with log.open('w') as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=clean_environment())
    url, deadline = f'http://127.0.0.1:{port}', time.monotonic() + 150
    try:
        while True:
            try:
                with urllib.request.urlopen(url + '/v1/models', timeout=5) as answer:
                    assert json.load(answer)['data']
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        yield url
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope='module')
def prompts() -> list[Prompt]:
    return load.make_prompts(range(3, 250), 12, 100, 20, seed=0)


@pytest.fixture(scope='module')
def references(url, prompts) -> list[Answer]:
    return asyncio.run(load.references(url, prompts))


# ---- the client, against LMDeploy's HTTP layer


def test_references_are_whole(references, prompts):
    """Greedy tokens, the log-probability of each, and the likeliest ones, of which the token itself is the first."""
    for answer, prompt in zip(references, prompts, strict=True):
        assert answer.error is None and answer.finish == 'length' and len(answer.ids) == prompt.new_tokens
        assert len(answer.logprobs) == len(answer.top) == prompt.new_tokens and answer.seconds > 0
        for token, value, row in zip(answer.ids, answer.logprobs, answer.top, strict=True):
            assert row[0] == (value, token) and len(row) == load.TOP and row == sorted(row, reverse=True)


def test_a_load_is_answered_as_by_itself(url, prompts, references):
    """Streamed, whole and broken off: this server runs one request at a time, so that nothing may differ."""
    requests = itertools.islice(load.make_requests(prompts, seed=1), 60)
    answers = asyncio.run(load.load(url, prompts, requests, 6, 60))
    assert len(answers) == 60 and not [a.error for a in answers if a.error]
    kinds = {(a.request.stream, a.aborted) for a in answers}
    assert kinds >= {(True, False), (False, False), (True, True)}
    found = checks.deviation(answers, dict(enumerate(references)))
    assert found.equal == found.prefix == 1 and found.change < 1e-5 and found.gaps == () and found.answers > 40
    speed = checks.speed(answers, [len(p.ids) for p in prompts])
    assert speed['aborted'] + speed['whole_answers'] == 60 and speed['errors'] == 0
    assert speed['tokens_per_s'] == pytest.approx(sum(len(a.ids) for a in answers) / speed['seconds'])
    for name in ('first_token_ms', 'between_tokens_ms', 'answer_ms'):
        assert 0 < speed[f'{name}_p50'] <= speed[f'{name}_p95'] <= speed[f'{name}_p99']
    streams = [a for a in answers if a.request.stream and not a.aborted]
    assert all(a.first <= a.seconds and len(a.gaps) == len(a.ids) - 1 for a in streams)


def test_refusals_and_silence_are_errors(url, prompts):
    too_long = Prompt((5, ) * (SESSION_LEN + 1), 3)
    answer = asyncio.run(load.ask_one(url, too_long, limit=20))
    assert answer.error.startswith('RuntimeError: HTTP 400') and 'context length' in answer.error
    with socket.socket() as nobody:  # listens and never answers
        nobody.bind(('127.0.0.1', 0))
        nobody.listen()
        silent = f'http://127.0.0.1:{nobody.getsockname()[1]}'
        assert asyncio.run(load.ask_one(silent, prompts[0], limit=1)).error == 'no answer within 1 s'
    assert 'Connect' in asyncio.run(load.ask_one(silent, prompts[0], limit=5)).error
    short = Answer(Request(0), ids=[1], logprobs=[-1.0], finish='length')
    with pytest.raises(RuntimeError, match='1 tokens and 1 log-probabilities instead of 2'):
        short.check(2)


def test_idle_servers_show_no_blocks_in_use(url, references):
    """The gauges of LMDeploy's endpoint, by the names that it has."""
    assert soak.blocks_in_use(url, 100, settle=0) == 0 and len(soak.gauges(url)) == 3
    assert not soak.whole_cache(url, 3, [Prompt((5, ), 1)])  # longer than the session: refused
    assert soak.whole_cache(url, 2, [Prompt((5, 6, 7), 1)])


class _Running:
    """In the place of scripts/server.py's Server, which starts LMDeploy's engine: the server of these tests."""
    url, pid = '', subprocess.os.getpid()

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def cache_blocks(self) -> dict[str, int]:
        return {'num_gpu_blocks': 10}


def test_a_whole_run(url, small_model, monkeypatch):  # noqa: F811
    """References, warm-up, load, leak checks and verdict, all but the engine and the GPU's memory."""
    monkeypatch.setattr(soak, 'Server', type('Server', (_Running, ), {'url': url}))
    monkeypatch.setattr(soak, 'WARM_UP', 0.5)
    monkeypatch.setattr(soak, 'all_prompts', lambda settings: load.make_prompts(range(3, 250), 6, 60, 8, seed=0))
    monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', 'raw')  # the run sets it for its server
    monkeypatch.setattr(soak, 'blocks_in_use', functools.partial(soak.blocks_in_use, settle=0))
    _, _, settings = soak.parse(['--model', str(small_model), '--requests', '25', '--concurrency', '4'])
    results = [soak.attempt(name, settings, None) for name in ('none', 'fp8_per_token_head')]
    failed = soak.verdict(results, functools.partial(soak.explain, settings))
    rows = [row for row, _, _ in results]
    assert failed == [f'{row["format"]}: device memory grew by None MiB, the limit is 64' for row in rows]
    for row in rows:
        assert (row['requests'], row['unfinished'], row['errors'], row['wrong_answers']) == (25, 0, 0, 0)
        assert row['equal_answers'] == 1 and row['whole_cache_after'] and row['spare_blocks'] == 8
        assert row['farthest'] == row['rare'] == []
    assert rows[1]['tokens_per_s_vs_bf16'] > 0 and rows[1]['change_by_format'] < 1e-5
    json.dumps(rows)


def test_what_left_its_reference_is_asked_about(url, small_model):  # noqa: F811
    """An answer whose third token is another one: the prompt alone says what it said, and the token is unlikely."""
    prompts = load.make_prompts(range(3, 250), 3, 40, 8, seed=1)
    first = asyncio.run(load.references(url, prompts))
    number = next(i for i, answer in enumerate(first) if len(answer.ids) > 2)
    kept = {token for _, token in first[number].top[2]}
    wrong = next(token for token in range(3, 250) if token not in kept)
    changed = replace(first[number], ids=[*first[number].ids[:2], wrong, *first[number].ids[3:]])
    row, = soak.ask_again(url, prompts, first, [*first, changed])
    assert (row['prompt'], row['at'], row['token'], row['kept'], row['again']) == (number, 2, wrong, False, 0)
    assert row['rescored'] == pytest.approx([row['gap']] * 2, abs=1e-3) and row['gap'] > 0
    assert soak.rescore(url, prompts, [row]) == pytest.approx([row['gap']], abs=1e-3)
    assert (row['answer'], row['reference']) == (changed.ids, first[number].ids)
    assert row['prompt_tokens'] == len(prompts[number].ids)


# ---- lm-eval


def test_lm_eval_scores_what_the_server_says(url, small_model, lm_eval_task, capsys):  # noqa: F811
    """``eval --server --task`` against LMDeploy's own completions: two of three given answers are the server's."""
    from lmdeploy_kvq import cli
    given = []
    for question, _ in QUESTIONS[:3]:
        status, text = hostile.send(url, hostile.COMPLETIONS, hostile.completion(
            str(small_model), prompt=f'What is {question}? Answer:', max_tokens=8), hostile.JSON)
        assert status == 200
        given.append((question, json.loads(text)['choices'][0]['text'].split('\n')[0]))
    assert all(answer for _, answer in given)
    given[2] = given[2][0], 'something else'
    assert cli.main(['eval', '--server', url, '--task', 'sums', '--task-folder', lm_eval_task(questions=given)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('sums'))
    assert line.split()[1:3] == ['exact_match', '0.6667']


# ---- hostile requests


@pytest.mark.covers('fault.hostile')
def test_hostile_requests_get_an_answer_or_a_refusal(url, small_model, prompts, references):  # noqa: F811
    """And the next request its answer. This is the path to the engine; the engine itself is tested on a GPU."""
    found = hostile.answers(url, str(small_model), SESSION_LEN)
    assert len(found) > 40 and hostile.problems(found) == []
    assert {name for name, (status, _) in found.items() if status == 500} == hostile.SERVER_ERRORS
    refused = {name for name, (status, _) in found.items() if 400 <= status < 500}
    assert refused >= {'max_tokens negative', 'prompt too long', 'bad UTF-8', '1 MB of nested lists', 'unknown model',
                       'JSON cut short', 'nothing', 'ids too many', 'message too long', 'temperature negative'}
    assert found['max_tokens absurd'][0] == 200
    again = asyncio.run(load.references(url, prompts[:4]))
    assert [a.ids for a in again] == [a.ids for a in references[:4]]
