"""Docstrings as the site wants them: Sphinx roles become code, and arguments that share a line get one each."""
from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r':\w+:`~?([^`]+)`')
SHARED = re.compile(r'^(    )(\w+(?:, \w+)+)(: .*\n?(?:^     +.*\n?)*)', re.M)  # with the lines that continue it


class Docstrings(griffe.Extension):
    """Change what mkdocstrings reads; the files stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """A docstring without roles, and with one entry per argument."""
    text = ROLE.sub(lambda match: f'`{match[1].rpartition(".")[2]}`', text)
    return SHARED.sub(_split, text)


def _split(match: re.Match) -> str:
    indent, names, what = match.groups()
    return ''.join(f'{indent}{name}{what.rstrip()}\n' for name in names.split(', '))
