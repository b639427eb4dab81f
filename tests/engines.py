"""What LMDeploy's engine makes of a tiny model under several caches, in figures, and what those figures must be.

A row of an architecture is six engines, each in a process of its own (scripts/token_engine.py): bf16 and one format
eager, bf16 and three formats with CUDA graphs. Prefill reads the cache everywhere. The expected loss of a format comes
from transformers in fp32 with this package's codecs (:class:`~lmdeploy_kvq.hf_cache.QuantizedLayer`); the noise of the
arithmetic from bf16's own engines, whose decoding differs from its prefill.
"""
from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch

from lmdeploy_kvq import accuracy, get_format

PROGRAM = Path(__file__).resolve().parent.parent / 'scripts' / 'token_engine.py'
FORMATS = ('fp8_per_token_head', 'int8_per_token_head', 'int4_per_token_head')
EAGER = FORMATS[1]
NEW = 12
LIMIT = 240  # seconds of an engine: hybrid models compile for long
# dtype: of Qwen2-VL's configuration LMDeploy 0.18 reads none, and takes fp16
ENGINE = {'num_gpu_blocks': 288, 'session_len': 1024, 'max_batch_size': 48, 'cudagraph_capture_batch_sizes': [48],
          'dtype': 'bfloat16'}
WITHOUT_FA3, PAGED_FA3 = (Path(__file__).resolve().parent / folder for folder in ('without_fa3', 'paged_fa3'))
PROMPTS = models.prompts(48, 40, seed=1, step=5)  # 40 to 275 tokens: below and beyond a window, a page and several
LEAST = 16  # predictions after the same tokens, to be compared
PASSAGES = models.prompts(4, 256, seed=2)


def run(folder: Path, policies: dict[str, dict[str, Any]], jobs: int = 6, limit: float = LIMIT,
        program: Path = PROGRAM, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Engines side by side on one GPU.

    Args:
        folder: the model. policies: what differs of each engine's specification, by name.
        env: further environment variables.

    Returns:
        By name: the program's answer, with the tensors it kept.

    Raises:
        lmdeploy_kvq.evaluation.through_engine.EngineError: one failed; its ``log`` has the end of what it printed.
    """
    from lmdeploy_kvq.evaluation.through_engine import EngineError, probe
    environment = {'LMDEPLOY_KVQ_PREFILL': 'cache', 'LMDEPLOY_ENABLE_CHECK_ENV': '0', 'TQDM_DISABLE': '1',
                   **(env or {})}

    def one(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as work:
            spec = {'model': str(folder), 'out': os.path.join(work, 'out.pt'), **policies[name]}
            spec['engine'] = {**ENGINE, **spec.get('engine', {})}
            try:
                answer = probe(spec, environment, limit, (str(program), ))
            except EngineError as error:
                raise EngineError(f'{name}: {error}\n{error.log[-3000:]}', error.log) from error
            return {**answer, **(torch.load(spec['out']) if spec['out'] else {})}

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(policies, pool.map(one, policies)))


def six_engines(prompts: list = PROMPTS, passages: list = PASSAGES, new_tokens: int = NEW) -> dict[str, dict[str, Any]]:
    """The specifications of an architecture's engines."""
    asked = {'prompts': prompts, 'new_tokens': new_tokens, 'passages': passages, 'score_generated': True}
    policies = {'none': 0, **{name: get_format(name).policy for name in FORMATS}}
    found = {f'{name} graph': {**asked, 'quant_policy': policy} for name, policy in policies.items()}
    for name in ('none', EAGER):
        found[f'{name} eager'] = {**asked, 'quant_policy': policies[name], 'engine': {'eager_mode': True}}
    return found


def kl(p: list[torch.Tensor], q: list[torch.Tensor]) -> float:
    """Mean KL divergence of log-probabilities [tokens, vocabulary], in nats; NaN if there is nothing to compare."""
    scores = [accuracy.score([0] * len(a), b, a).kl for a, b in zip(p, q, strict=True) if len(a)]
    return float(torch.cat(scores).double().clamp(min=0).mean()) if scores else float('nan')


def reference(name: str, passages: list = PASSAGES) -> dict[str, float]:
    """:func:`losses` of an architecture's model, with the weights of its checkpoint."""
    return losses(models.build(name).to(torch.bfloat16).float(), passages)


def losses(model: torch.nn.Module, passages: list = PASSAGES,
           predict: Callable[..., torch.Tensor] = models.log_probabilities) -> dict[str, float]:
    """What each format must cost: mean KL of transformers in fp32 whose every query reads what the format stored.

    Args:
        predict: log-probabilities of (model, tokens, cache).
    """
    base = [predict(model, ids) for ids in passages]
    return {fmt: kl(base, [predict(model, ids, models.quantized_cache(model, fmt)) for ids in passages])
            for fmt in FORMATS}


@dataclass
class Figures:
    """Mean KL divergences in nats, by format where there are several.

    Attributes:
        expected: the format's loss, from :func:`reference`.
        prefill: bf16's predictions of the passages against the format's.
        decode: bf16's predictions while decoding against the format's, after the same tokens; compared: how many.
        against_prefill: an engine's predictions while decoding against those of its prefill; ``none``: bf16's.
        graph: CUDA graphs against eager, after the same tokens, of bf16 (``none``) and of one format.
    """
    expected: dict[str, float]
    prefill: dict[str, float]
    decode: dict[str, float]
    compared: dict[str, int]
    against_prefill: dict[str, float]
    graph: dict[str, float]

    @property
    def noise(self) -> float:
        """Of the arithmetic: bf16's decoding against its prefill; at least what sums in fp32 resolve."""
        return max(self.against_prefill['none'], 1e-7)


def same_history(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The predictions of two engines while decoding, as far as both had generated the same tokens until then."""
    ends = [accuracy.agreeing(x, y) + 1 for x, y in zip(a['tokens'], b['tokens'])]
    p, q = ([rows[1:end] for rows, end in zip(run['generated'], ends)] for run in (a, b))
    return p, q


def measure(runs: dict[str, dict[str, Any]], expected: dict[str, float], longest: int | None = None) -> Figures:
    """Figures of six engines.

    Args:
        longest: compare decoding with prefill for sequences of at most so many tokens. Where full and windowed layers
            alternate, LMDeploy 0.18 drops pages behind the window of *all* layers (Gemma 2 and 3), so that beyond it
            decoding sees less than prefill does, in bf16 as well.
    """
    base = runs['none graph']
    figures = Figures(expected, {}, {}, {}, {}, {})
    for name in ('none', *FORMATS):
        own = runs[f'{name} graph']
        chosen = [i for i, ids in enumerate(PROMPTS[:len(own['tokens'])])
                  if longest is None or len(ids) + len(own['tokens'][i]) <= longest]
        figures.against_prefill[name] = kl([own['rescored'][i][1:] for i in chosen],
                                           [own['generated'][i][1:] for i in chosen])
    for name in FORMATS:
        own = runs[f'{name} graph']
        figures.prefill[name] = kl(base['passages'], own['passages'])
        p, q = same_history(base, own)
        figures.decode[name], figures.compared[name] = kl(p, q), sum(map(len, p))
    for name in ('none', EAGER):
        figures.graph[name] = kl(*same_history(runs[f'{name} eager'], runs[f'{name} graph']))
    return figures


def problems(figures: Figures, least: int = LEAST) -> list[str]:
    """What of the figures is not as it must be, in sentences; ``least`` predictions must have been compared.

    Noise in what is written to a cache of steps s moves a code with probability noise / s, by s: where the variance of
    the arithmetic is ``noise`` and of the format ``expected``, what decoding writes differs from what prefill writes by
    a variance of sqrt(noise x expected) more.
    """
    found, noise = [], figures.noise
    for name, expected in figures.expected.items():
        mixed = noise + (noise * expected)**.5
        for what, value, least, most in (
                ('prefill', figures.prefill[name], expected / 3, 2 * expected + 3 * mixed),
                ('decoding', figures.decode[name], expected / 6, 3 * expected + 3 * mixed),
                ('decoding against prefill', figures.against_prefill[name], 0, 3 * mixed)):
            if not least <= value <= most:
                found.append(f'{name}: {what} {value:.3g}, must be between {least:.3g} and {most:.3g}')
        if figures.compared[name] < least:
            found.append(f'{name}: only {figures.compared[name]} predictions after the same tokens')
    for name, value in figures.graph.items():
        if not value <= 2 * (noise + (noise * figures.expected.get(name, 0))**.5):
            found.append(f'{name}: CUDA graphs against eager {value:.3g}, noise is {noise:.3g}')
    return found


def engines_of(folder: Path, name: str, longest: int | None) -> Figures:
    """Run an architecture's engines, with the reference beside them."""
    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(reference, name)
        return measure(run(folder, six_engines(), env=prefill_that_can(name)), expected.result(), longest)


def prefill_that_can(name: str) -> dict[str, str]:
    """Environment in which LMDeploy's prefill can run an architecture: the fa3_fwd wheels have no sliding windows."""
    return without_fa3() if models.ARCHITECTURES[name].windowed else {}


def without_fa3() -> dict[str, str]:
    """Environment in which LMDeploy does not find the fa3_fwd wheels, which lack what it takes for granted."""
    if importlib.util.find_spec('fa3_fwd_interface') is None:
        return {}
    return _in_front(WITHOUT_FA3)


def fa3_with_pages() -> dict[str, str]:
    """Environment in which LMDeploy's bf16 cache can decode several tokens at once, whatever FlashAttention-3 is built.

    The fa3_fwd wheels are built without pages; paged_fa3 adds what is missing.
    """
    if importlib.util.find_spec('fa3_fwd_interface') is None:
        return {}
    return _in_front(PAGED_FA3)


def _in_front(folder: Path) -> dict[str, str]:
    return {'PYTHONPATH': os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])])}


def main() -> None:
    """Print the figures of one architecture: ``python tests/engines.py NAME``."""
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        models.write(Path(folder), name)
        figures = engines_of(Path(folder), name, models.ARCHITECTURES[name].longest)
    print(name, figures, *problems(figures), sep='\n')


if __name__ == '__main__':
    main()
