"""Docstrings name code with Sphinx roles; in the site, which is Markdown, they become code."""
from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r':\w+:`~?([^`]+)`')


class Roles(griffe.Extension):
    """Turn ``:func:`~package.module.name` `` into ``name``, and ``docs/page.md`` into a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: f'`{match[1].rpartition(".")[2]}`', obj.docstring.value)
