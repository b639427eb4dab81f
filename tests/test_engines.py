"""The judgement of test_architectures_gpu.py, on a CPU: transformers in the engines' place, sound and broken."""
from __future__ import annotations

import copy
from collections.abc import Callable

import engines
import models
import pytest
import torch

from lmdeploy_kvq.evaluation.through_engine import EngineError, probe

PROMPTS, PASSAGES, NEW = engines.PROMPTS[:4], models.prompts(1, 96, seed=2), 6


@torch.inference_mode()
def continued(model: torch.nn.Module, ids: list[int], cache, spoil: Callable | None) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, one at a time, and their predictions; ``spoil`` changes the cache after the prompt."""
    tokens, rows, new = [], [], ids
    for _ in range(NEW):
        rows.append(model(torch.tensor([new]), past_key_values=cache).logits[0, -1].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        if new is ids and spoil is not None:
            spoil(cache)
        new = tokens[-1:]
    return tokens, torch.stack(rows)


def emulated(model: torch.nn.Module, fmt: str, spoil: Callable | None = None) -> dict:
    """What an engine would answer and keep."""
    from transformers import DynamicCache

    def cache():
        return DynamicCache(config=model.config) if fmt == 'none' else models.quantized_cache(model, fmt)

    done = [continued(model, ids, cache(), spoil) for ids in PROMPTS]
    return {'tokens': [tokens for tokens, _ in done], 'generated': [rows for _, rows in done],
            'rescored': [models.log_probabilities(model, ids + tokens, cache())[len(ids) - 1:-1]
                         for ids, (tokens, _) in zip(PROMPTS, done)],
            'passages': [models.log_probabilities(model, ids, cache()) for ids in PASSAGES]}


def problems(figures: engines.Figures) -> list[str]:
    """Few prompts here: a prediction for each."""
    return engines.problems(figures, least=len(PROMPTS))


@pytest.fixture(scope='module')
def model():
    return models.build('gemma2').to(torch.bfloat16).float()


@pytest.fixture(scope='module')
def runs(model):
    """Six sound engines; fp32, so that all the noise there is lies in the order of sums."""
    graph = {name: emulated(model, name) for name in ('none', *engines.FORMATS)}
    return {**{f'{name} graph': run for name, run in graph.items()},
            **{f'{name} eager': graph[name] for name in ('none', engines.EAGER)}}


@pytest.fixture(scope='module')
def expected():
    return engines.reference('gemma2', PASSAGES)


def test_sound_engines_pass(runs, expected):
    figures = engines.measure(runs, expected)
    assert problems(figures) == []
    assert expected['int8_per_token_head'] < expected['fp8_per_token_head'] < expected['int4_per_token_head'] < 1
    assert figures.noise < 1e-5 < figures.prefill['int8_per_token_head']


def _forget_a_token(cache) -> None:
    for layer in cache.layers:  # every scale is as it was, one token's V is gone
        layer.value_scales[:, :, -1] = 0


def _exchange_heads(cache) -> None:
    cache.layers[1].values = cache.layers[1].values.flip(1)


@pytest.mark.parametrize('spoil', [_forget_a_token, _exchange_heads])
def test_broken_decoding_is_found(model, runs, expected, spoil):
    """Decoding that misses one token of the prompt, or reads another head, differs from prefill and from bf16."""
    name = engines.FORMATS[0]
    found = problems(engines.measure({**runs, f'{name} graph': emulated(model, name, spoil)}, expected))
    assert any(line.startswith(f'{name}: decoding against prefill') for line in found)
    assert not any(line.startswith(engines.FORMATS[2]) for line in found)


def test_an_engine_that_stores_something_else_is_found(runs, expected):
    """bf16 under the format's name, a coarser format, and graphs that differ from eager."""
    coarse, fine = engines.FORMATS[2], engines.FORMATS[1]
    for name, other in ((coarse, 'none'), (fine, coarse)):
        found = problems(engines.measure({**runs, f'{name} graph': runs[f'{other} graph']}, expected))
        assert any(line.startswith(f'{name}: prefill') for line in found)
    spoiled = copy.deepcopy(runs[f'{fine} eager'])
    spoiled['generated'] = [rows.roll(1, -1) for rows in spoiled['generated']]
    found = problems(engines.measure({**runs, f'{fine} eager': spoiled}, expected))
    assert [line for line in found if line.startswith(f'{fine}: CUDA graphs')]


def test_the_specifications_are_lmdeploys():
    """Six engines, with arguments that PytorchEngineConfig takes, and room in the cache for all prompts at once."""
    from lmdeploy import PytorchEngineConfig
    specs = engines.six_engines()
    assert len(specs) == 6 and sum(spec.get('engine', {}).get('eager_mode', False) for spec in specs.values()) == 2
    for spec in specs.values():
        config = PytorchEngineConfig(quant_policy=spec['quant_policy'], logprobs_mode='raw_logits',
                                     **{**engines.ENGINE, **spec.get('engine', {})})
        assert sum(-(-(len(ids) + engines.NEW) // config.block_size) for ids in spec['prompts']) < config.num_gpu_blocks
        assert max(map(len, spec['prompts'])) + engines.NEW < config.session_len
        assert len(spec['prompts']) == config.max_batch_size


@pytest.mark.skipif(torch.cuda.is_available(), reason='starts an engine there')
def test_the_program_says_why_there_is_no_engine(tmp_path):
    """The real program in a process of its own, as far as a machine without a GPU lets LMDeploy come."""
    with pytest.raises(EngineError) as caught:
        probe({'model': str(tmp_path), 'quant_policy': 116}, {'LMDEPLOY_ENABLE_CHECK_ENV': '0'}, 120,
              (str(engines.PROGRAM), ))
    assert 'CUDA' in str(caught.value) and 'Traceback' in caught.value.log
