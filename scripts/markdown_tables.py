"""Markdown tables of result files, for readme.py."""
from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
NOT_MEASURED = '*Not measured yet.*'


def results(name: str) -> list[dict]:
    """Rows of a result file, none if it is not there."""
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text())['rows'] if path.exists() else []


def measured(*names: str) -> str:
    """Which commits result files are of: a table says more about the kernels of that commit than about later ones."""
    found = {}
    for name in names:
        path = RESULTS / f'{name}.json'
        if path.exists():
            found[name] = json.loads(path.read_text())['environment']
    said = '; '.join(f'{name}.json: commit {env["commit"]}, {env["date"]}' for name, env in found.items())
    return f'\n\n*{said}.*' if said else ''


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (header, ['---'] * len(header), *rows))


def number(row: dict, key: str, form: str) -> str:
    """One figure of a row, empty where it has none."""
    return format(row[key], form) if row.get(key) is not None else ''
