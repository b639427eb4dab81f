"""What tells the pages of one engine from those of another, where pages leave the process.

Bytes of one format, scale or transform are nonsense to an engine that reads them as another. LMDeploy compares the
shapes of cache pools when two engines exchange pages (PD disaggregation), and a store's keys name the model and the
tokens; neither names the format. Both get our identity. The prefix cache of an engine needs none: it is a tree of
blocks in the scheduler's memory that lives and dies with the process, whose format and transforms never change. (A live
update of weights may bring other static scales. It also leaves pages that the old weights made, which LMDeploy keeps.)
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from ..formats import KVFormat, find_format
from .loading import bare_model, model_scales

_KEY = '_kvq_identity'
"""Attribute of a CacheConfig: the identity of the pages that are made with it."""


def identity(fmt: KVFormat, model: torch.nn.Module) -> str:
    """Format, package version, and a hash of the scales and transforms of the whole model: equal on all ranks."""
    store, digest = model_scales(model), hashlib.sha256(__version__.encode())
    digest.update(store.transforms.encode())
    for name, scales in sorted(store.layers.items()):
        k, v, _ = scales.resolved(name)
        digest.update(k.numpy().tobytes() + v.numpy().tobytes())
    return f'{fmt.name}:{digest.hexdigest()[:16]}'


def build_cache_engine(original: Callable[[Any], None], agent: Any) -> None:
    """``BaseModelAgent.build_cache_engine``: the cache engine and the connector find the identity in their config."""
    fmt = find_format(agent.cache_config.quant_policy)
    if fmt is not None:
        setattr(agent.cache_config, _KEY, identity(fmt, bare_model(agent.patched_model)))
    original(agent)


def _tagged(engine: Any, pools: Any) -> Any:
    """Descriptions of cache pools whose dtype names what the bytes are, which both ends compare."""
    ours = getattr(engine.cache_config, _KEY, None)
    if ours is None:
        return pools
    return tuple(pool.model_copy(update={'dtype': f'{pool.dtype}, lmdeploy_kvq {ours}'}) for pool in pools)


def p2p_initialize(original: Callable[..., Any], engine: Any, migration_init_request: Any) -> Any:
    """``CacheEngine.p2p_initialize``: what is sent to the other end."""
    info = original(engine, migration_init_request)
    return info.model_copy(update={'cache_pools': _tagged(engine, info.cache_pools)})


def pool_infos(original: Callable[[Any], Any], engine: Any) -> Any:
    """``CacheEngine._get_pd_cache_pool_infos``: what the other end's is compared with."""
    return _tagged(engine, original(engine))


def p2p_connect(original: Callable[..., Any], engine: Any, remote_engine_id: str, migration_conn_request: Any) -> Any:
    """``CacheEngine.p2p_connect``: an end that does not describe its pools cannot be compared.

    Raises:
        RuntimeError: such an end, or one whose pages are not like ours.
    """
    ours = getattr(engine.cache_config, _KEY, None)
    if ours is not None and migration_conn_request[engine.tp_rank].cache_pools is None:
        raise RuntimeError(f'engine {remote_engine_id} does not say what its cache pages hold; ours hold {ours}. Serve '
                           'both ends with the same LMDeploy and lmdeploy_kvq')
    return original(engine, remote_engine_id, migration_conn_request)


def store_worker(original: Callable[..., None], worker: Any, cache_config: Any, **kwargs: Any) -> None:
    """``MooncakeStoreWorker.__init__``: the identity becomes a part of every key that is stored or looked up."""
    original(worker, cache_config, **kwargs)
    ours = getattr(cache_config, _KEY, None)
    if ours is not None:
        key = worker.key_metadata
        prefix = f'{key.cache_prefix}@{ours}' if key.cache_prefix else ours
        worker.key_metadata = dataclasses.replace(key, cache_prefix=prefix)
