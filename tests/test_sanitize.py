"""scripts/sanitize.py without a GPU: where the tool is found, what its output means, which launches there are."""
from __future__ import annotations

import json
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import sanitize
import sanitize_launches
import torch
from helpers import by_name

import lmdeploy_kvq as kvq

TOOL = """#!/bin/sh
# stands in for compute-sanitizer: runs nothing, and prints what that prints at the end
echo "all launches done"
case "$2-$*" in
  memcheck-*fp8_per*) echo '========= ERROR SUMMARY: 2 errors'; exit 86;;
  racecheck-*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)';;
  synccheck-*) ;;
  *) echo '========= ERROR SUMMARY: 0 errors';;
esac
"""


@pytest.fixture
def tool(tmp_path, monkeypatch) -> Path:
    """A program of that name on the PATH."""
    path = tmp_path / 'bin' / 'compute-sanitizer'
    path.parent.mkdir()
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv('PATH', f'{path.parent}:/usr/bin:/bin')
    return path


def test_the_tool_is_found(tool, monkeypatch, tmp_path):
    assert sanitize.find_sanitizer() == str(tool)
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    tool.chmod(0o644)  # as a wheel is that was unpacked by hand
    assert sanitize.find_sanitizer() == str(tool) and tool.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize('name, fmt, errors, ok', [
    ('memcheck', 'fp8', 0, True), ('memcheck', 'fp8_per_token_head', 2, False), ('racecheck', 'fp8', 0, True),
    ('synccheck', 'fp8', None, False)])
def test_verdicts_follow_the_tools_summary(tool, tmp_path, name, fmt, errors, ok):
    """An error, or no summary at all, is no pass."""
    row = sanitize.check(str(tool), name, fmt, 1, tmp_path)
    assert (row['errors'], row['ok'], row['finished']) == (errors, ok, True)


@pytest.mark.parametrize('seconds, ended', [(30, False), (2, True)])
def test_an_interrupt_leaves_the_rows_there_are(tool, tmp_path, monkeypatch, seconds, ended):
    """Those that have ended, and those that were under way as finished or not; it is no pass, for some are missing."""
    fast, slow, never = (fmt.name for fmt in kvq.FORMATS[:3])
    waits = f'case "$*" in *{slow}*) echo "{slow}: fill: 0.1 s"; sleep {seconds};; esac\n'
    tool.write_text(TOOL.replace('echo "all', waits + 'echo "all'))
    check, begun = sanitize.check, []

    def interrupting(program, kind, name, *others):
        begun.append(name)
        if name == slow:
            threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        return check(program, kind, name, *others[:-1], 60.0 if ended else 3.0)

    monkeypatch.setattr(sanitize, 'check', interrupting)
    monkeypatch.setattr(sanitize, 'launch_alone', lambda name: 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        done = sanitize.main(['--tools', 'racecheck', '--formats', f'{fast},{slow},{never}', '--jobs', '1',
                              '--log', str(tmp_path), '--out', str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    written = json.loads((tmp_path / 'sanitize.json').read_text())
    rows = written['rows']
    assert done == 1 and begun == [fast, slow]
    assert written['failed'] == [f'racecheck: {slow}'] * (not ended) + ['1 were left out']
    assert [(row['format'], row['finished'], row['launches'], row['ok']) for row in rows] == [
        (fast, True, 0, True), (slow, ended, 1, ended)]


def test_mistakes(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        sanitize.main(['--tools', 'memcheck,valgrind'])
    assert 'valgrind: known are memcheck' in capsys.readouterr().err
    monkeypatch.setattr(sanitize, 'find_sanitizer', lambda: None)
    assert sanitize.main([]) == 2 and 'nvidia-cuda-sanitizer-api' in capsys.readouterr().err


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_every_kernel_is_launched_for_every_format(fmt):
    """Each at several head sizes; decode with one, two and three levels of its tree."""
    names = [name for name, _ in sanitize_launches.launches(fmt)]
    assert len(names) == len(set(names))
    for kernel in ('fill', 'flatten', 'decode', 'step', 'merge'):
        assert any(name.startswith(kernel) for name in names)
    fan = sanitize_launches.FAN.value
    pieces = {programs for programs, _ in sanitize_launches.TREES.values()}
    assert any(1 < n <= fan for n in pieces) and any(fan < n <= fan**2 for n in pieces) and max(pieces) > fan**2


def test_a_launch_compares(device):
    """Those that are cheap in the interpreter, and one with a wrong reference; then with another result each time."""
    found = dict(sanitize_launches.launches(kvq.FORMATS[0]))
    found['merge'](2)
    found['step, heads of 64'](2)
    merge = sanitize_launches.merge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanitize_launches, 'merge', lambda *args: (merge(*args), args[4].add_(torch.rand(()) * 1e-6)))
        with pytest.raises(AssertionError, match='two launches differ'):
            found['merge'](2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanitize_launches, 'frobenius', lambda x, y: 1.0)
        with pytest.raises(AssertionError, match='not the attention over both'):
            found['merge'](1)
