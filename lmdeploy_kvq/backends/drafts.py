"""Draft models of speculative decoding. They share the policy; scales of static formats are their own.

The target model reads its pages with as many queries per sequence as there are draft tokens, and one more; the draft
model has a cache of its own in the same format. What a scale file of the target says of layer 0 is not about layer 0 of
the draft: a file beside the draft's weights is, and its checkpoint.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmdeploy.utils import get_logger

from .._autoload import SCALES
from ..formats import find_format
from ..kernels.decode import MAX_QUERY_LEN
from ..scales import FILE_NAME

logger = get_logger('lmdeploy')

_FOLDER = '_kvq_draft_folder'
"""Attribute of a draft's ModelConfig: where its files are; empty: it has none, its weights are among the target's."""


def configure(original: Callable[..., Any], cls: type, method: str, num_speculative_tokens: int, model: str,
              target_cache_cfg: Any, target_model: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """``SpecDecodeConfig.from_config``: refuse more draft tokens than are read at once, and mark what is a draft.

    Raises:
        ValueError: too many draft tokens.
    """
    fmt = find_format(target_cache_cfg.quant_policy)
    if fmt is not None and num_speculative_tokens >= MAX_QUERY_LEN:
        raise ValueError(f'quant_policy {fmt.name}: {num_speculative_tokens} draft tokens (num_speculative_tokens), '
                         f'supported are up to {MAX_QUERY_LEN - 1}; use fewer, or quant_policy none (0)')
    found = original(cls, method, num_speculative_tokens, model, target_cache_cfg, target_model, *args, **kwargs)
    shared = not model or target_model is not None and Path(model).resolve() == Path(target_model).resolve()
    setattr(found.model_config, _FOLDER, '' if shared else model)
    return found


def build_context(original: Callable[..., Any], manager: Any, inputs: Any, model_config: Any, cache_config: Any,
                  kv_caches: Any = None, state_caches: Any = None, kv_quant_policy: Any = 0) -> Any:
    """``StepContextManager.build_context``: LMDeploy names no policy for a draft's steps, whose pages are ours too."""
    if find_format(cache_config.quant_policy) is not None:
        kv_quant_policy = cache_config.quant_policy
    return original(manager, inputs, model_config, cache_config, kv_caches, state_caches, kv_quant_policy)


def draft_folder(model_config: Any) -> str | None:
    """A draft's own folder, empty where it has none; None: this is no draft's configuration."""
    return getattr(model_config, _FOLDER, None)


def draft_file(folder: str) -> tuple[str | None, bool]:
    """Like :func:`~lmdeploy_kvq.backends.loading.scale_file`, but a file that the user names is the target's."""
    path = Path(folder, FILE_NAME)
    return (str(path) if folder and path.is_file() else None), os.environ.get(SCALES, '').strip() == 'strict'


def build_model(original: Callable[..., None], agent: Any, empty_init: bool, target_model: Any = None,
                build_model_ctx: Any = None) -> None:
    """``SpecModelAgent.build_model``: after the draft's weights, settle its scales."""
    from .loading import bare_model, collect_checkpoint, default_warning, kv_heads, model_scales, settle
    original(agent, empty_init, target_model, build_model_ctx)
    fmt = None if agent.cache_config is None else find_format(agent.cache_config.quant_policy)
    if fmt is None:
        return
    from lmdeploy.pytorch.distributed import get_tp_world_rank
    model, folder = bare_model(agent.proposer.model), draft_folder(agent.model_config) or ''
    if not folder:
        model_scales(model).layers.clear()  # those that were met belong to the target
    elif empty_init and fmt.needs_scales:
        collect_checkpoint(model, folder)
    with agent.draft_context():
        world_size, rank = get_tp_world_rank('attn')
        audit = settle(model, fmt.policy, folder, kv_heads(agent.model_config), rank, world_size, quiet=True,
                       source=draft_file(folder))
    if agent.rank != 0 or not audit:
        return
    logger.info('lmdeploy_kvq: draft model, %s\n%s', fmt.name, '\n'.join('  '.join(row) for row in audit))
    if default_warning(fmt, audit) is not None:  # what it advises is for models that can be run by themselves
        defaults = sum(row[3] == 'default' for row in audit)
        logger.warning(f'lmdeploy_kvq: {defaults} of {len(audit)} layers of the draft model have no {fmt.name} scale '
                       f'and use 1.0. Keys and values beyond {fmt.key.codec.qmax:g} saturate: fewer draft tokens would '
                       'be accepted then, the text stays the same. fp8_per_token_head needs no scales.')
