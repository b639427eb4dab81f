"""Policies, configuration and command line: what users of LMDeploy touch."""
from __future__ import annotations

import argparse
import enum
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from lmdeploy.utils import get_logger

from .._autoload import CALIBRATE, ENVIRONMENT, SCALES
from ..formats import FORMATS, KVFormat, find_format, format_names
from ..patching import Undo

logger = get_logger('lmdeploy')


def member_name(fmt: KVFormat) -> str:
    """Name of a format's QuantPolicy member."""
    return fmt.name.upper()


def extend_quant_policy(policy: type[enum.IntEnum]) -> Undo:
    """Add the formats LMDeploy does not know as members of QuantPolicy, in place (Python 3.10 to 3.13).

    In place, because LMDeploy's modules hold references to the class itself. Members pickle, iterate and convert like
    the others.
    """
    added = []
    for fmt in FORMATS:
        if fmt.policy in policy._value2member_map_:
            continue
        name = member_name(fmt)
        member = int.__new__(policy, fmt.policy)
        member._name_, member._value_ = name, fmt.policy
        member.__objclass__ = policy  # type: ignore[attr-defined]
        member._sort_order_ = len(policy._member_names_)  # type: ignore[attr-defined]
        type.__setattr__(policy, name, member)
        policy._member_names_.append(name)
        policy._member_map_[name] = member
        policy._value2member_map_[fmt.policy] = member
        if hasattr(policy, '_hashable_values_'):
            policy._hashable_values_.append(fmt.policy)
        added.append(member)

    def undo() -> None:
        for member in added:
            type.__delattr__(policy, member._name_)
            policy._member_names_.remove(member._name_)
            del policy._member_map_[member._name_], policy._value2member_map_[member._value_]
            if hasattr(policy, '_hashable_values_'):
                policy._hashable_values_.remove(member._value_)

    return undo


def _known() -> str:
    from lmdeploy.messages import QuantPolicy
    return ', '.join(f'{p.name.lower()} ({p.value})' for p in QuantPolicy)


def check_pytorch_config(original: Callable[..., None], config: Any) -> None:
    """Resolve names of formats; refuse unknown policies and devices our kernels do not run on."""
    from lmdeploy.messages import QuantPolicy
    given = config.quant_policy
    if isinstance(given, str):
        names = {p.name.lower(): p for p in QuantPolicy} | format_names()
        text = given.strip().lower()
        given = int(text) if text.isdecimal() else names.get(text, given)
    if isinstance(given, str) or given not in list(QuantPolicy):
        raise ValueError(f'unknown quant_policy {given!r}; known are {_known()}')
    config.quant_policy = given
    fmt = find_format(given)
    if fmt is not None and not (fmt.upstream and config.device_type == 'ascend') and config.device_type != 'cuda':
        raise ValueError(f'quant_policy {fmt.name} needs device_type cuda, got {config.device_type}; '
                         'use quant_policy none (0) there')
    if fmt is not None and torch.version.hip:
        raise ValueError(f'quant_policy {fmt.name} needs an NVIDIA GPU: on ROCm fp8 is another format (fnuz), and the '
                         'kernels are untested; use quant_policy none (0) there')
    if fmt is not None and fmt.experimental:
        logger.warning(f'lmdeploy_kvq: quant_policy {fmt.name} is EXPERIMENTAL: {fmt.experimental}')
    original(config)


def check_turbomind_config(original: Callable[..., None], config: Any) -> None:
    """Refuse our policies on TurboMind."""
    fmt = find_format(config.quant_policy) if isinstance(config.quant_policy, int) else None
    if fmt is not None:
        raise ValueError(f'quant_policy {fmt.name} ({fmt.policy}) runs on the PyTorch engine, not on TurboMind; use '
                         'PytorchEngineConfig (--backend pytorch), or one of int4 (4) and int8 (8) with TurboMind')
    original(config)


def quant_policy_argument(original: Callable[..., argparse.Action], parser: Any, default: int = 0) -> argparse.Action:
    """``--quant-policy``: LMDeploy's names and numbers, then ours."""
    action = original(parser, default)
    theirs: Any = action.type

    def parse(text: str) -> int:
        key = text.strip().lower()
        if key in format_names():
            return format_names()[key]
        try:
            return theirs(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'unknown policy {text!r}; known are {_known()}') from None

    action.type = parse
    parser.add_argument('--kv-scales', metavar='PATH|strict', default=None,
                        help='lmdeploy_kvq: scale file for formats with static scales, or calibrated transforms '
                        '(default: kv_scales.safetensors beside the model, else the checkpoint\'s scales, else 1.0; '
                        'transforms: else Hadamard); "strict" refuses layers without.')
    parser.add_argument('--kv-calibrate', metavar='N[,head]', type=_calibrate, default=None,
                        help='lmdeploy_kvq: where there is no scale file yet, serve the first N tokens unquantized, '
                        'find the scales of fp8 or fp8_e5m2 on them and write that file; "head": one per KV head.')
    ours = '; '.join(f'{fmt.name} ({fmt.policy}): {fmt.label}' for fmt in FORMATS)
    action.help = f'{action.help} lmdeploy_kvq, PyTorch engine: {ours}.'.replace('%', '%%')
    return action


def _calibrate(text: str) -> str:
    from .asked import parse
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class _DefaultBackend(str):
    """The default of ``--backend``, told from the same word given by the user by its type."""

    def __str__(self) -> str:  # argparse passes string defaults through ``type``, here str
        return self


def backend_argument(original: Callable[..., argparse.Action], parser: Any) -> argparse.Action:
    """``--backend`` with a default that can be recognized."""
    action = original(parser)
    action.default = _DefaultBackend(action.default)
    return action


def run_with_backend(original: Callable[..., Any], args: argparse.Namespace) -> Any:
    """Select the PyTorch engine for our policies, in one line of the log; refuse an explicit TurboMind."""
    scales = vars(args).pop('kv_scales', None)
    if scales is not None:  # workers inherit the environment; none of them sees the command line
        os.environ[SCALES] = scales if scales == 'strict' else os.path.abspath(scales)
    fmt = find_format(getattr(args, 'quant_policy', 0))
    calibrate = vars(args).pop('kv_calibrate', None)
    if calibrate is not None:
        from .asked import check_format
        try:
            check_format(fmt)
        except ValueError as error:
            sys.exit(f'lmdeploy: error: {error}')
        os.environ[CALIBRATE] = calibrate
    if fmt is not None and (fmt.needs_scales or fmt.takes_transform):
        _check_scale_file(str(getattr(args, 'model_path', '')))
    if fmt is not None and args.backend != 'pytorch':
        if not isinstance(args.backend, _DefaultBackend):
            sys.exit(f'lmdeploy: error: --quant-policy {fmt.name} runs on the PyTorch engine; drop --backend '
                     f'{args.backend} or use --backend pytorch')
        args.backend = 'pytorch'
        print(f'lmdeploy_kvq: --quant-policy {fmt.name} runs on the PyTorch engine: --backend pytorch is selected',
              file=sys.stderr, flush=True)
    return original(args)


def _check_scale_file(model: str) -> None:
    """End the command in a sentence where its scale file cannot be read, before any worker is started."""
    from ..scales import ScaleError, read_file
    from .loading import scale_file
    try:
        path, _ = scale_file(model)
        if path is not None:
            read_file(path)
    except (ScaleError, ValueError) as error:  # ValueError: what asks for calibration cannot be read
        sys.exit(f'lmdeploy: error: {error}')


def name_policies(descriptions: dict[Any, str]) -> Undo:
    """Let LMDeploy's 'Using ... KV cache' line name our formats."""
    before = dict(descriptions)
    descriptions.update({fmt.policy: f'{fmt.name} KV cache (lmdeploy_kvq)' for fmt in FORMATS})

    def undo() -> None:
        descriptions.clear()
        descriptions.update(before)

    return undo


def forward_environment(envs: dict[str, str]) -> Undo:
    """Register our variables among those that LMDeploy hands to Ray workers."""
    ours = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    envs.update(ours)

    def undo() -> None:
        for name in ours:
            envs.pop(name, None)

    return undo


def skip_in_dynamo(original: Callable[[], None]) -> None:
    """Keep Dynamo out of our launchers, as LMDeploy does with its own."""
    from torch._dynamo import trace_rules
    original()
    trace_rules.add('lmdeploy_kvq')
