"""Standard tasks through lm-eval (EleutherAI's evaluation harness) against a running OpenAI-compatible server.

Prompts, answers and metrics are lm-eval's; here is only what connects the two.
"""
from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from ..console import UserError, need, reason

CONCURRENT = 32
TIMEOUT = 10
"""Seconds in which a server must say which models it serves."""


def run_tasks(server: str, tasks: Sequence[str], model: str | None = None, limit: int | None = None,
              few_shot: int | None = None, chat: bool = False, folder: str | None = None) -> dict[str, Any]:
    """Run tasks of lm-eval.

    Args:
        server: URL, e.g. ``http://localhost:23333``.
        tasks: names that lm-eval knows, or those of YAML files in ``folder``.
        model: what the server calls its model; None: the first one it names.
        limit: questions per task; None: all.
        few_shot: worked examples before each question; None: the task's own number.
        chat: ask as a chat, through the server's template, instead of completions.
        folder: further task definitions, lm-eval's ``--include_path``.

    Returns:
        ``model``; ``lm_eval``: its version; ``tasks``: name to lm-eval's own figures, e.g. ``exact_match,none``.

    Raises:
        UserError: lm-eval is missing, the server does not answer, a task is unknown, or needs what the server lacks.
    """
    need('lm_eval', 'eval')
    server = server.rstrip('/').removesuffix('/v1')
    served = _served(server)
    model = model or served
    from lm_eval import __version__, simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=folder)
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        raise UserError(f'lm-eval has no task {", ".join(unknown)}; `lm-eval ls tasks` lists them')
    try:
        loaded = manager.load(list(tasks))['tasks']
    except Exception as error:  # downloads of data sets fail in many ways
        raise UserError(f'lm-eval cannot load the data of {", ".join(tasks)}: {reason(error)}') from error
    scored = [name for name, task in loaded.items() if task.OUTPUT_TYPE != 'generate_until']
    if scored and (chat or not _returns_prompt_scores(server, model)):
        raise UserError(f'{scored[0]} compares log-probabilities of given answers, which '
                        f'{"a chat" if chat else "this server"} does not return; choose tasks in which the model '
                        'writes its answer, e.g. gsm8k or mmlu_generative')
    where = 'chat/completions' if chat else 'completions'
    arguments = {'model': model, 'base_url': f'{server}/v1/{where}', 'num_concurrent': CONCURRENT,
                 'tokenizer_backend': None, 'tokenized_requests': False}
    try:
        found = simple_evaluate(model=f'local-{where.replace("/", "-")}', model_args=arguments, tasks=list(tasks),
                                num_fewshot=few_shot, limit=limit, task_manager=manager, log_samples=False,
                                apply_chat_template=chat, bootstrap_iters=1000)
    except Exception as error:  # the server went away, or answered in a way that lm-eval does not understand
        raise UserError(f'lm-eval could not finish {", ".join(tasks)}: {reason(error)}') from error
    assert found is not None  # None is for the ranks of a distributed run
    return {'model': model, 'lm_eval': __version__, 'tasks': _plain(found['results'])}


def _plain(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures as JSON has them; lm-eval's own are NumPy's."""
    return {task: {key: value if isinstance(value, (str, int)) else float(value) for key, value in figures.items()}
            for task, figures in results.items()}


def _served(server: str) -> str:
    """What the server calls its first model."""
    try:
        return str(_ask(server, '/v1/models')['data'][0]['id'])
    except (LookupError, TypeError) as error:
        raise UserError(f'{server}/v1/models names no model; is it an OpenAI-compatible server?') from error


def _returns_prompt_scores(server: str, model: str) -> bool:
    """Whether a completion with ``echo`` comes with the prompt's log-probabilities; LMDeploy 0.18's do not."""
    request = {'model': model, 'prompt': 'one two three', 'max_tokens': 1, 'temperature': 0, 'echo': True,
               'logprobs': 1}
    try:
        choice = _ask(server, '/v1/completions', request)['choices'][0]
        return len(choice['logprobs']['token_logprobs']) > 1
    except (UserError, LookupError, TypeError):
        return False


def _ask(server: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(server + path, data, {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: no URL, or no JSON
        raise UserError(f'{server} does not answer as an OpenAI-compatible server ({reason(error)}); start one with '
                        '`lmdeploy serve api_server MODEL` and give its address, e.g. '
                        'http://localhost:23333') from error
