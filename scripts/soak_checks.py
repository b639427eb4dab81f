"""What soak.py makes of answers: how far they are from their references, percentiles, and the verdict.

A server does not give the same bits at another batch size: sums are taken in another order, near ties fall the other
way, and from there on a greedy answer is another one. What that does to the bf16 cache is measured in the same run, and
is the floor. A quantized cache rounds the same noise to codes, which makes it larger, but not larger than what storing
the cache in that format changes of the model's predictions; this is measured in the same run, too. Hence the limits:

* mean change of a token's log-probability, over the tokens before an answer's first difference: for bf16 at most
  FLOOR_LIMIT, for a format at most bf16's plus MARGIN times what the format changes at low load.
* at an answer's first difference the reference says how much less likely the token is than its own. Where that is more
  than GAP_LIMIT, and more than GAP_MARGIN times the largest gap that bf16 shows under load or the format at low load,
  the answer is rare. A reference is one draw of many: one that is rounded otherwise may say something else. So a rare
  answer is wrong unless rounding alone, drawn at random in an independent implementation (rounding.py), finds its token
  within GAP_LIMIT of the likeliest one. More than MOST_RARE kinds of rare answers are not rare, and are all wrong.
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from soak_load import Answer

MARGIN = 1.0
FLOOR_LIMIT = 0.1  # nats
GAP_LIMIT, GAP_MARGIN = 1.0, 2.0  # nats, factor
MOST_RARE = 8
GROWTH_LIMIT = 64.0  # MiB of device memory, between the halves of the load
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Score:
    """How far an answer is from its reference.

    Attributes:
        tokens: compared, the shorter one's. same: before the first difference.
        change: sum of the changes of the log-probability of those, nats, absolute.
        gap: how much less likely than its own the reference finds the first other token, nats; 0 without a difference,
            at least so much where the token is none of the likeliest ones that were kept.
    """
    tokens: int
    same: int
    change: float
    gap: float


def score(answer: Answer, reference: Answer) -> Score:
    """Compare an answer, or as much of it as came, with the reference of its prompt."""
    pairs = list(zip(answer.ids, reference.ids))
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    change = sum(abs(a - b) for a, b in zip(answer.logprobs[:same], reference.logprobs))
    gap = 0.0
    if same < len(pairs):
        likeliest = {token: value for value, token in reference.top[same]}
        best = reference.logprobs[same]
        gap = best - likeliest.get(answer.ids[same], min(likeliest.values()))
    return Score(len(pairs), same, change, gap)


@dataclass(frozen=True)
class Deviation:
    """Scores of many answers, together.

    Attributes:
        answers: that have a token to compare. equal: share of them that are the same as far as they go.
        prefix: mean share of tokens before the first difference. change: mean per token, nats. gap: the largest.
        gaps: of every answer with a difference, descending.
    """
    answers: int
    equal: float
    prefix: float
    change: float
    gaps: tuple[float, ...]

    @property
    def gap(self) -> float:
        """The largest gap."""
        return self.gaps[0] if self.gaps else 0.0


def _scored(answers: Sequence[Answer], references: Mapping[int, Answer]) -> list[tuple[Score, Answer]]:
    """Answers compared with the references of their prompts; those without a token or with an error do not count."""
    return [(score(answer, references[answer.request.prompt]), answer) for answer in answers
            if answer.error is None and answer.ids]


def deviation(answers: Sequence[Answer], references: Mapping[int, Answer]) -> Deviation:
    """The scores of many answers, together; see :func:`_scored` for which of them count."""
    scores = [found for found, _ in _scored(answers, references)]
    if not scores:
        return Deviation(0, 0.0, 0.0, 0.0, ())
    return Deviation(len(scores), sum(s.same == s.tokens for s in scores) / len(scores),
                     sum(s.same / s.tokens for s in scores) / len(scores),
                     sum(s.change for s in scores) / max(sum(s.same for s in scores), 1),
                     tuple(sorted((s.gap for s in scores if s.same < s.tokens), reverse=True)))


def farthest(answers: Sequence[Answer], references: Mapping[int, Answer], count: int = 5) -> list[dict]:
    """The answers with the largest gaps, and what tells a damaged page from noise: where each left its reference, with
    which token (``kept``: one of the likeliest that the reference kept, else its gap is a lower bound), how likely it
    found that itself, how its client behaved, the tokens of both, and by how much log-probabilities changed before.
    ``company``: what all answers with the same text up to there say next, how many, and how likely they find it."""
    found = [pair for pair in _scored(answers, references) if pair[0].same < pair[0].tokens]
    found.sort(key=lambda pair: -pair[0].gap)
    rows = []
    for scored, answer in found[:count]:
        prompt, at, reference = answer.request.prompt, scored.same, references[answer.request.prompt]
        rows.append({
            'prompt': prompt, 'at': at, 'gap': scored.gap, 'token': answer.ids[at],
            'kept': answer.ids[at] in {token for _, token in reference.top[at]},
            'logprob': answer.logprobs[at] if at < len(answer.logprobs) else None,
            'stream': answer.request.stream, 'aborted': answer.aborted, 'started': answer.started,
            'answer': answer.ids, 'reference': reference.ids,
            'changes': [a - b for a, b in zip(answer.logprobs[:at], reference.logprobs)],
            'top': reference.top[at],
            'company': _company(came_by(answers, prompt, reference.ids[:at]), at)})
    return rows


def came_by(answers: Sequence[Answer], prompt: int, text: Sequence[int]) -> list[Answer]:
    """Answers to the prompt that have the text, and a token behind it."""
    return [answer for answer in answers if answer.error is None and answer.request.prompt == prompt
            and min(len(answer.ids), len(answer.logprobs)) > len(text) and answer.ids[:len(text)] == list(text)]


def _company(answers: Sequence[Answer], at: int) -> list[dict]:
    """Per token ``at`` that place: how many answers have it, and the range of its log-probability; the most first."""
    found: dict[int, list[float]] = {}
    for answer in answers:
        found.setdefault(answer.ids[at], []).append(answer.logprobs[at])
    return [{'token': token, 'answers': len(values), 'least': min(values), 'most': max(values)}
            for token, values in sorted(found.items(), key=lambda item: -len(item[1]))]


def percentiles(values: Sequence[float], name: str, unit: float = 1e3) -> dict[str, float | None]:
    """``NAME_p50`` and so on, in milliseconds; None without values."""
    found = numpy.percentile(values, PERCENTILES) * unit if len(values) else [None] * len(PERCENTILES)
    return {f'{name}_p{p}': None if x is None else float(x) for p, x in zip(PERCENTILES, found)}


def speed(answers: Sequence[Answer], prompt_lens: Sequence[int]) -> dict[str, float | int | None]:
    """Throughput of the load, and latencies in milliseconds: to the first token, between tokens, of whole answers."""
    seconds = max((a.started + a.seconds for a in answers), default=0.0)
    whole = [a for a in answers if a.error is None and a.finish]
    return {'seconds': seconds, 'requests': len(answers), 'whole_answers': len(whole),
            'aborted': sum(a.aborted for a in answers), 'errors': sum(a.error is not None for a in answers),
            'requests_per_s': len(whole) / seconds if seconds else 0.0,
            'tokens_per_s': sum(len(a.ids) for a in answers) / seconds if seconds else 0.0,
            'prompt_tokens_per_s': sum(prompt_lens[a.request.prompt] for a in whole) / seconds if seconds else 0.0,
            **percentiles([a.first for a in answers if a.first is not None], 'first_token_ms'),
            **percentiles([gap for a in answers for gap in a.gaps], 'between_tokens_ms'),
            **percentiles([a.seconds for a in whole], 'answer_ms')}


def growth(samples: Sequence[tuple[float, float]]) -> float | None:
    """MiB by which the most memory of the second half of (seconds, MiB) exceeds that of the first; None: too few."""
    if len(samples) < 4:
        return None
    middle = (samples[0][0] + samples[-1][0]) / 2
    first, second = ([mib for when, mib in samples if (when <= middle) == early] for early in (True, False))
    return max(second) - max(first)


def gap_limit(floor: Deviation, effect: Deviation | None) -> float:
    """How far, in nats, an answer may be from its reference without being rare; arguments as :func:`judge`'s."""
    return max(GAP_LIMIT, GAP_MARGIN * (0.0 if effect is None else max(floor.gap, effect.gap)))


Kind = tuple[int, tuple[int, ...], int]
"""A prompt, what was answered to it, and the next token."""


def rare(answers: Sequence[Answer], references: Mapping[int, Answer], limit: float) -> dict[Kind, int]:
    """Answers whose gap is above ``limit``: how many of each kind."""
    found: dict[Kind, int] = {}
    for scored, answer in _scored(answers, references):
        if scored.gap > limit:
            kind = answer.request.prompt, tuple(answer.ids[:scored.same]), answer.ids[scored.same]
            found[kind] = found.get(kind, 0) + 1
    return found


def explained(rows: Sequence[Mapping], kinds: int) -> int:
    """Answers that rounding explains, of ``kinds`` kinds of rare ones: ``rows`` have the number of ``answers`` of each,
    and the ``smallest_gap`` that rounding found, or None."""
    if kinds > MOST_RARE:
        return 0
    return sum(row['answers'] for row in rows if row['smallest_gap'] is not None and row['smallest_gap'] <= GAP_LIMIT)


def judge(row: dict, floor: Deviation, effect: Deviation | None, own: Deviation, known: int = 0) -> list[str]:
    """Add limits and the number of rare and of wrong answers to a format's row; the sentences of what it fails.

    Args:
        floor: bf16's answers under load. effect: the format's references against bf16's; None for bf16 itself.
        own: the format's answers under load against its references. known: rare ones that rounding explains.
    """
    row['limit'] = FLOOR_LIMIT if effect is None else floor.change + MARGIN * effect.change
    row['gap_limit'] = gap_limit(floor, effect)
    row['rare_answers'] = sum(gap > row['gap_limit'] for gap in own.gaps)
    row['wrong_answers'] = row['rare_answers'] - known
    checks = {
        f'{row["errors"]} errors': row['errors'] == 0,
        f'{row["wrong_answers"]} answers no rounding explains, the largest gap is {own.gap:.2f} nats, the limit '
        f'{row["gap_limit"]:.2f}': row['wrong_answers'] == 0,
        f'log-probabilities change by {own.change:.4f} under load, the limit is {row["limit"]:.4f}':
            own.change <= row['limit'],
        'no answer could be compared': own.answers > 0,
        f'{row["blocks_in_use"]} blocks are in use by no request at the end': row['blocks_in_use'] == 0,
        f'blocks leaked: a prompt of all blocks but {row["spare_blocks"]} is not answered any more':
            bool(row['whole_cache_after']),
        'a prompt as long as the cache was not answered even before the load': row['spare_blocks'] is not None,
        f'device memory grew by {row["memory_growth_mib"]} MiB, the limit is {GROWTH_LIMIT:g}':
            row['memory_growth_mib'] is not None and row['memory_growth_mib'] <= GROWTH_LIMIT,
        f'{row["unfinished"]} requests short of what was asked for': row['unfinished'] == 0,
    }
    return [f'{row["format"]}: {sentence}' for sentence, good in checks.items() if not good]
