"""What the commands share: errors in the user's words, tables, wrapped lines, progress bars, files to be written."""
from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

MAX_WIDTH = 100


class UserError(Exception):
    """A user's mistake: printed as one sentence, without a traceback; exit code 2."""


def first_line(text: str) -> str:
    """The first line, at most 200 characters of it."""
    return (text.strip().splitlines() or [''])[0][:200]


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return f'{type(error).__name__}: {first_line(str(error))}'.removesuffix(': ')


def width() -> int:
    """Columns to fill: the terminal's, at most 100 (also where the output is no terminal)."""
    return min(MAX_WIDTH, max(60, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


def wrapped(text: str, indent: str = '', first: str | None = None) -> str:
    """``text`` in lines that fit, each behind ``indent``, the first one behind ``first``."""
    return textwrap.fill(text, width(), initial_indent=indent if first is None else first, subsequent_indent=indent,
                         break_on_hyphens=False)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None, right: str = '',
          indent: str = '  ') -> str:
    """Aligned columns, two spaces apart.

    Args:
        rows: cells, shown as ``str(cell)``; at least one row, all of the same length.
        header: one heading per column.
        right: the headings of the columns to align right, separated by commas.
        indent: goes before every line.
    """
    lines = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_right = [name in right.split(',') for name in header or [''] * len(widths)] if right else [False] * len(widths)
    return '\n'.join((indent + '  '.join(
        cell.rjust(size) if far else cell.ljust(size)
        for cell, size, far in zip(line, widths, to_right, strict=True))).rstrip() for line in lines)


@contextmanager
def progress(task: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, without animation and colours where that is no terminal or ``NO_COLOR`` is set.

    Yields:
        What is to be called with the number of units done since the last call.

    Raises:
        UserError: rich is not installed.
    """
    need('rich')
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        number = bar.add_task(task, total=total)

        yield lambda done: bar.advance(number, done)


def need(package: str, extra: str = 'tools') -> None:
    """Raise UserError, saying what to install, unless a package of an optional extra is there."""
    if find_spec(package) is None:
        raise UserError(f'{package} is not installed; run `pip install "lmdeploy-kvq[{extra}]"`')


def writable(path: Path) -> Path:
    """``path``, if a file can be written there; asked before the work whose result it is to hold.

    Raises:
        UserError: no folder there, a folder in its place, or no permission.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f'{path} cannot be written: {folder} is no folder')
    if path.is_dir():
        raise UserError(f'{path} cannot be written: it is a folder')
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f'{path} cannot be written: no permission')
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``, which changes when the block ends without an error, and at once.

    Whoever reads meanwhile, or after the process was killed, finds the old file whole, or none where there was none.
    A pipe or a device, e.g. ``/dev/stdout``, is written to directly: it holds nothing that could be kept.

    Yields:
        A file of the same folder and ending; removed if the block raises. A process that is killed leaves it behind.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()  # a link stays one
    unfinished = target.with_name(f'.{target.stem}-{secrets.token_hex(4)}.part{target.suffix}')
    with unfinished.open('xb') as file:  # writers at the same time have files of their own
        mode = target.stat().st_mode & 0o777 if target.exists() else os.fstat(file.fileno()).st_mode & 0o777
    try:
        yield unfinished
        unfinished.chmod(mode)
        with unfinished.open('rb') as file:
            os.fsync(file.fileno())  # its bytes are on the disk before its name is
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
