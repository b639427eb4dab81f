"""How far a model's predictions move when its KV cache is quantized: figures from logits, whoever computed them.

A position's KL divergence is KL(p || q) = sum p (log p - log q) in nats, p being the prediction with the unquantized
cache (Kullback and Leibler, 1951); 0 means identical predictions.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ROWS = 128  # positions at a time: a row is as long as the vocabulary


@dataclass
class Scores:
    """One text's predictions, position by position.

    Attributes:
        kl: fp32 [tokens], nats, against the unquantized cache.
        same: bool [tokens]: the likeliest next token is the same.
        nll: fp32 [tokens - 1], nats: minus the log-probability of the token that follows.
    """
    kl: torch.Tensor
    same: torch.Tensor
    nll: torch.Tensor


def score(ids: Sequence[int], logits: torch.Tensor, reference: torch.Tensor | None = None) -> Scores:
    """Compare predictions.

    Args:
        ids: the text's tokens.
        logits: [tokens, vocabulary] with the cache that is judged, any float dtype and device; unnormalized will do.
        reference: the same with the unquantized cache, e.g. log-probabilities in fp16, on any device. None: ``logits``
            are the reference.
    """
    kl, same, nll = [], [], []
    following = torch.tensor([*ids[1:], 0], device=logits.device)  # of the last token nothing is known
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        q = logits[rows].float().log_softmax(-1)
        p = q if reference is None else reference[rows].to(q.device).float().log_softmax(-1)
        # where p is 0 so is its part, although fp16 may hold log p = -inf there
        kl.append(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        nll.append(-q.gather(1, following[rows, None])[:, 0])
    return Scores(torch.cat(kl).cpu(), torch.cat(same).cpu(), torch.cat(nll).cpu()[:-1])


def summary(scores: Sequence[Scores]) -> dict[str, Any]:
    """Figures of several texts together.

    Returns:
        ``tokens``; ``perplexity``; ``mean_kl`` and ``p99_kl`` (99th percentile of the positions' KL) in nats;
        ``top1_agreement``: share of positions at which the likeliest next token is the same.
    """
    kl, same, nll = (torch.cat([getattr(s, name).float() for s in scores]) for name in ('kl', 'same', 'nll'))
    return {'tokens': len(kl), 'perplexity': float(nll.double().mean().exp()), 'mean_kl': float(kl.double().mean()),
            'p99_kl': float(kl.double().quantile(0.99)), 'top1_agreement': float(same.mean())}


def agreeing(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Tokens until two greedy continuations first differ; as many as they have if they do not."""
    length = min(len(tokens), len(reference))
    return next((i for i in range(length) if tokens[i] != reference[i]), length)


def gaps(logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """How far the tokens of an answer are from the likeliest ones: fp32 [len(answer)], nats, 0 for the likeliest.

    Args:
        logits: [len(answer), vocabulary], the predictions of these tokens, any float dtype and device.
        answer: tokens.
    """
    scores = logits.float().log_softmax(-1)
    return scores.amax(-1) - scores.gather(1, torch.tensor(answer, device=scores.device)[:, None])[:, 0]


def ranks(logits: torch.Tensor, answer: Sequence[int]) -> list[int]:
    """Place of each token of an answer among all tokens of the vocabulary; 1: it is the likeliest one.

    Args:
        logits: [len(answer), vocabulary], the predictions of these tokens.
        answer: tokens.
    """
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])
    # of equal logits only those before the token count: what argmax, hence greedy decoding, takes
    before = torch.arange(logits.size(1), device=logits.device) < torch.tensor(answer, device=logits.device)[:, None]
    places = (logits > chosen).sum(-1) + ((logits == chosen) & before).sum(-1) + 1
    # comparisons with NaN are false: a broken prediction must not look like the best one
    return torch.where(chosen[:, 0].isnan(), logits.size(1), places).tolist()
