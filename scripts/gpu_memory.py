"""Device memory as nvidia-smi tells it: of a process and its children where it knows, else of whole GPUs."""
from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType


def query(what: str) -> list[list[str]]:
    """Rows of ``nvidia-smi --query-WHAT`` of the GPUs that this process may use; empty where it is missing or fails."""
    command = ['nvidia-smi', f'--query-{what}', '--format=csv,noheader,nounits']
    if visible := os.environ.get('CUDA_VISIBLE_DEVICES'):
        command.append(f'--id={visible}')
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.split(',')] for line in lines]


def descendants(pid: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            after_name = stat.read_text().rpartition(')')[2].split()  # state, parent, ...
        except OSError:  # it has ended
            continue
        parents[int(stat.parent.name)] = int(after_name[1])
    found, more = {pid}, {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def used_mib(pid: int | None = None) -> tuple[float | None, str]:
    """MiB in use, and ``processes`` (of ``pid`` and its children) or ``device`` (nothing is known of processes).

    None where there is no GPU.
    """
    if pid is not None:
        family = descendants(pid)
        mine = [row[1] for row in query('compute-apps=pid,used_memory') if row[0].isdecimal() and int(row[0]) in family]
        if mine and all(cell.isdecimal() for cell in mine):
            return float(sum(map(int, mine))), 'processes'
    devices = [row[0] for row in query('gpu=memory.used')]
    return (float(sum(map(int, devices))), 'device') if devices and all(map(str.isdecimal, devices)) else (None, 'none')


class Samples:
    """Device memory every few seconds while the ``with`` block runs.

    Attributes:
        rows: (seconds since the begin, MiB).
    """

    def __init__(self, pid: int, every: float = 2.0):
        self.rows: list[tuple[float, float]] = []
        self._pid, self._every, self._stop = pid, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(self._every):
            mib, _ = used_mib(self._pid)
            if mib is not None:
                self.rows.append((time.monotonic() - began, mib))

    def __enter__(self) -> Samples:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(30)
