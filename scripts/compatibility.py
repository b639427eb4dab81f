"""The tables of docs/compatibility.md, from what ``pytest --evidence`` wrote: every row with the tests that show it."""
from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_tables import RESULTS, ROOT

sys.path.insert(0, str(ROOT / 'tests'))
from rows import ROWS, SECTIONS, Row

SOAKS = ('soak.json', 'soak_seed_*.json')  # the last run under load of every seed


def evidence(folder: Path = RESULTS) -> list[dict]:
    """Tests that ran, runs under load, audits of pages and the last run of sanitizers, each with ``gpu`` (its name,
    empty on a CPU) and ``commit``."""
    tests = []
    for path in sorted(folder.glob('compatibility_*.json')):
        data = json.loads(path.read_text(encoding='utf-8'))
        env = data['environment']
        gpu = env['gpu'] if int(env['gpus']) else ''
        tests += [{'commit': env['commit'], **row, 'gpu': gpu} for row in data['rows'] if row['outcome'] != 'skipped']
    for names, script, row in (*((names, 'soak.py', 'load.soak') for names in SOAKS),
                               ('page_audit_*.json', 'page_audit.py', 'load.pages'),
                               ('sanitize.json', 'sanitize.py', 'fault.sanitizer')):
        for path in sorted(folder.glob(names)):
            data = json.loads(path.read_text(encoding='utf-8'))
            tests.append({'test': f'scripts/{script}', 'covers': [row], 'gpu': data['environment']['gpu'],
                          'outcome': 'failed' if data['failed'] else 'passed',
                          'commit': data['environment']['commit']})
    return tests


def verdict(row: Row, tests: Sequence[Mapping[str, str]]) -> str:
    """What tests say of a row: ``fails`` if any of them does."""
    if any(test['outcome'] == 'failed' for test in tests):
        return '**fails**'
    passed = [test for test in tests if test['outcome'] == 'passed']
    if not passed:
        return 'no result yet'
    if row.refused:
        return f'refused: {row.refused}'
    if row.needs_gpu and not any(test['gpu'] for test in passed):
        return 'not run on a GPU yet; its CPU tests pass'
    return 'works'


def shown_by(tests: Sequence[Mapping[str, str]]) -> str:
    """Files of the tests, with how many of each passed where."""
    counts: dict[tuple[str, str], int] = {}
    for test in tests:
        key = test['test'].partition('::')[0], 'GPU' if test['gpu'] else 'CPU'
        counts[key] = counts.get(key, 0) + (test['outcome'] == 'passed')
    return '; '.join(f'[{Path(file).name}](../{file}): {number} on {where}'
                     for (file, where), number in sorted(counts.items()))


def tables(tests: Sequence[Mapping[str, str]]) -> dict[str, list[list[str]]]:
    """Title of a section to its lines: what, state, tests passed."""
    found: dict[str, list[list[str]]] = {title: [] for title in SECTIONS.values()}
    for row in ROWS:
        own = [test for test in tests if row.id in test['covers']]
        found[SECTIONS[row.id.partition('.')[0]]].append([row.what, verdict(row, own), shown_by(own)])
    return found


def origin(tests: Sequence[Mapping[str, str]]) -> str:
    """What the tables are of."""
    where = sorted({test['gpu'] or 'CPU' for test in tests})
    commits = sorted({test['commit'] for test in tests})
    return f'*From runs on {", ".join(where) or "nothing yet"}; commits {", ".join(commits) or "none"}.*'
