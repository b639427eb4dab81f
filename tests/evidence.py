"""pytest plugin: which tests are evidence for which row of docs/compatibility.md, and what became of them.

``pytest --evidence=FILE`` writes the outcomes of the tests that carry ``@pytest.mark.covers(ROW, ...)`` as a result
file (environment, rows), each with the commit and the number of GPUs it was seen with; with a space for the equals
sign, pytest would take a file that exists for tests. Outcomes in the file of tests that were not run again, or skipped
this time, stay if they are of the same kind of GPU: a suite takes longer than the time on a GPU that there is at once.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from rows import BY_ID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
PROPERTY = 'covers'
LONG = 5.0  # seconds of a test after which the file is written at once: a session on a lent GPU may be cut off


def covered(item: pytest.Item) -> list[str]:
    """Rows that a test is evidence for.

    Raises:
        pytest.UsageError: it names one that tests/rows.py does not have.
    """
    found = [row for mark in item.iter_markers('covers') for row in mark.args]
    unknown = [row for row in found if row not in BY_ID]
    if unknown:
        raise pytest.UsageError(f'{item.nodeid} covers {", ".join(unknown)}: not a row of tests/rows.py')
    return list(dict.fromkeys(found))


class Evidence:
    """Outcomes of marked tests, as reports come in; under xdist in the process that the others report to."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's call, or whatever else of it did not pass."""
        rows = dict(report.user_properties).get(PROPERTY)
        if rows and (report.when == 'call' or report.outcome != 'passed'):
            test = re.sub(r'@\w+$', '', report.nodeid)  # without the group that xdist appends
            entry = self.rows.setdefault(test, {'test': test, 'covers': rows, 'outcome': 'passed', 'seconds': 0.0})
            entry['seconds'] = round(entry['seconds'] + report.duration, 1)
            if report.outcome != 'passed' and entry['outcome'] != 'failed':  # a teardown that fails is a failure too
                entry['outcome'] = report.outcome
            if report.outcome == 'skipped':
                entry['reason'] = report.longrepr[2].removeprefix('Skipped: ')
            if report.duration > LONG:
                self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        """Write the file, if any marked test was run."""
        from benchlib import environment, write_results
        if not self.rows:
            return
        before = json.loads(self.path.read_text()) if self.path.exists() else {'rows': [], 'environment': {}}
        now, found = environment(), {}
        if before['environment'].get('gpu') == now['gpu']:
            found = {row['test']: {'commit': before['environment']['commit'], **row} for row in before['rows']}
        for test, row in self.rows.items():
            if row['outcome'] != 'skipped' or test not in found:
                found[test] = {**row, 'commit': now['commit'], 'gpus': now['gpus']}
        write_results(self.path.stem, [row for _, row in sorted(found.items())], self.path.parent)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption('--evidence', type=Path, metavar='FILE.json',
                     help='write what became of the tests that docs/compatibility.md rests on')


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; collect reports where asked, in the process that has all of them."""
    config.addinivalue_line('markers', 'covers(row, ...): evidence for these rows of docs/compatibility.md')
    path = config.getoption('--evidence')
    if path is not None and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(Evidence(path.resolve()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hand the rows to the reports, which reach the process that writes the file."""
    for item in items:
        if rows := covered(item):
            item.user_properties.append((PROPERTY, rows))
