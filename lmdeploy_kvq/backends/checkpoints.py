"""What a checkpoint's configuration says of its quantization: what loads, what is refused, what is worth a line."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmdeploy.utils import get_logger

from ..formats import FORMATS

logger = get_logger('lmdeploy')

_WORKS = ('LMDeploy loads unquantized weights with an FP8 KV cache declared beside them, quant_method fp8 (static or '
          'blocked), AWQ, and 4-bit pack-quantized weights')


def quantization_config(original: Callable[..., Any], cls: type, hf_config: Any) -> Any:
    """``QuantizationConfig.from_config`` for checkpoints of which only the KV cache is quantized.

    Raises:
        ValueError: weights that LMDeploy cannot load, by name.
    """
    configs = _configs(hf_config)
    for config in configs:
        _check_weights(config)
    if any(_only_kv_cache(config) for config in configs):
        return cls()
    return original(cls, hf_config)


def _configs(hf_config: Any) -> list[Mapping[str, Any]]:
    """A model's quantization configs: config.json's and a nested text model's, else ModelOpt's hf_quant_config.json."""
    owners = (hf_config, getattr(hf_config, 'llm_config', None), getattr(hf_config, 'text_config', None))
    found = [getattr(owner, 'quantization_config', None) for owner in owners]
    configs: list[Mapping[str, Any]] = [
        {**config, **(config.get('quantization') or {})} for config in found if isinstance(config, Mapping)]
    folder = getattr(hf_config, 'name_or_path', '')
    path = Path(folder, 'hf_quant_config.json')
    if configs or not folder or not path.is_file():
        return configs
    return [{'quant_method': 'modelopt', **(json.loads(path.read_text(encoding='utf-8')).get('quantization') or {})}]


def _check_weights(config: Mapping[str, Any]) -> None:
    method, groups = config.get('quant_method'), config.get('config_groups')
    if method == 'modelopt' and config.get('quant_algo') not in (None, 'None', ''):
        raise ValueError(f'modelopt checkpoints with quantized weights (quant_algo {config["quant_algo"]}) are not '
                         f'supported. {_WORKS}')
    for name, group in groups.items() if method == 'compressed-tensors' and isinstance(groups, Mapping) else ():
        weights = group.get('weights') if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get('type') == 'float':
            raise ValueError(f'compressed-tensors checkpoints with fp{weights.get("num_bits", 8)} weights ({name}: '
                             f'{weights.get("strategy", "tensor")}) are not supported. {_WORKS}')


def _only_kv_cache(config: Mapping[str, Any]) -> bool:
    """True if a config that LMDeploy refuses leaves the weights alone."""
    method = config.get('quant_method')
    if method == 'compressed-tensors':
        return not config.get('config_groups') and bool(config.get('kv_cache_scheme'))
    return method == 'modelopt'


def declares_fp8_cache(hf_config: Any) -> bool:
    """True if a model's configuration asks for an fp8 KV cache, whether its checkpoint has scales or not.

    Known are ``kv_cache_quant_algo: FP8`` (ModelOpt) and ``kv_cache_scheme``: a word (``static``, AutoFP8), or an
    object whose type is float with 8 bits (compressed-tensors and ModelOpt).
    """
    for config in _configs(hf_config):
        scheme = config.get('kv_cache_scheme')
        if isinstance(scheme, Mapping):
            scheme = scheme.get('type', 'float') == 'float' and scheme.get('num_bits', 8) == 8
        if scheme or str(config.get('kv_cache_quant_algo')).upper() == 'FP8':
            return True
    return False


def advise(what: str) -> None:
    """The line for a policy 0 on a checkpoint made for an fp8 KV cache."""
    fmt = next(fmt for fmt in FORMATS if fmt.needs_scales)
    logger.warning(f'lmdeploy_kvq: {what}, which quant_policy 0 ignores: the cache stays in 16 bits. Serve with '
                   f'--quant-policy {fmt.name} to use it.')
