"""Check the installation: versions, GPUs, whether LMDeploy will use this package, formats and patches; or a model.

Exit code 0: all is well (also when opted out with LMDEPLOY_KVQ=0); 1: there are problems, each with what to do; 2: a
mistake in what was asked.

examples:
  lmdeploy-kvq doctor
  lmdeploy-kvq doctor --json > report.json     for a bug report
  lmdeploy-kvq doctor --kernels                run every format's kernels once
  lmdeploy-kvq doctor --model MODEL            formats that can store its cache, scales that fp8 would use and whence
"""
from __future__ import annotations

# Nothing here imports torch or LMDeploy at the top: the check must not change what it looks at, and --help is fast.
import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

from . import _autoload
from .console import UserError, reason, table, wrapped
from .environment import find_gpus, machine, package_problems, version, versions
from .formatcheck import HEAD_DIM, format_lines, format_rows, run_kernels
from .formats import FORMATS
from .modelcheck import check_model, render_model

TORCH_SWITCH = 'TORCH_DEVICE_BACKEND_AUTOLOAD'  # PyTorch's own: 0 keeps it from loading any entry point
_VARIABLES = ('LMDEPLOY_', 'TRITON_', 'CUDA_VISIBLE_DEVICES', TORCH_SWITCH)
_SECRET = re.compile('KEY|TOKEN|SECRET|PASSWORD')
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
    parser.add_argument('--kernels', action='store_true',
                        help="run every format's kernels once, and compare them with the reference (on a GPU, or with "
                        'TRITON_INTERPRET=1)')
    parser.add_argument('--model', metavar='MODEL',
                        help='check a model instead: formats that can store its cache, its scales; reads no weights')
    parser.add_argument('--quant-policy', metavar='NAME', help='the format that is to serve the model (default: any)')
    parser.add_argument('--kv-scales', metavar='PATH|strict', help='as in `lmdeploy serve`')


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq doctor``: print the report; returns 0, or 1 if there are problems."""
    if args.model is None and (args.quant_policy or args.kv_scales):
        raise UserError(f'{"--quant-policy" if args.quant_policy else "--kv-scales"} is about a model: give --model '
                        'MODEL')
    with contextlib.redirect_stdout(sys.stderr):  # imported packages may print: keep the report's stream clean
        report = collect(args.kernels) if args.model is None else \
            check_model(args.model, args.quant_policy, args.kv_scales)
    text = render(report) if args.model is None else render_model(report)
    print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report['problems'] else 0


def collect(kernels: bool = False) -> dict[str, Any]:
    """Everything doctor knows, as JSON-able values; imports torch, LMDeploy, and every module that is patched.

    Args:
        kernels: run every format's kernels once, see :func:`~lmdeploy_kvq.formatcheck.run_kernels`.

    Returns:
        ``machine``, ``versions``, ``gpus`` (name, compute_capability, memory_gib, fp8_conversion), ``environment``,
        ``opted_out``, ``hook`` (``this_process`` and ``new_process``, see :func:`hook_state`), ``formats`` (see
        :func:`~lmdeploy_kvq.formatcheck.format_rows`), ``patches`` (module, target, state, reason, why), ``problems``
        (sentences that say what to do; empty if all is well).
    """
    here, new = hook_state(), _spawned_state()
    gpus, gpu_problems = find_gpus()
    formats, patches = format_rows(gpus, here['active']), patch_rows()
    problems = [*package_problems(), *gpu_problems, *hook_problems(here, new)]
    if here['active']:  # where there is no GPU, some of LMDeploy's modules may refuse to be imported: no problem
        problems += [f'The patch of {row["module"]}.{row["target"]} is not applied: {row["reason"] or row["state"]}. '
                     f'{_REPORT}' for row in patches if row['state'] != 'applied' and (gpus or not row['reason'])]
    if kernels:
        problems += [f'{problem} {_REPORT}' for problem in run_kernels(formats)]
    return {
        'machine': machine(), 'versions': versions(), 'gpus': gpus,
        'environment': {name: value for name, value in sorted(os.environ.items())
                        if name.startswith(_VARIABLES) and not _SECRET.search(name)},
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


def patch_rows() -> list[dict[str, str]]:
    """The patch table with its state; imports the patched modules, so that rows take effect where they can.

    ``reason``: why a row is still waiting, i.e. why its module cannot be imported here; empty otherwise.
    """
    from .hook import HOOK
    if not HOOK.decided:
        HOOK.check()  # which rows are the installed version's
    reasons = {}
    for module in dict.fromkeys(patch.module for patch in HOOK.rows) if HOOK.installed else ():
        try:
            importlib.import_module(module)
        except Exception as error:  # e.g. a module that needs a GPU, or a package that is not installed
            reasons[module] = reason(error)
    return [{'module': patch.module, 'target': patch.target, 'state': HOOK.state(patch),
             'reason': reasons.get(patch.module, ''), 'why': patch.why} for patch in HOOK.rows]


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
    lines = ['Machine', table(list(report['machine'].items())), '', 'Versions',
             table([(name, found or 'not installed') for name, found in report['versions'].items()
                    if found or name != 'cuda'])]
    lines += ['', 'GPUs']
    lines += [f'  {index}: {gpu["name"]}, compute capability {gpu["compute_capability"]}, {gpu["memory_gib"]} GiB, '
              f'fp8 by {gpu["fp8_conversion"]}' for index, gpu in enumerate(report['gpus'])]
    if not report['gpus']:
        lines.append(wrapped('none: serving needs one with CUDA; the reference, the tests and `make demo` also run on '
                             'the CPU', '  '))
    if report['environment']:
        lines += ['', 'Environment', table(list(report['environment'].items()))]
    lines += ['', 'Hook into LMDeploy', table([
        (_autoload.OPT_OUT, 'not set (on)' if switch is None else f'{switch!r}'),
        ('this process', _hook_text(report, 'this_process')), ('a new process', _hook_text(report, 'new_process'))])]
    lines += ['', wrapped(f'Formats (bits per element, bytes per token against bf16; at head size {HEAD_DIM})'),
              *format_lines(report['formats'])]
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
