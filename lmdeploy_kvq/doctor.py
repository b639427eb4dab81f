"""Check the installation: versions, GPUs, whether LMDeploy will use this package, formats and patches.

Exit code 0: all is well (also when opted out with LMDEPLOY_KVQ=0); 1: there are problems, each with what to do.

examples:
  lmdeploy-kvq doctor
  lmdeploy-kvq doctor --json > report.json     for a bug report
  lmdeploy-kvq doctor --model MODEL            the static scales that fp8 would use, and where they come from
"""
from __future__ import annotations

# Nothing here imports torch or LMDeploy at the top: the check must not change what it looks at, and --help is fast.
import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

from . import _autoload
from .calibrate import CALIBRATED, STATIC, attach, model_folder
from .capacity import CacheShape, gain
from .console import UserError, table, wrapped
from .environment import find_gpus, package_problems, reason, version, versions
from .formats import FORMATS, get_format

AUDIT = {True: ('layer', 'k_scale', 'v_scale', 'source'),  # columns, by whether a format needs scales
         False: ('layer', 'k_transform', 'v_transform', 'source')}
SCALES = _autoload.SCALES
HEAD_DIM = 128
"""Head size at which the table of formats is printed, the most common one."""

TORCH_SWITCH = 'TORCH_DEVICE_BACKEND_AUTOLOAD'  # PyTorch's own: 0 keeps it from loading any entry point
_REPORT = 'Please report this, with the output of `lmdeploy-kvq doctor --json`.'
_MARK = 'lmdeploy_kvq hook state: '
_PROBE = f"""
import sys
sys.path = [p for p in sys.path if p]  # without the current folder, as in LMDeploy's workers
import lmdeploy.messages  # before anything of ours: what loads the hook must be the entry point
import json
from lmdeploy_kvq.doctor import hook_state
print({_MARK!r} + json.dumps(hook_state()))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lmdeploy-kvq doctor``."""
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    parser.add_argument('--model', metavar='MODEL', help='audit the static scales of a model instead; reads no weights')
    parser.add_argument('--quant-policy', metavar='NAME', default=STATIC[0].name,
                        help='format of the audit (default: %(default)s)')
    parser.add_argument('--kv-scales', metavar='PATH|strict', help='as in `lmdeploy serve`')


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq doctor``: print the report; returns 0, or 1 if there are problems."""
    with contextlib.redirect_stdout(sys.stderr):  # imported packages may print: keep the report's stream clean
        report = collect() if args.model is None else audit(args.model, args.quant_policy, args.kv_scales)
    text = render(report) if args.model is None else render_audit(report)
    print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report['problems'] else 0


def audit(model: str, policy: str, kv_scales: str | None = None) -> dict[str, Any]:
    """The static scales that an engine would use, as JSON-able values.

    Args:
        model: folder, or name on the hub.
        policy: a format with static scales or calibrated transforms.
        kv_scales: a scale file, ``strict``, or None; None leaves it to ``LMDEPLOY_KVQ_SCALES``.

    Returns:
        ``model``, ``format``, ``scale_file`` (path or None), ``layers`` (layer, k_scale, v_scale or k_transform,
        v_transform, and source), and
        ``problems``: what the engine would refuse or warn of.

    Raises:
        UserError: no such model, or a format that takes nothing from a file.
    """
    if kv_scales is not None:
        os.environ[SCALES] = kv_scales
    try:
        fmt = get_format(policy)
    except ValueError as error:
        raise UserError(str(error)) from error
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


def render_audit(report: dict[str, Any]) -> str:
    """The audit as plain text."""
    lines = [f'Scales and transforms of {report["format"]} for {report["model"]}',
             f'scale file: {report["scale_file"] or "none"}']
    if report['layers']:
        lines.append(table([tuple(row.values()) for row in report['layers']], tuple(report['layers'][0])))
    lines += [wrapped(problem, '    ', '  - ') for problem in report['problems']]
    return '\n'.join([*lines, *([] if report['problems'] else ['OK'])])


def collect() -> dict[str, Any]:
    """Everything doctor knows, as JSON-able values; imports torch, LMDeploy, and every module that is patched.

    Keys: ``versions``, ``gpus`` (name, compute_capability, memory_gib, fp8_conversion), ``environment``, ``opted_out``,
    ``hook`` (``this_process`` and ``new_process``, see :func:`hook_state`), ``formats``, ``patches`` (module, target,
    state, reason, why), ``problems`` (sentences that say what to do; empty if all is well).
    """
    here, new = hook_state(), _spawned_state()
    gpus, gpu_problems = find_gpus()
    formats, patches = format_rows(), patch_rows()
    names = ('LMDEPLOY_KVQ', 'TRITON_INTERPRET', 'CUDA_VISIBLE_DEVICES', TORCH_SWITCH)
    problems = [*package_problems(), *gpu_problems, *hook_problems(here, new)]
    if here['active']:  # where there is no GPU, some of LMDeploy's modules may refuse to be imported: no problem
        problems += [f'The patch of {row["module"]}.{row["target"]} is not applied: {row["reason"] or row["state"]}. '
                     f'{_REPORT}' for row in patches if row['state'] != 'applied' and (gpus or not row['reason'])]
    return {
        'versions': versions(), 'gpus': gpus,
        'environment': {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)},
        'opted_out': not _autoload.enabled(), 'hook': {'this_process': here, 'new_process': new},
        'formats': formats, 'patches': patches, 'problems': problems,
    }


def hook_state() -> dict[str, Any]:
    """Import torch and LMDeploy as any program does, and see whether the hook is active in this process.

    Returns:
        ``active``; ``policies``: names of this package's formats that QuantPolicy converts; ``problems``: what of the
        installed LMDeploy does not match the patch table; ``error``: why torch or LMDeploy cannot be imported, or None.
    """
    try:
        import torch  # noqa: F401
        from lmdeploy.messages import QuantPolicy
    except Exception as error:  # whatever a broken installation raises is the finding, not a failure of the check
        return {'active': False, 'policies': [], 'problems': [], 'error': reason(error)}
    hook = sys.modules.get(f'{__package__}.hook')
    known = {int(member) for member in QuantPolicy}
    return {'active': bool(hook and hook.HOOK.installed), 'policies': [f.name for f in FORMATS if f.policy in known],
            'problems': list(hook.HOOK.problems) if hook else [], 'error': None}


def _spawned_state() -> dict[str, Any]:
    """:func:`hook_state` of a fresh Python process, as LMDeploy's workers are."""
    try:
        done = subprocess.run([sys.executable, '-c', _PROBE], check=False, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {'active': False, 'policies': [], 'problems': [], 'error': reason(error)}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line[len(_MARK):])
    last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
    return {'active': False, 'policies': [], 'problems': [], 'error': last[:300]}


def format_rows() -> list[dict[str, Any]]:
    """The table of formats: bits per element and bytes per token (1.0: as many as bf16), at head size 128."""
    shape = CacheShape(num_layers=1, kv_heads=8, head_dim=HEAD_DIM)
    return [{'name': fmt.name, 'policy': fmt.policy, 'aliases': list(fmt.aliases), 'summary': fmt.label,
             'experimental': fmt.experimental,
             'bits_per_element': fmt.bits_per_element(HEAD_DIM), 'bytes_against_bf16': 1 / gain(fmt, shape)}
            for fmt in FORMATS]


def patch_rows() -> list[dict[str, str]]:
    """The patch table with its state; imports the patched modules, so that rows take effect where they can.

    ``reason``: why a row is still waiting, i.e. why its module cannot be imported here; empty otherwise.
    """
    from .hook import HOOK
    reasons = {}
    for module in dict.fromkeys(patch.module for patch in HOOK.patches) if HOOK.installed else ():
        try:
            importlib.import_module(module)
        except Exception as error:  # e.g. a module that needs a GPU, or a package that is not installed
            reasons[module] = reason(error)
    return [{'module': patch.module, 'target': patch.target, 'state': HOOK.state(patch),
             'reason': reasons.get(patch.module, ''), 'why': patch.why} for patch in HOOK.patches]


def hook_problems(here: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why LMDeploy will not use this package although it should, and what to do.

    Args:
        here, new: :func:`hook_state` of this process and of a new one.
    """
    if version('lmdeploy') is None or version('torch') is None:
        return []  # said by package_problems
    from .hook import HOOK, SUPPORTED
    first, last = ('.'.join(map(str, v)) for v in SUPPORTED)
    mismatch = HOOK.problems if HOOK.decided else HOOK.check()
    if mismatch:
        return [f'{"; ".join(mismatch)}. The formats of this package are refused, the rest of LMDeploy works: run '
                f'`pip install "lmdeploy>={first},<{last}"`.']
    states = (('this process', here), ('a new process', new))
    problems = [f'LMDeploy cannot be imported in {where}: {state["error"]}. Repair that first: `python -c "import '
                'lmdeploy.messages"` shows it.' for where, state in states if state['error']]
    if problems or not _autoload.enabled():
        return problems
    inactive = [where for where, state in states if not state['active']]
    if inactive:
        problems.append(f'The hook is not active in {" and ".join(inactive)}: {_missing_hook()}')
    problems += [f'The hook is active in {where}, but QuantPolicy({fmt.policy}) ({fmt.name}) is missing. {_REPORT}'
                 for where, state in states for fmt in FORMATS if state['active'] and fmt.name not in state['policies']]
    return problems


def _missing_hook() -> str:
    """The likely reason why PyTorch did not load the hook."""
    if os.environ.get(TORCH_SWITCH, '1') == '0':
        return f'{TORCH_SWITCH}=0 keeps PyTorch from loading extensions; unset it, or call lmdeploy_kvq.install().'
    registered = [point.value for point in metadata.entry_points(group='torch.backends')]
    if not any(value.startswith(f'{__package__}.') for value in registered):
        return 'its entry point is not registered with this Python; run `pip install .` (or `pip install -e .`) again.'
    return 'it failed while loading; the first lines of `python -c "import lmdeploy.messages"` say why.'


def render(report: dict[str, Any]) -> str:
    """The report as plain text, at most 100 columns wide."""
    switch = os.environ.get(_autoload.OPT_OUT)
    lines = ['Versions', table([(name, found or 'not installed') for name, found in report['versions'].items()
                                if found or name != 'cuda'])]
    lines += ['', 'GPUs']
    lines += [f'  {index}: {gpu["name"]}, compute capability {gpu["compute_capability"]}, {gpu["memory_gib"]} GiB, '
              f'fp8 by {gpu["fp8_conversion"]}' for index, gpu in enumerate(report['gpus'])]
    if not report['gpus']:
        lines.append(wrapped('none: serving needs one with CUDA; the reference, the tests and `make demo` also run on '
                             'the CPU', '  '))
    lines += ['', 'Hook into LMDeploy', table([
        (_autoload.OPT_OUT, 'not set (on)' if switch is None else f'{switch!r}'),
        ('this process', _hook_text(report, 'this_process')), ('a new process', _hook_text(report, 'new_process'))])]
    lines += ['', wrapped(f'Formats (bits per element, bytes per token against bf16; at head size {HEAD_DIM})'),
              table([(row['name'], row['policy'], f'{row["bits_per_element"]:.2f}', f'{row["bytes_against_bf16"]:.1%}',
                      ', '.join(row['aliases'])) for row in report['formats']],
                    ['--quant-policy', 'number', 'bits', 'bytes', 'also called'], right='number,bits,bytes')]
    lines += [wrapped(f'{row["name"]} is EXPERIMENTAL: {row["experimental"]}.', '  ') for row in report['formats']
              if row['experimental']]
    applied = sum(row['state'] == 'applied' for row in report['patches'])
    lines += ['', f'Patches of LMDeploy ({applied} of {len(report["patches"])} applied in this process)']
    module = ''
    for row in report['patches']:
        if row['module'] != module:
            module = row['module']
            lines.append(f'  {module}')
        state = f'{row["state"]} ({row["reason"]})' if row['reason'] else row['state']
        lines += [wrapped(state, ' ' * 6, f'    {row["target"]}: '), wrapped(row['why'], ' ' * 6)]
    lines.append('')
    if report['problems']:
        lines.append('1 problem' if len(report['problems']) == 1 else f'{len(report["problems"])} problems')
        lines += [wrapped(problem, '    ', '  - ') for problem in report['problems']]
    elif report['opted_out']:
        lines.append(wrapped('OK, but opted out: LMDeploy runs as if this package were not installed. Unset '
                             f'{_autoload.OPT_OUT} to use its formats.'))
    else:
        lines.append('OK: LMDeploy will use these formats.')
    return '\n'.join(lines)


def _hook_text(report: dict[str, Any], process: str) -> str:
    state = report['hook'][process]
    if not state['active']:
        return 'off: opted out' if report['opted_out'] else 'NOT active, see below'
    added = [str(fmt.policy) for fmt in FORMATS if not fmt.upstream and fmt.name in state['policies']]
    return f'active, QuantPolicy has {", ".join(added) or "none of our members"}'
