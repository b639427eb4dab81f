"""Figures of a run as rows of plain values, and the advice that follows from them."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..accuracy import agreeing, summary
from ..capacity import CacheShape, bytes_per_token
from ..console import UserError
from ..plan import Model, Settings, cache_shape, num_gpu_blocks, read_model
from .material import Contender, Material, Run

READABLE = 0.5
"""Share of needles that the unquantized cache must retrieve for exact answers to be the score."""


class Sizes:
    """Bytes per token, and tokens that fit, of every contender.

    Attributes:
        problem: why there are no sizes, or None.
    """

    def __init__(self, folder: str, gpu_memory: int | None, tp: int):
        self.problem: str | None = None
        self._model: Model | None = None
        self._settings = Settings(gpu_memory or 0, tp)
        self._shape: CacheShape | None = None
        try:
            self._model = read_model(Path(folder))
            self._shape = cache_shape(self._model, self._settings)
        except UserError as error:  # a configuration with names of its own: the accuracy can be measured all the same
            self.problem = str(error)

    def of(self, contender: Contender, run: Run) -> dict[str, Any]:
        """``bytes_per_token``, ``gain`` (against bf16) and ``tokens`` that fit; None where it is not known.

        What the engine allocated comes first; else it is computed as ``lmdeploy-kvq plan`` does.
        """
        shape, size = self._shape, None
        if run.block_bytes is not None:
            size = run.block_bytes[0] / run.block_bytes[1]
        elif shape is not None and run.error is None and (contender.format or not contender.policy):
            size = bytes_per_token(contender.format, shape)
        if shape is None or size is None:
            return {'bytes_per_token': size, 'gain': None, 'tokens_that_fit': None}
        gain = bytes_per_token(None, shape) / size
        room = None
        if self._model is not None and self._settings.gpu_memory:
            # LMDeploy's own policies are not planned: as many more blocks as they are smaller
            planned = contender.format is not None or not contender.policy
            blocks = num_gpu_blocks(contender.format, self._model, self._settings) * (1.0 if planned else gain)
            room = max(int(blocks), 0) * self._settings.block_size
        return {'bytes_per_token': size, 'gain': gain, 'tokens_that_fit': room}


def make_rows(contenders: Sequence[Contender], runs: Sequence[Run], material: Material,
              sizes: Sizes) -> list[dict[str, Any]]:
    """One row per contender, the unquantized cache first.

    Returns:
        Rows with ``format``, ``policy``, ``stock``, ``floor``, ``scales``, ``error``; the figures of
        :func:`~lmdeploy_kvq.accuracy.summary`, over all texts and, under ``domains``, per text;
        ``greedy_agreement``: mean tokens until the continuation first differs, of ``greedy_tokens``; ``needles``: one
        entry per length and depth; ``decode_against_prefill_agreement`` and ``_worst_gap``, the least and the largest
        of the prompts'; ``needle_exact``, ``needle_reciprocal_rank``: their means; and the sizes.
    """
    domains = dict.fromkeys(passage.domain for passage in material.passages)
    rows = []
    for contender, run in zip(contenders, runs):
        row: dict[str, Any] = {'format': contender.name, 'policy': contender.policy, 'stock': contender.stock,
                               'floor': contender.floor, 'scales': contender.scales, 'error': run.error,
                               **sizes.of(contender, run)}
        if run.error is None:
            row |= summary(run.scores)
            row['domains'] = {domain: summary([scores for scores, passage in zip(run.scores, material.passages)
                                               if passage.domain == domain]) for domain in domains}
            if run.tokens:
                row['greedy_agreement'] = _mean(map(agreeing, run.tokens, runs[0].tokens))
                row['greedy_tokens'] = material.new_tokens
            if run.decoding:
                row['decode_against_prefill_agreement'] = min(found['agreement'] for found in run.decoding)
                row['decode_against_prefill_worst_gap'] = max(found['worst_gap'] for found in run.decoding)
            if run.found:
                row['needles'] = [{'length': needle.length, 'depth': needle.depth, 'exact': found.exact,
                                   'reciprocal_rank': found.reciprocal_rank}
                                  for needle, found in zip(material.needles, run.found)]
                row['needle_exact'] = _mean(found.exact for found in run.found)
                row['needle_reciprocal_rank'] = _mean(found.reciprocal_rank for found in run.found)
        rows.append(row)
    return rows


def needle_measure(rows: Sequence[dict[str, Any]]) -> str | None:
    """``exact``, or ``reciprocal_rank`` where the model itself finds too few needles; None: there are none."""
    share = rows[0].get('needle_exact')
    return None if share is None else 'exact' if share >= READABLE else 'reciprocal_rank'


def pick(rows: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """The format with the fewest bytes per token whose mean KL is within the budget; of equals the most accurate.

    LMDeploy's kernels for a policy that this package takes over cannot be chosen beside it, and are no candidates.
    """
    names = {row['format'] for row in rows if not row['stock']}
    fits = [row for row in candidates(rows) if row['mean_kl'] <= budget
            and (not row['stock'] or row['format'].partition(':')[2] not in names)]
    return min(fits, key=lambda row: (row['bytes_per_token'], row['mean_kl']), default=None)


def candidates(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of quantized caches that were measured and whose size is known."""
    return [row for row in rows if row['policy'] and row['error'] is None and row['bytes_per_token'] is not None]


def advice(rows: Sequence[dict[str, Any]], budget: float, engine: str) -> str:
    """One sentence: the smallest format within a KL budget.

    Args:
        rows: of :func:`make_rows`.
        budget: mean KL in nats.
        engine: what measured.
    """
    best, measured = pick(rows, budget), candidates(rows)
    if best is not None:
        more = f', {best["gain"]:.2f} times the tokens of bf16' if best['gain'] else ''
        return (f'Serve with --quant-policy {best["format"].removeprefix("lmdeploy:")}: the smallest cache within a '
                f'mean KL of {budget:g} ({best["mean_kl"]:.2g}{more}).')
    if not measured:
        return 'No advice: no quantized cache was measured with its size.'
    near = min(measured, key=lambda row: row['mean_kl'] if math.isfinite(row['mean_kl']) else math.inf)
    return (f'No cache is within a mean KL of {budget:g}; the nearest is {near["format"]} with {near["mean_kl"]:.2g}. '
            f'Serve without --quant-policy, or give a larger --budget.')


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
