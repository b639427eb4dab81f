"""What a model is measured on: passages to score, prompts to continue, needles in haystacks; and the cache formats.

A needle is a sentence with a random number inside built-in text (the haystack); the prompt ends with the beginning of
the same sentence, and the model is to go on with the number. The test was proposed by Kamradt ("Needle in a haystack:
pressure testing LLMs", 2023); prompts are completions here, so that base models can be asked as well.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..accuracy import Scores
from ..console import UserError
from ..formats import KVFormat
from ..texts import begin, built_in, cut, read_data

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where needles stand: 0 is the beginning of the haystack, 1 its end."""

PROMPTS = 8
PROMPT_TOKENS = 64
_PLACES = ('harbour', 'library', 'observatory', 'bakery', 'lighthouse', 'museum', 'orchard', 'station', 'theatre',
           'windmill')
_NEEDLE = 'The secret number of the {} is'


@dataclass(frozen=True)
class Contender:
    """A KV cache that is measured.

    Attributes:
        name: what the user calls it. policy: LMDeploy's number; 0 is the unquantized cache.
        format: of this package; None for the unquantized cache and for LMDeploy's own policies.
        stock: run by LMDeploy alone, with this package switched off.
        scales: file of static scales or transforms, for formats that take them; None: those of the checkpoint, else
            1.0; Hadamard.
        floor: a repetition of the unquantized cache, whose differences are those of a run to the next.
    """
    name: str
    policy: int
    format: KVFormat | None = None
    stock: bool = False
    scales: str | None = None
    floor: bool = False


@dataclass(frozen=True)
class Passage:
    """Tokens to score, and which text they are of."""
    domain: str
    ids: list[int]


@dataclass(frozen=True)
class Needle:
    """A haystack with a question.

    Attributes:
        length: tokens asked for. depth: 0 to 1.
        prompt: haystack, needle inside, and the beginning of the needle's sentence again.
        answer: the number that is to follow.
        ids: tokens of prompt and answer, ``answer_ids`` being the last of them.
    """
    length: int
    depth: float
    prompt: str
    answer: str
    ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Material:
    """Everything a run needs.

    Attributes:
        passages: scored. prompts: continued greedily by ``new_tokens`` tokens. needles: searched.
    """
    passages: list[Passage]
    prompts: list[str]
    new_tokens: int
    needles: list[Needle]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; prompts are counted as they were cut."""
        return max([*(len(passage.ids) for passage in self.passages), *(len(needle.ids) for needle in self.needles),
                    PROMPT_TOKENS])


@dataclass
class Found:
    """What a model made of a needle.

    Attributes:
        exact: its greedy answer is the number.
        ranks: place of each of the number's tokens among the vocabulary, given those before it; 1 is the likeliest.
    """
    exact: bool
    ranks: list[int]

    @property
    def reciprocal_rank(self) -> float:
        """Mean of 1 / rank over the number's tokens."""
        return sum(1 / rank for rank in self.ranks) / len(self.ranks)


@dataclass
class Run:
    """What one contender did.

    Attributes:
        scores: one per passage. tokens: one continuation per prompt. found: one per needle.
        decoding: per prompt, how far what the engine decoded is from what its prefill predicts: ``agreement`` (share of
            tokens that are prefill's likeliest) and ``worst_gap`` (nats between the two); empty where no engine ran.
        block_bytes: bytes of one block of the cache, all layers of one GPU, and its tokens, as the engine allocates
            it; None where no engine ran.
        error: why there is nothing, in one line.
    """
    scores: list[Scores] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    decoding: list[dict[str, float]] = field(default_factory=list)
    block_bytes: tuple[int, int] | None = None
    error: str | None = None


def gather(tokenizer: Any, text: str | None, tokens: int, length: int, new_tokens: int,
           needle_lengths: Sequence[int]) -> Material:
    """Cut texts for a model.

    Args:
        tokenizer: of transformers.
        text: file, ``-`` for standard input, or None for the built-in texts, each of which is a domain.
        tokens: to score, at most, over all domains.
        length: of a passage, in tokens.
        new_tokens: to generate after each prompt; 0: no prompts.
        needle_lengths: tokens of haystacks.

    Raises:
        UserError: a text that cannot be read or has no two tokens.
    """
    if text is None:
        texts = built_in()
    else:
        content, name = read_data(text)
        texts = {name: content}
    head, passages = begin(tokenizer), []
    for domain, content in texts.items():
        ids = list(tokenizer.encode(content, add_special_tokens=False))
        pieces = cut(ids, max(length - len(head), 1), max(tokens // len(texts), 1))
        passages += [Passage(domain, head + piece) for piece in pieces if len(head + piece) > 1]
    if not passages:
        raise UserError(f'{" and ".join(texts)}: no text to score')
    starts = [passage.ids[len(head):][:PROMPT_TOKENS] for passage in passages]
    step = max(len(starts) / PROMPTS, 1)
    prompts = [tokenizer.decode(starts[int(i * step)]) for i in range(min(PROMPTS, len(starts)))] if new_tokens else []
    return Material(passages, prompts, new_tokens, needles(tokenizer, needle_lengths))


def needles(tokenizer: Any, lengths: Sequence[int]) -> list[Needle]:
    """One needle per length and depth, always the same ones.

    Args:
        tokenizer: of transformers.
        lengths: tokens of prompt and answer together, met within a few tokens.

    Raises:
        UserError: a length into which needle and question do not fit.
    """
    hay = list(tokenizer.encode('\n'.join(built_in().values()), add_special_tokens=False)) if lengths else []
    generator, out = random.Random(0), []
    for length in lengths:
        for depth in DEPTHS:
            place, number = generator.choice(_PLACES), str(generator.randrange(10_000, 100_000))
            sentence, question = f' {_NEEDLE.format(place)} {number}.', f'\n\n{_NEEDLE.format(place)}'
            room = length - len(tokenizer.encode(f'{sentence}{question} {number}'))
            if room < 1:
                raise UserError(f'haystacks of {length} tokens cannot hold a needle and a question; '
                                f'{length - room + 1} would be the least')
            text = tokenizer.decode((hay * (room // len(hay) + 1))[:room])
            end = _sentence_end(text, depth)
            prompt = text[:end] + sentence + text[end:] + question
            out.append(_needle(tokenizer, length, depth, prompt, number))
    return out


def _sentence_end(text: str, depth: float) -> int:
    """The end of a sentence that is nearest to a share of the text; its very beginning and end count as such."""
    ends = [0, *(i + 1 for i in range(len(text) - 1) if text[i] == '.' and text[i + 1].isspace()), len(text)]
    return min(ends, key=lambda end: abs(end - depth * len(text)))


def _needle(tokenizer: Any, length: int, depth: float, prompt: str, number: str) -> Needle:
    """The answer's tokens are those by which the tokens of prompt and answer differ from the prompt's."""
    ids, whole = (list(tokenizer.encode(text)) for text in (prompt, f'{prompt} {number}'))
    same = next((i for i, (a, b) in enumerate(zip(ids, whole)) if a != b), min(len(ids), len(whole)))
    return Needle(length, depth, prompt, number, whole, whole[same:])
