"""Every architecture through LMDeploy's real engine on a GPU: six engines each, judged by tests/engines.py.

Tiny models: each test takes about half a minute and little memory, so that some can run side by side (``-n 3``).
"""
from __future__ import annotations

import importlib.util

import engines
import models
import pictures
import pytest
import torch
from models import ARCHITECTURES


@pytest.mark.gpu
@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.covers(f'arch.{name}'))
                                  for name in ARCHITECTURES])
def test_the_engine_loses_what_the_format_loses(tmp_path, name):
    """Prefill and decoding against bf16, decoding against prefill, CUDA graphs against eager."""
    missing = [module for module in ARCHITECTURES[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f'LMDeploy runs {name} only with {" and ".join(missing)}')
    models.write(tmp_path, name)
    figures = engines.engines_of(tmp_path, name, ARCHITECTURES[name].longest)
    print(name, figures)
    assert engines.problems(figures) == [], figures


@pytest.mark.gpu
@pytest.mark.covers('arch.qwen2_vl')
def test_a_picture_in_the_prompt(tmp_path):
    """Its tokens are cached like the others, at positions in three dimensions."""
    models.write(tmp_path, 'qwen2_vl')
    prompts, passages = ([pictures.prompt(ids) for ids in group] for group in (engines.PROMPTS, engines.PASSAGES))
    specs = {name: {**spec, 'image': pictures.SPEC} for name, spec in engines.six_engines(prompts, passages).items()}
    runs = engines.run(tmp_path, specs)
    model = models.build('qwen2_vl').to(torch.bfloat16).float()
    shown, hidden = ([pictures.log_probabilities(model, ids, shown=shown) for ids in passages]
                     for shown in (True, False))
    assert engines.kl(shown, runs['none graph']['passages']) < engines.kl(shown, hidden) / 10, 'the picture is seen'
    figures = engines.measure(runs, engines.losses(model, passages, pictures.log_probabilities))
    print(figures)
    assert engines.problems(figures) == [], figures


def test_the_picture_is_what_both_take():
    """On the CPU: transformers' predictions depend on it, and LMDeploy's preprocessing finds its place."""
    import token_engine
    from lmdeploy.pytorch.models.qwen2_vl import Qwen2VLInputProcessor
    ids, model = pictures.prompt(engines.PASSAGES[0]), models.build('qwen2_vl')
    shown, hidden = (pictures.log_probabilities(model, ids, shown=shown) for shown in (True, False))
    assert engines.kl([shown], [hidden]) > 0.1
    found, = Qwen2VLInputProcessor(None).preprocess_input(
        ids, [token_engine.picture(pictures.SPEC)]).input_multimodals['image']
    assert set(ids[found.start:found.end]) == {pictures.IMAGE} and len(found.mrope_pos_ids) == found.end - found.start
    assert pictures.IMAGE not in [*ids[:found.start], *ids[found.end:]]
