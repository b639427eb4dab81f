"""``lmdeploy-kvq eval --server URL --task NAME``: the real lm-eval against a server of a small model."""
from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmdeploy_kvq import cli, console
from lmdeploy_kvq.console import UserError

QUESTIONS = [('two plus two', 'four'), ('one plus one', 'two'), ('three plus one', 'four'), ('one plus two', 'three')]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "What is {{{{question}}}}? Answer:"
doc_to_target: "{{{{answer}}}}"
{more}
"""


class Handler(BaseHTTPRequestHandler):
    """Answers "four", as a completion or a chat, whatever is asked: half of the questions right."""

    def do_GET(self):
        self.answer({'data': [{'id': 'small-model'}]} if self.path == '/v1/models' else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.bodies.append((self.path, body))
        text = 'four' if 'messages' in body or not body.get('echo') else ''
        choice = {'index': 0, 'text': text, 'logprobs': None, 'message': {'role': 'assistant', 'content': text}}
        self.answer({'choices': [choice], 'model': body['model']})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Its URL; ``bodies`` of the requests are in the second element."""
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        http.bodies = []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http.server_port}', http.bodies
        http.shutdown()


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes the definition of a task; returns its folder."""
    pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')

    def write(kind='generate_until', more='', questions=QUESTIONS):
        data = tmp_path / 'sums.jsonl'
        data.write_text('\n'.join(json.dumps({'question': q, 'answer': a}) for q, a in questions))
        more = more or ('generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list:\n'
                        '  - {metric: exact_match, aggregation: mean, higher_is_better: true}')
        (tmp_path / 'tasks').mkdir(exist_ok=True)
        (tmp_path / 'tasks' / 'sums.yaml').write_text(TASK.format(data=data, kind=kind, more=more))
        return str(tmp_path / 'tasks')

    return write


@pytest.mark.parametrize('chat', [False, True])
def test_tasks_run_through_lm_eval(server, task, tmp_path, capsys, chat):
    """lm-eval's own figure, printed and written; its requests reached the server as the user asked."""
    pytest.importorskip('rich')
    url, bodies = server
    out = tmp_path / 'tasks.json'
    assert cli.main(['eval', '--server', f'{url}/v1/', '--task', 'sums', '--task-folder', task(), '--json', str(out),
                     *(['--chat'] if chat else [])]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('sums'))
    assert line.split()[1:3] == ['exact_match', '0.5000']
    data = json.loads(out.read_text())
    assert data['tasks']['sums']['exact_match,none'] == 0.5 and data['model'] == 'small-model' and data['lm_eval']
    assert 'environment' in data and data['server'] == f'{url}/v1/'
    path = '/v1/chat/completions' if chat else '/v1/completions'
    assert len(bodies) == len(QUESTIONS) and {where for where, _ in bodies} == {path}
    assert all(body['model'] == 'small-model' and body['temperature'] == 0 for _, body in bodies)


def test_tasks_that_need_prompt_scores_are_refused(server, task):
    """LMDeploy's server, like this one, has no log-probabilities of prompts: said before lm-eval fails over it."""
    from lmdeploy_kvq.evaluation.tasks import run_tasks
    folder = task('multiple_choice', 'doc_to_choice: ["two", "three", "four"]\nmetric_list:\n  - {metric: acc}')
    with pytest.raises(UserError, match='sums compares log-probabilities of given answers, which this server does'):
        run_tasks(server[0], ['sums'], folder=folder)
    with pytest.raises(UserError, match='a chat does not return'):
        run_tasks(server[0], ['sums'], folder=folder, chat=True)


def test_mistakes(server, task, tmp_path):
    from lmdeploy_kvq.evaluation.tasks import run_tasks
    folder = task()
    with pytest.raises(UserError, match='lm-eval has no task nonsense'):
        run_tasks(server[0], ['sums', 'nonsense'], folder=folder)
    for url in ('http://127.0.0.1:9', 'nowhere'):
        with pytest.raises(UserError, match='does not answer as an OpenAI-compatible server'):
            run_tasks(url, ['sums'], folder=folder)
    with pytest.raises(UserError, match='other/v1/models names no model'):
        run_tasks(f'{server[0]}/other', ['sums'], folder=folder)
    (tmp_path / 'sums.jsonl').unlink()
    with pytest.raises(UserError, match='cannot load the data of sums'):
        run_tasks(server[0], ['sums'], folder=folder)


def test_a_missing_lm_eval_is_named(server, monkeypatch, capsys):
    pytest.importorskip('rich')
    real = console.find_spec
    monkeypatch.setattr(console, 'find_spec', lambda name: None if name == 'lm_eval' else real(name))
    assert cli.main(['eval', '--server', server[0], '--task', 'gsm8k']) == 2
    assert 'lm_eval is not installed; run `pip install "lmdeploy-kvq[eval]"`' in capsys.readouterr().err
