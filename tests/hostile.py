"""Requests that no client should send, and what a server may do with them: answer, or refuse in words of its own."""
from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

CHAT, COMPLETIONS, GENERATE = '/v1/chat/completions', '/v1/completions', '/generate'
JSON = 'application/json'
ENGINE = {
    'prompt of nothing': 'an assertion in its main loop', 'message of an unknown part': 'an empty prompt, too',
    'ids beyond 64 bits': 'they do not fit the tensor of ids',
    'seed beyond 64 bits': 'it does not fit the tensor of seeds',
    'repetition_penalty zero': 'logits become infinite',
}
"""Requests that LMDeploy 0.18's HTTP layer lets through to its engine, and what they meet there, whatever the cache."""

SERVER_ERRORS = {'prompt of nothing', 'message of an unknown part', 'ids beyond 64 bits', 'min_p beyond 1'}
"""Requests to which LMDeploy 0.18 says 500 where it should say 400."""

Hostile = tuple[str, str, bytes, str]  # name, path, body, content type


def completion(model: object, **changes: object) -> bytes:
    """A small completion with some fields changed; JSON as Python writes it, NaN included."""
    fields = {'model': model, 'prompt': 'Once upon a time', 'max_tokens': 4, 'temperature': 0, **changes}
    return json.dumps(fields).encode()


def hostile(model: str, session_len: int) -> Iterator[Hostile]:
    """Every request.

    Args:
        model: the name the server serves its model under. session_len: tokens that it takes.
    """
    fields: dict[str, dict[str, object]] = {
        'max_tokens absurd': {'max_tokens': 10**15}, 'max_tokens beyond 64 bits': {'max_tokens': 10**40},
        'max_tokens negative': {'max_tokens': -5}, 'max_tokens a word': {'max_tokens': 'many'},
        'max_tokens infinite': {'max_tokens': float('inf')},
        'prompt too long': {'prompt': 'word ' * 4 * session_len}, 'prompt a number': {'prompt': 7},
        'prompt of nothing': {'prompt': ''}, 'prompts of nothing': {'prompt': []}, 'prompt null': {'prompt': None},
        'prompt of half a character': {'prompt': 'Once \ud800 upon'},
        'prompt of control characters': {'prompt': '\0\x1b[2J\u202e' * 20},
        'unknown model': {'model': 'no such model'}, 'model null': {'model': None},
        'temperature negative': {'temperature': -1.0}, 'temperature no number': {'temperature': float('nan')},
        'top_p beyond 1': {'top_p': 1e308}, 'top_k negative': {'top_k': -7}, 'n of zero': {'n': 0},
        'n negative': {'n': -1},
        'repetition_penalty zero': {'repetition_penalty': 0.0}, 'min_p beyond 1': {'min_p': 2.0},
        'seed beyond 64 bits': {'seed': 2**80}, 'session taken for a word': {'session_id': 'mine'},
        'ten thousand stop words': {'stop': [f'stop{i}' for i in range(10_000)]},
        'unknown fields': {'quant_policy': 'fp8', '__class__': {'a': 1}},
    }
    for name, changes in fields.items():
        yield name, COMPLETIONS, completion(**{'model': model, **changes}), JSON
    good = completion(model)
    yield 'bad UTF-8', COMPLETIONS, good.replace(b'Once', b'\xff\xfe\xc3\x28'), JSON
    yield 'UTF-16', COMPLETIONS, good.decode().encode('utf-16'), JSON
    yield 'JSON cut short', COMPLETIONS, good[:-9], JSON
    yield 'no JSON', COMPLETIONS, b'model=x&prompt=y', JSON
    yield 'nothing', COMPLETIONS, b'', JSON
    yield 'a list', COMPLETIONS, b'[]', JSON
    yield 'form data', COMPLETIONS, good, 'application/x-www-form-urlencoded'
    yield '1 MB of nested lists', COMPLETIONS, b'[' * 500_000 + b']' * 500_000, JSON
    nested = b'{"a":' * 150_000 + b'1' + b'}' * 150_000
    yield '1 MB of nested objects in a field', COMPLETIONS, good[:-1] + b', "extra": ' + nested + b'}', JSON
    yield '1 MB of one number', COMPLETIONS, good.replace(b': 4', b': ' + b'9' * 1_000_000), JSON
    for name, messages in {'messages of nothing': [], 'messages null': None,
                           'message without a role': [{'content': 'x'}],
                           'message of numbers': [{'role': 'user', 'content': 5}],
                           'message of an unknown part': [{'role': 'user', 'content': [{'type': 'x', 'x': 1}]}],
                           'message too long': [{'role': 'user', 'content': 'word ' * 4 * session_len}]}.items():
        yield name, CHAT, json.dumps({'model': model, 'messages': messages, 'max_tokens': 4}).encode(), JSON
    for name, given in {'ids of nothing': {'input_ids': []}, 'ids too many': {'input_ids': [5] * (session_len + 1)},
                        'ids of words': {'input_ids': ['a']}, 'ids beyond 64 bits': {'input_ids': [2**80]},
                        'ids and a prompt': {'input_ids': [5], 'prompt': 'x'}}.items():
        yield name, GENERATE, json.dumps({'max_tokens': 4, **given}).encode(), JSON


def send(url: str, path: str, body: bytes, content_type: str, timeout: float = 60) -> tuple[int, str]:
    """Status and body of the answer. Raises OSError or http.client.HTTPException where there is none."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request('POST', path, body, {'Content-Type': content_type})
        answer = connection.getresponse()
        return answer.status, answer.read().decode('utf-8', 'replace')
    finally:
        connection.close()


def send_half(url: str, body: bytes) -> None:
    """Promise a body, send half of it, and hang up."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        head = f'POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n'
        connection.sendall(head.encode() + body[:len(body) // 2])


def answers(url: str, model: str, session_len: int, skip: Collection[str] = ()) -> dict[str, tuple[int, str]]:
    """Send all of them but those in ``skip``: status and text by name; status 0 where no answer came."""
    found = {}
    for name, path, body, content_type in hostile(model, session_len):
        if name in skip:
            continue
        try:
            found[name] = send(url, path, body, content_type)
        except (OSError, http.client.HTTPException) as error:
            found[name] = 0, f'{type(error).__name__} {error}'
    send_half(url, completion(model))
    return found


def problems(found: dict[str, tuple[int, str]]) -> list[str]:
    """A line per request that got neither an answer nor a refusal (4xx) that says something."""
    return [f'{name}: {status} {text[:150]!r}' for name, (status, text) in found.items()
            if not (status == 200 or 400 <= status < 500 or status == 500 and name in SERVER_ERRORS)
            or not text.strip() or 'Traceback' in text]
