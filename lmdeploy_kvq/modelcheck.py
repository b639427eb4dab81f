"""What of ``lmdeploy-kvq doctor`` is about a model: the formats that can store its cache, its scales and transforms."""
from __future__ import annotations

import os
from typing import Any

from . import _autoload
from .calibrate import CALIBRATED, STATIC, attach
from .console import UserError, reason, table, wrapped
from .formats import KVFormat, get_format
from .texts import model_folder

SCALES = _autoload.SCALES
AUDIT = {True: ('layer', 'k_scale', 'v_scale', 'source'),  # columns, by whether a format needs scales
         False: ('layer', 'k_transform', 'v_transform', 'source')}


def check_model(model: str, policy: str | None = None, kv_scales: str | None = None) -> dict[str, Any]:
    """What an engine would make of a model, without its weights and without a GPU, as JSON-able values.

    Args:
        model: folder, or name on the hub.
        policy: the format that is to serve it; None: any, and the scales are those of the first static format.
        kv_scales: a scale file, ``strict``, or None; None leaves it to ``LMDEPLOY_KVQ_SCALES``.

    Returns:
        ``model``, ``architecture``, ``cache`` (layers, kv_heads, head_dim, v_head_dim), ``formats`` (name, supported,
        reason), then what :func:`audit` returns; its ``layers`` are empty for formats that take nothing from a file.

    Raises:
        UserError: no such model or format, or a model that LMDeploy cannot read.
    """
    asked = None if policy is None else _format(policy)
    folder = model_folder(model)
    attach()
    from .backends import audit as backend
    try:
        config = backend.read_config(folder)
    except Exception as error:  # a damaged config.json, or an architecture that LMDeploy does not know
        raise UserError(f'LMDeploy cannot read {folder}: {reason(error)}') from error
    refusals = backend.refusals(config)
    found: dict[str, Any] = {
        'model': folder, 'architecture': (getattr(config.hf_config, 'architectures', None) or ['unknown'])[0],
        'cache': {'layers': config.num_layers, 'kv_heads': config.num_key_value_heads,
                  'head_dim': config.k_head_dim or config.head_dim,
                  'v_head_dim': config.head_dim if config.v_head_dim is None else config.v_head_dim},
        'formats': [{'name': fmt.name, 'supported': not why, 'reason': why} for fmt, why in refusals]}
    refused = [why for fmt, why in refusals if why and (asked is None or fmt is asked)]
    if len(refused) == (len(refusals) if asked is None else 1):
        return {**found, 'format': asked.name if asked else None, 'scale_file': None, 'layers': [],
                'problems': list(dict.fromkeys(why.partition(': ')[2] if asked is None else why for why in refused))}
    if asked is not None and asked not in CALIBRATED:
        return {**found, 'format': asked.name, 'scale_file': None, 'layers': [], 'problems': []}
    supported = [fmt for fmt, why in refusals if fmt in STATIC and not why]
    if asked is None and not supported:
        return {**found, 'format': None, 'scale_file': None, 'layers': [], 'problems': []}
    return {**found, **audit(folder, (asked or supported[0]).name, kv_scales)}


def _format(policy: str) -> KVFormat:
    try:
        return get_format(policy)
    except ValueError as error:
        raise UserError(str(error)) from error


def audit(model: str, policy: str, kv_scales: str | None = None) -> dict[str, Any]:
    """The static scales or transforms that an engine would use, as JSON-able values.

    Args:
        model: folder, or name on the hub.
        policy: a format with static scales or calibrated transforms.
        kv_scales: a scale file, ``strict``, or None; None leaves it to ``LMDEPLOY_KVQ_SCALES``.

    Returns:
        ``model``, ``format``, ``scale_file`` (path or None), ``layers`` (layer, k_scale, v_scale or k_transform,
        v_transform, and source), and ``problems``: what the engine would refuse or warn of.

    Raises:
        UserError: no such model, or a format that takes nothing from a file.
    """
    if kv_scales is not None:
        os.environ[SCALES] = kv_scales
    fmt = _format(policy)
    if fmt not in CALIBRATED:
        raise UserError(f'{fmt.name} computes its scales as tokens are written; static scales or calibrated transforms '
                        f'have {", ".join(f.name for f in CALIBRATED)}')
    folder = model_folder(model)
    attach()
    from .backends import audit as backend
    from .backends.loading import default_warning, scale_file
    report: dict[str, Any] = {'model': folder, 'format': fmt.name, 'scale_file': scale_file(folder)[0], 'layers': []}
    try:
        rows = backend.audit(folder, fmt.policy)
    except ValueError as error:
        return {**report, 'problems': [str(error)]}
    report['layers'] = [dict(zip(AUDIT[fmt.needs_scales], row)) for row in rows]
    warning = default_warning(fmt, rows)
    return {**report, 'problems': [warning] if warning else []}


def render_model(report: dict[str, Any]) -> str:
    """The check of a model as plain text."""
    cache = report['cache']
    sizes = f'{cache["head_dim"]}' if cache['head_dim'] == cache['v_head_dim'] else \
        f'{cache["head_dim"]} (K) and {cache["v_head_dim"]} (V)'
    lines = [f'Model {report["model"]}',
             f'  {report["architecture"]}: {cache["layers"]} layers, {cache["kv_heads"]} KV heads of {sizes}',
             '', 'Formats that can store its KV cache',
             table([(row['name'], 'yes' if row['supported'] else 'no') for row in report['formats']])]
    whys = dict.fromkeys(row['reason'].removeprefix(f'quant_policy {row["name"]}: ').removeprefix(f'{row["name"]}: ')
                         for row in report['formats'] if not row['supported'])
    lines += [wrapped(why, '    ', '  - ') for why in whys if len(whys) > 1 or why not in report['problems']]
    if report['layers']:
        lines += ['', f'Scales and transforms of {report["format"]}', f'scale file: {report["scale_file"] or "none"}',
                  table([tuple(row.values()) for row in report['layers']], tuple(report['layers'][0]))]
    lines.append('')
    lines += [wrapped(problem, '    ', '  - ') for problem in report['problems']]
    return '\n'.join([*lines, *([] if report['problems'] else ['OK'])])


