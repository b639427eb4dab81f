"""Plain-text output shared by the commands: errors in the user's words, tables, wrapped lines."""
from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

MAX_WIDTH = 100


class UserError(Exception):
    """A user's mistake: printed as one sentence, without a traceback; exit code 2."""


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
