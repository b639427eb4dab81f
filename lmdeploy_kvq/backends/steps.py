"""A step of the engine: watched while scales are pending, else sometimes followed by a sample of saturation."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import saturation, tables
from .freezing import pending_scales


def model_forward(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """``model_forward`` of LMDeploy's model agent. Its warm-up is no step: what is captured there serves later."""
    pending = pending_scales(model)
    if pending is None or inputs.is_dummy:
        return saturation.model_forward(original, model, inputs, *args, **kwargs)
    return pending.step(functools.partial(original, model, inputs, *args, **kwargs))


def use_full_graph(original: Callable[..., bool], runner: Any, step_context: Any, model_inputs: Any) -> bool:
    """``CUDAGraphRunner._should_use_full_graph``: a graph only once scales are set (or in warm-up), and if it fits."""
    pending = pending_scales(runner.model)
    return ((pending is None or not pending.active) and original(runner, step_context, model_inputs)
            and tables.fits(runner, model_inputs))
