"""LMDeploy 0.16 and 0.17: the patch table with rows that were elsewhere, or had another contract, adapted.

The table and ``backends`` know LMDeploy 0.18 alone. A row that an older version has in another module moves there; one
with another contract gets an adapter, which calls what the row calls with the arguments that 0.18 would give; one
without a counterpart goes. Nothing else asks for LMDeploy's version. Adapters import nothing of LMDeploy.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from .formats import find_format
from .patching import Patch, Undo, data, wrap

TABLE = (0, 18)  # what the patch table is written for
Function = Callable[..., Any]


def adapted(patches: tuple[Patch, ...], version: tuple[int, ...]) -> tuple[Patch, ...]:
    """The rows for a version of LMDeploy, (major, minor)."""
    if version >= TABLE:
        return patches
    rows = tuple(_row(patch) for patch in patches if version > _GONE.get(patch.name, (0, )))
    return rows if version >= (0, 17) else rows + _LACKING


def _row(patch: Patch) -> Patch:
    module = next((old for old in (_CACHE, _GRAPHS) if patch.module.startswith(old + '.')), patch.module)
    if patch.name not in _OTHERWISE or patch.wrapper is None:
        return dataclasses.replace(patch, module=module)
    (target, parameters), adapter = _OTHERWISE[patch.name]
    folder, colon, target = target.rpartition(':')
    return wrap(folder if colon else module, target, parameters, adapter(patch.wrapper), patch.why)


def _sparse_mla(model_config: Any) -> bool:
    """True for models whose fp8 policy becomes another one (none) once the cache is built; 0.18 does that first."""
    return model_config.mla_index_topk is not None


def _executor(check: Function) -> Function:
    """0.18 finalizes the policy just before it builds an executor; here the base class comes first."""

    def wrapper(original: Function, executor: Any, *, model_config: Any, cache_config: Any, misc_config: Any,
                specdecode_config: Any = None, **others: Any) -> None:
        fmt, memory = find_format(cache_config.quant_policy), misc_config.memdecode_config
        pairs = [(model_config, cache_config)] + ([(memory.memory_model_config, cache_config)] if memory else [])
        if specdecode_config is not None and specdecode_config.cache_config is not None:
            pairs.append((specdecode_config.model_config, specdecode_config.cache_config))
        for model, cache in pairs:
            if not _sparse_mla(model) or fmt is not None and not fmt.upstream:  # LMDeploy's own there are its affair
                check(lambda *args: None, [model], cache)
                if cache.role.name != 'Hybrid':
                    _refuse_transfer(cache)
        original(executor, model_config=model_config, cache_config=cache_config, misc_config=misc_config,
                 specdecode_config=specdecode_config, **others)

    return wrapper


def _refuse_transfer(cache_config: Any) -> None:
    fmt = find_format(cache_config.quant_policy)
    if fmt is not None:
        raise ValueError(f'quant_policy {fmt.name}: before LMDeploy 0.18, prefill and decode nodes cannot compare what '
                         'their pages hold; install LMDeploy 0.18, or use quant_policy none (0)')


def _p2p(method: Function) -> Function:
    def wrapper(original: Function, engine: Any, *args: Any) -> Any:
        _refuse_transfer(engine.cache_config)  # whatever the role
        return original(engine, *args)

    return wrapper


def _class_method(describe: Function) -> Function:
    """Descriptions of cache tensors were class methods of the engine."""

    def wrapper(original: Function, cls: type, *args: Any) -> Any:
        bound = functools.partial(original, cls)
        sparse = any(_sparse_mla(config) for config in args if hasattr(config, 'mla_index_topk'))
        return bound(*args) if sparse else describe(bound, *args)

    return wrapper


def _agent(method: Function) -> Function:
    return lambda original, agent: original(agent) if _sparse_mla(agent.model_config) else method(original, agent)


def _model_forward(forward: Function) -> Function:
    """Without the model's configuration, which was asked of the cache engine."""
    return lambda original, model, inputs, cache_engine, *args, **kwargs: forward(
        lambda model, inputs, config, *rest, **named: original(model, inputs, *rest, **named), model, inputs,
        cache_engine.model_config, cache_engine, *args, **kwargs)


def _enable_graph(use_full_graph: Function) -> Function:
    """Answered with the function that is then asked at each step."""

    def wrapper(original: Function, runner: Any) -> Function:
        enabled = original(runner)
        return lambda **inputs: use_full_graph(lambda runner, context, inputs: enabled(**inputs), runner, None, inputs)

    return wrapper


def _attribute(name: str, value: Any, cls: type) -> Undo:
    setattr(cls, name, value)
    return lambda: delattr(cls, name)


def _replicas(model_config: Any) -> int:
    """Ranks that share a KV head, where the configuration's builder left the number."""
    owners = (model_config.llm_config, model_config.hf_config)
    return next((found for owner in owners if (found := getattr(owner, 'num_replicate_key_value_heads', None))), 1)


_CACHE = 'lmdeploy.pytorch.engine.cache_engine'  # a package in 0.18, a module before
_GRAPHS = 'lmdeploy.pytorch.backends.cuda.graph_runner'  # likewise
_AGENT = 'lmdeploy.pytorch.engine.model_agent.agent'
_OTHERWISE: dict[str, tuple[tuple[str, str], Callable[[Function], Function]]] = {
    'lmdeploy.pytorch.engine.executor._finalize_sparse_mla_cache_policy': ((
        'lmdeploy.pytorch.engine.executor.base:ExecutorBase.__init__', 'self model_path model_config cache_config '
        'backend_config dist_config misc_config adapters specdecode_config device_type trust_remote_code'), _executor),
    **{f'{_CACHE}.schema.build_{x}_cache_desc': (
        (f'CacheEngine.get_{x}_cache_desc', 'cls model_config cache_config world_size'), _class_method) for x in 'kv'},
    f'{_CACHE}.schema.build_quant_cache_descs': ((
        'CacheEngine.get_quant_cache_descs', 'cls k_cache_desc v_cache_desc model_config cache_config'), _class_method),
    f'{_AGENT}.model_forward': (
        ('model_forward', 'model inputs cache_engine state_cache_engine stream cache_inputs'), _model_forward),
    **{f'{_AGENT}.{method}': ((method, 'self'), _agent)
       for method in ('BaseModelAgent._build_model', 'BaseModelAgent.build_cache_engine')},
    **{f'{_CACHE}.engine.{method}': ((method, f'self {parameters}'), _p2p) for method, parameters in (
        ('CacheEngine.p2p_initialize', 'migration_init_request'),
        ('CacheEngine.p2p_connect', 'remote_engine_id migration_conn_request'))},
    f'{_GRAPHS}.runner.CUDAGraphRunner._should_use_full_graph': (
        ('CUDAGraphRunner.check_enable_graph', 'self'), _enable_graph),
}
_GONE = {f'{_CACHE}.engine.CacheEngine._get_pd_cache_pool_infos': (0, 17),
         'lmdeploy.pytorch.kv_connector.mooncake.store.worker.MooncakeStoreWorker.__init__': (0, 16)}
_LACKING = tuple(data('lmdeploy.pytorch.config', cls, functools.partial(_attribute, name, value), f'0.16 has no {name}')
                 for cls, name, value in (('ModelConfig', 'num_replicate_key_value_heads', property(_replicas)),
                                          ('CacheConfig', 'kv_transfer_config', None)))
