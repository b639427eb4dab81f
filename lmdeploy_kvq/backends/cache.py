"""Formats to LMDeploy's cache descriptors, and the checks that go before them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..formats import Encoding, KVFormat, find_format, page_shape
from ..kernels.decode import MAX_BATCH, MAX_GROUP
from . import observer
from .asked import check
from .checkpoints import advise, declares_fp8_cache
from .drafts import draft_folder
from .loading import check_file, scale_path
from .prefill import prefill_reads_cache
from .saturation import mark

_NO_SCALES = ('MiniCPM3ForCausalLM', 'DeepseekV4ForCausalLM')
"""Architectures whose attention does not pass the cache's scale tensors on."""


def finalize_cache_policy(original: Callable[..., None], model_configs: Sequence[Any], cache_config: Any) -> None:
    """Runs once per engine, with the real model configuration and before workers start: check what we will store."""
    original(model_configs, cache_config)
    for model_config in model_configs:
        if observer.ACTIVE is not None or draft_folder(model_config) is not None:
            continue  # lmdeploy-kvq calibrate is not serving; of a draft model, nothing is calibrated
        check(model_config, cache_config, scale_path(getattr(model_config.hf_config, 'name_or_path', '')))
    fmt = find_format(cache_config.quant_policy)
    if fmt is not None:
        mark(cache_config)
        prefill_reads_cache()  # a value that cannot be read is refused here, not by the first prompt
        for model_config in model_configs:
            check_model(fmt, model_config, cache_config)
            check_file(model_config, cache_config.quant_policy)
    elif int(cache_config.quant_policy) == 0 and any(declares_fp8_cache(config.hf_config) for config in model_configs):
        advise('the configuration of this checkpoint declares an FP8 KV cache')


def check_model(fmt: KVFormat, model_config: Any, cache_config: Any) -> None:
    """Raise ValueError, in the user's words, for models this package cannot serve in ``fmt``."""
    names = getattr(model_config.hf_config, 'architectures', None) or ['this model']
    instead = 'use quant_policy none (0) for this model'
    if model_config.use_flash_mla or model_config.v_head_dim == 0 or names[0] in _NO_SCALES \
            or not model_config.use_standard_kv_cache:
        raise ValueError(f'quant_policy {fmt.name}: {names[0]} keeps a latent (MLA) or non-standard KV cache, which '
                         f'this format cannot store; {instead}')
    if model_config.model_paradigm == 'dllm' and (model_config.sliding_window or -1) > 0:
        raise ValueError(f'quant_policy {fmt.name}: {names[0]} is a block-diffusion model with a sliding window, which '
                         f'is not supported; {instead}')
    fmt.check_head_dims(model_config.k_head_dim or model_config.head_dim,
                        model_config.v_head_dim or model_config.head_dim)
    group = model_config.num_attention_heads // max(model_config.num_key_value_heads, 1)
    if model_config.num_attention_heads % max(model_config.num_key_value_heads, 1):
        raise ValueError(f'quant_policy {fmt.name}: {model_config.num_attention_heads} query heads do not share '
                         f'{model_config.num_key_value_heads} KV heads evenly; {instead}')
    if group > MAX_GROUP:
        raise ValueError(f'quant_policy {fmt.name}: {group} query heads per KV head, supported are up to {MAX_GROUP}; '
                         f'{instead}')
    if cache_config.max_batches > MAX_BATCH:
        raise ValueError(f'quant_policy {fmt.name}: max_batch_size {cache_config.max_batches} is above {MAX_BATCH}; '
                         'lower max_batch_size')


def _kv_heads(model_config: Any, world_size: int) -> int:
    heads = model_config.num_key_value_heads
    if heads % world_size:
        raise ValueError(f'{heads} KV heads do not split over {world_size} GPUs')
    return heads // world_size


def build_k_cache_desc(original: Callable[..., Any], model_config: Any, cache_config: Any, world_size: int = 1) -> Any:
    """K pages: uint8 [kv_heads, block, bytes of a row]."""
    fmt = find_format(cache_config.quant_policy)
    if fmt is None:
        return original(model_config, cache_config, world_size)
    from lmdeploy.pytorch.engine.cache_engine import CacheDesc
    head_dim = model_config.k_head_dim or model_config.head_dim
    return CacheDesc(shape=[_kv_heads(model_config, world_size), *page_shape(cache_config.kernel_block_size, head_dim,
                                                                                fmt.key)], dtype=torch.uint8)


def build_v_cache_desc(original: Callable[..., Any], model_config: Any, cache_config: Any, world_size: int = 1) -> Any:
    """V pages: uint8 [kv_heads, block, bytes of a row]."""
    fmt = find_format(cache_config.quant_policy)
    if fmt is None:
        return original(model_config, cache_config, world_size)
    from lmdeploy.pytorch.engine.cache_engine import CacheDesc
    head_dim = model_config.v_head_dim or model_config.head_dim
    return CacheDesc(shape=[_kv_heads(model_config, world_size), *page_shape(cache_config.kernel_block_size, head_dim,
                                                                                fmt.value)], dtype=torch.uint8)


def build_quant_cache_descs(original: Callable[..., Any], k_cache_desc: Any, v_cache_desc: Any, model_config: Any,
                            cache_config: Any) -> Any:
    """Scales: fp32 [kv_heads, block] for K and for V, or none. Models take exactly zero or two extra tensors."""
    fmt = find_format(cache_config.quant_policy)
    if fmt is None:
        return original(k_cache_desc, v_cache_desc, model_config, cache_config)
    if not fmt.per_token_head:
        return []
    from lmdeploy.pytorch.engine.cache_engine import CacheDesc

    def scales(encoding: Encoding) -> Any:
        tokens = cache_config.kernel_block_size if encoding.per_token_head else 0
        return CacheDesc(shape=[k_cache_desc.shape[0], tokens], dtype=torch.float32)

    return [scales(fmt.key), scales(fmt.value)]
