"""Quantized KV cache for LMDeploy's PyTorch engine: smaller, faster, measurably accurate.

Importing this package patches nothing and imports neither torch nor LMDeploy; attributes load on first use.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.2.0'

if TYPE_CHECKING:
    from . import reference
    from .formats import FORMATS, KVFormat, find_format, get_format
    from .hook import install, uninstall
    from .paged import PagedCache, flatten, paged_attention, reshape_and_cache

_HOME = {
    'FORMATS': 'formats', 'KVFormat': 'formats', 'find_format': 'formats', 'get_format': 'formats',
    'PagedCache': 'paged', 'flatten': 'paged', 'paged_attention': 'paged', 'reshape_and_cache': 'paged',
    'install': 'hook', 'uninstall': 'hook', 'reference': '',
}
__all__ = ['FORMATS', 'KVFormat', 'PagedCache', 'find_format', 'flatten', 'get_format', 'install', 'paged_attention',
           'reference', 'reshape_and_cache', 'uninstall']


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    home = _HOME[name]
    if not home:
        return importlib.import_module(f'.{name}', __name__)
    return getattr(importlib.import_module(f'.{home}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
