"""Whether scales are to be found while serving, and what that cannot be combined with."""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._autoload import CALIBRATE
from ..formats import FORMATS, KVFormat, find_format
from ..kvstats import GRANULARITIES


@dataclass(frozen=True)
class Request:
    """What ``--kv-calibrate`` or its environment variable asks for.

    Attributes:
        tokens: to serve unquantized, the size of the log.
        granularity: ``tensor`` or ``head``.
    """
    tokens: int
    granularity: str = GRANULARITIES[0]


def parse(text: str) -> Request:
    """``N`` or ``N,GRANULARITY``.

    Raises:
        ValueError: anything else.
    """
    number, _, granularity = (part.strip().lower() for part in text.partition(','))
    granularity = granularity or GRANULARITIES[0]
    if not number.isdecimal() or int(number) < 1 or granularity not in GRANULARITIES:
        raise ValueError(f'{text!r} is not a number of tokens above 0, with ",{GRANULARITIES[1]}" behind it for one '
                         'scale per KV head')
    return Request(int(number), granularity)


def requested() -> Request | None:
    """What the environment asks for, or None.

    Raises:
        ValueError: something that cannot be read.
    """
    text = os.environ.get(CALIBRATE, '').strip()
    try:
        return parse(text) if text else None
    except ValueError as error:
        raise ValueError(f'{CALIBRATE}: {error}') from None


def check_format(fmt: KVFormat | None) -> None:
    """Raise ValueError for policies without static scales."""
    if fmt is None or not fmt.needs_scales:
        named = 'this quant_policy has no static scales' if fmt is None else \
            f'{fmt.name} computes its scales as tokens are written'
        static = ', '.join(f.name for f in FORMATS if f.needs_scales)
        raise ValueError(f'--kv-calibrate (or {CALIBRATE}) asks to calibrate while serving, but {named}; drop it, or '
                         f'serve one of {static}')


def check(model_config: Any, cache_config: Any, target: Path) -> None:
    """Before anything is loaded: raise ValueError where scales cannot be found while serving.

    Args:
        model_config, cache_config: LMDeploy's.
        target: the scale file that will be written; one that is there is used, and nothing is calibrated.
    """
    if requested() is None:
        return
    check_format(find_format(cache_config.quant_policy))
    if target.is_file():
        return
    dist_config = model_config.dist_config
    for what, found in (
            ('data parallelism (dp > 1), whose ranks serve different tokens', dist_config and dist_config.dp > 1),
            ('disaggregated serving', cache_config.role.name != 'Hybrid' or cache_config.kv_transfer_config),
            ('speculative decoding', model_config.model_paradigm == 'ar_spec'),
            ('block-diffusion models', model_config.model_paradigm == 'dllm'),
            ('prefix caching of models with recurrent states',
             cache_config.enable_prefix_caching and model_config.states_shapes)):
        if found:
            raise ValueError(f'--kv-calibrate does not work with {what}; run lmdeploy-kvq calibrate MODEL -o {target} '
                             'before serving')
    if not os.access(target.absolute().parent, os.W_OK):
        raise ValueError(f'--kv-calibrate: {target} cannot be written; name a file that can be with --kv-scales PATH')
