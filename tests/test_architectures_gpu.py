"""Every architecture through LMDeploy's real engine on a GPU: six engines each, judged by tests/engines.py.

Tiny models: each test takes about half a minute and little memory, so that some can run side by side (``-n 3``).
"""
from __future__ import annotations

import importlib.util

import engines
import models
import pytest
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
