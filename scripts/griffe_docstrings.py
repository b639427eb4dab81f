"""Docstrings as the site wants them: Sphinx roles become code, and arguments that share a line get one each."""
from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r':\w+:`~?([^`]+)`')
SHARED = re.compile(r'^(    )(\w+(?:, \w+)+)(: .*\n?(?:^     +.*\n?)*)', re.M)  # with the lines that continue it


class Docstrings(griffe.Extension):
    """Change what mkdocstrings reads; the files stay as they are."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        change(pkg)


def change(obj: griffe.Object) -> None:
    """Make the docstrings of an object and of what it contains readable."""
    if obj.docstring is not None:
        names = [p.name for p in obj.parameters] if obj.is_function else list(obj.members) if obj.is_class else []
        obj.docstring.value = readable(obj.docstring.value, names)
    for member in obj.members.values():
        if not member.is_alias:
            change(member)


def readable(text: str, names: list[str]) -> str:
    """A docstring without roles, and with one entry for each of the names it describes."""
    text = ROLE.sub(lambda match: f'`{match[1].rpartition(".")[2]}`', text)
    if names:  # "    a: this. b: that"
        one = '|'.join(map(re.escape, names))
        text = re.sub(rf'[.;]\s+(?=(?:{one})(?:, (?:{one}))*: )', '.\n    ', text)
    return SHARED.sub(_split, text)


def _split(match: re.Match) -> str:
    indent, names, what = match.groups()
    return ''.join(f'{indent}{name}{what.rstrip()}\n' for name in names.split(', '))
