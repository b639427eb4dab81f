"""The load of soak.py: prompts and requests that follow from a seed, and a client of LMDeploy's ``/generate``.

``/generate`` takes and returns token ids, with log-probabilities, so that answers are compared exactly. The client is
aiohttp, which LMDeploy's server needs too.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

REQUEST_LIMIT = 240.0  # seconds until an answer counts as an error
PREFIXES = 4  # shared beginnings; a third of the prompts have one
TOP = 8  # likeliest tokens that are kept with a reference


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how many tokens to answer with."""
    ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Request:
    """One request of the load.

    Attributes:
        prompt: index of the prompt. stream: token by token, or in one piece.
        abort_tokens: the client hangs up when it has seen as many (streams); abort_seconds: or after as long.
    """
    prompt: int
    stream: bool = True
    abort_tokens: int | None = None
    abort_seconds: float | None = None


def make_prompts(text: Sequence[int], count: int, longest: int, new_tokens: int, seed: int) -> list[Prompt]:
    """Prompts of 1 to ``longest`` tokens, log-uniform, from anywhere in ``text``; a third begins like others.

    Answers have 1 to ``new_tokens`` tokens, log-uniform too.
    """
    rng = random.Random(seed)

    def piece(length: int) -> tuple[int, ...]:
        start = rng.randrange(len(text))
        return tuple(itertools.islice(itertools.cycle(itertools.chain(text[start:], text[:start])), length))

    shared = [piece(log_uniform(rng, min(64, longest), longest)) for _ in range(PREFIXES)]
    prompts = []
    for _ in range(count):
        length = log_uniform(rng, 1, longest)
        begin = rng.choice(shared)[:length - 1] if rng.random() < 1 / 3 else ()
        prompts.append(Prompt(begin + piece(length - len(begin)), log_uniform(rng, 1, new_tokens)))
    return prompts


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """An integer from low to high, both included, every factor of two equally likely."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def make_requests(prompts: Sequence[Prompt], seed: int) -> Iterator[Request]:
    """Requests without end: any prompt, two thirds streamed, one in eight hung up on."""
    rng = random.Random(seed)
    while True:
        prompt, stream, abort = rng.randrange(len(prompts)), rng.random() < 2 / 3, rng.random() < 1 / 8
        tokens, seconds = rng.randint(1, prompts[prompt].new_tokens), rng.uniform(0.01, 1.0)
        yield Request(prompt, stream, tokens if abort and stream else None, seconds if abort and not stream else None)


@dataclass
class Answer:
    """What came back.

    Attributes:
        request: what was asked. ids, logprobs: the tokens, and the log-probability of each.
        top: per token the likeliest ones as (log-probability, id), where they were asked for.
        finish: LMDeploy's reason; None while unfinished. aborted: the client hung up.
        error: what went wrong, or None.
        started: seconds since the load began. first: seconds to the first token (streams); gaps: between events;
            seconds: to the end.
    """
    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    finish: str | None = None
    aborted: bool = False
    error: str | None = None
    started: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def take(self, piece: dict) -> None:
        """Add an event of a stream, or the whole answer."""
        if 'error' in piece:
            raise RuntimeError(f'the stream says {piece["error"]}')
        meta = piece['meta_info']
        self.ids += piece['output_ids']
        self.logprobs += [value for value, _ in meta.get('output_token_logprobs') or ()]
        self.top += [[(value, token) for value, token in row] for row in meta.get('output_top_logprobs') or ()]
        if meta['finish_reason']:
            self.finish = meta['finish_reason']['type']

    def check(self, new_tokens: int) -> None:
        """Raise RuntimeError unless this is a whole answer of ``new_tokens`` tokens."""
        if self.finish != 'length' or len(self.ids) != new_tokens or len(self.logprobs) != new_tokens:
            raise RuntimeError(f'{len(self.ids)} tokens and {len(self.logprobs)} log-probabilities instead of '
                               f'{new_tokens}; finished for the reason {self.finish!r}')


def payload(prompt: Prompt, stream: bool, top: int) -> dict:
    """The JSON of a greedy request."""
    return {'input_ids': list(prompt.ids), 'max_tokens': prompt.new_tokens, 'stream': stream, 'temperature': 0.0,
            'ignore_eos': True, 'return_logprob': True, **({'top_logprobs_num': top} if top else {})}


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict]:
    """The JSON of server-sent events, up to ``[DONE]``."""
    async for line in response.content:
        text = line.decode('utf-8').strip()
        if text == 'data: [DONE]':
            return
        if text:
            yield json.loads(text.removeprefix('data: '))
    raise RuntimeError('the stream ended without [DONE]')


async def exchange(session: aiohttp.ClientSession, url: str, body: dict, answer: Answer, start: float) -> None:
    """Send a request and fill its answer as it comes."""
    request, last = answer.request, start
    async with session.post(f'{url}/generate', json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f'HTTP {reply.status}: {(await reply.text())[:300]}')
        if not request.stream:
            answer.take(await reply.json())
            return
        async with contextlib.aclosing(events(reply)) as pieces:
            async for piece in pieces:
                answer.take(piece)
                now = time.perf_counter()
                if answer.first is None:
                    answer.first = now - start
                elif piece['output_ids']:
                    answer.gaps.append(now - last)
                last = now
                if request.abort_tokens is not None and len(answer.ids) >= request.abort_tokens:
                    answer.aborted = answer.finish is None
                    return  # leaving an answer that has not been read to its end closes the connection


async def ask(session: aiohttp.ClientSession, url: str, prompts: Sequence[Prompt], request: Request, top: int = 0,
              began: float | None = None, limit: float = REQUEST_LIMIT) -> Answer:
    """Send one request; whatever goes wrong is in the answer."""
    prompt, answer = prompts[request.prompt], Answer(request)
    start = time.perf_counter()
    answer.started = start - (start if began is None else began)
    try:
        await asyncio.wait_for(exchange(session, url, payload(prompt, request.stream, top), answer, start),
                               request.abort_seconds or limit)
        if request.abort_tokens is None:
            answer.check(prompt.new_tokens)
    except asyncio.TimeoutError:
        answer.aborted = request.abort_seconds is not None
        if not answer.aborted:
            answer.error = f'no answer within {limit:.0f} s'
    except (aiohttp.ClientError, RuntimeError, ValueError, LookupError, TypeError) as error:
        answer.error = f'{type(error).__name__}: {error}'
    answer.seconds = time.perf_counter() - start
    return answer


def client() -> aiohttp.ClientSession:
    """A session without limits of its own; events of a stream may be long."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None),
                                 read_bufsize=2**20, trust_env=False)


async def references(url: str, prompts: Sequence[Prompt]) -> list[Answer]:
    """Every prompt by itself, one after another."""
    async with client() as session:
        return [await ask(session, url, prompts, Request(i), top=TOP) for i in range(len(prompts))]


async def load(url: str, prompts: Sequence[Prompt], requests: Iterator[Request], concurrency: int,
               seconds: float) -> list[Answer]:
    """As many requests at a time as ``concurrency``, for so long; those on their way are waited for."""
    began, answers = time.perf_counter(), []

    async def worker(session: aiohttp.ClientSession) -> None:
        for request in requests:
            answers.append(await ask(session, url, prompts, request, began=began))
            if time.perf_counter() - began > seconds:
                return

    async with client() as session:
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
    return answers


async def ask_one(url: str, prompt: Prompt, limit: float) -> Answer:
    """One prompt by itself."""
    async with client() as session:
        return await ask(session, url, [prompt], Request(0), limit=limit)
