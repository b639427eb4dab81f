"""docs/compatibility.md: outcomes reach the file, rows are checked, and verdicts say no more than was seen."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rows import BY_ID, ROWS, SECTIONS, Row

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest

@pytest.mark.covers('arch.llama', 'feature.graphs')
def test_good(): pass

@pytest.mark.parametrize('name', [pytest.param('x', marks=pytest.mark.covers('arch.qwen2'))])
def test_bad(name): assert name == 'y'

@pytest.mark.covers('arch.mla')
def test_skipped(): pytest.skip('no such thing')

@pytest.fixture
def broken():
    yield
    raise ValueError

@pytest.mark.covers('arch.phi3')
def test_broken_afterwards(broken): pass

def test_of_nothing(): pass
"""


@pytest.fixture(scope='module')
def compatibility():
    """The generator of the page."""
    import compatibility
    return compatibility


def run(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess:
    conftest = f"import sys\nsys.path.insert(0, {str(HERE)!r})\npytest_plugins = ['evidence']\n"
    (folder / 'conftest.py').write_text(conftest)
    (folder / 'test_it.py').write_text(text)
    return subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *arguments, str(folder)],
                          cwd=folder, text=True, capture_output=True, timeout=120)


@pytest.mark.parametrize('workers', [0, 2])
def test_outcomes_reach_the_file(tmp_path, workers):
    """With and without xdist; a failure after the test counts, what covers nothing is left out, old tests stay."""
    out = tmp_path / 'compatibility_x.json'
    xdist = ['-n', str(workers)] if workers else []
    assert run(tmp_path, TESTS, '--evidence', str(out), *xdist).returncode == 1
    data = json.loads(out.read_text())
    found = {row['test'].partition('::')[2]: row for row in data['rows']}
    assert {name: row['outcome'] for name, row in found.items()} == {
        'test_good': 'passed', 'test_bad[x]': 'failed', 'test_skipped': 'skipped', 'test_broken_afterwards': 'failed'}
    assert found['test_good']['covers'] == ['arch.llama', 'feature.graphs']
    assert found['test_skipped']['reason'] == 'no such thing' and data['environment']['commit']
    if not workers:
        run(tmp_path, TESTS.replace("== 'y'", "== 'x'"), '--evidence', str(out), '-k', 'bad')
        again = {row['test'].partition('::')[2]: row['outcome'] for row in json.loads(out.read_text())['rows']}
        assert again == {name: 'passed' if 'bad' in name else row['outcome'] for name, row in found.items()}
        skipped = TESTS.replace('def test_bad(name):', 'def test_bad(name): pytest.skip(name);')
        run(tmp_path, skipped, '--evidence', str(out))
        again = {row['test'].partition('::')[2]: row['outcome'] for row in json.loads(out.read_text())['rows']}
        assert again['test_bad[x]'] == 'passed', 'a test that is skipped later keeps what was seen'


def test_unknown_rows_are_an_error(tmp_path):
    """A misspelt row would be evidence for nothing."""
    done = run(tmp_path, TESTS.replace('arch.llama', 'arch.lama'))
    assert done.returncode == 4 and 'arch.lama: not a row of tests/rows.py' in done.stdout + done.stderr


def test_verdicts(compatibility):
    """No more than what was seen: a CPU test does not show what needs a GPU, one failure outweighs what passed."""
    on = {where: {'test': 'tests/a.py::b', 'covers': ['arch.llama'], 'outcome': 'passed', 'gpu': where}
          for where in ('', 'H200')}
    gpu, cpu = Row('arch.llama', 'x'), Row('fault.fuzz', 'x', needs_gpu=False)
    bad = {**on['H200'], 'outcome': 'failed'}
    assert compatibility.verdict(gpu, [on['']]) == 'not run on a GPU yet; its CPU tests pass'
    assert compatibility.verdict(gpu, [on[''], on['H200']]) == compatibility.verdict(cpu, [on['']]) == 'works'
    assert compatibility.verdict(gpu, [on['H200'], bad]) == '**fails**'
    assert compatibility.verdict(gpu, []) == 'no result yet'
    assert compatibility.verdict(Row('arch.mla', 'x', refused='no'), [on['']]) == 'refused: no'
    lines = compatibility.tables([on['H200'], bad])[SECTIONS['arch']]
    assert lines[0] == ['Llama', '**fails**', '[a.py](../tests/a.py): 1 on GPU']
    seen = [{**test, 'commit': 'abc'} for test in on.values()]
    assert 'CPU, H200; commits abc' in compatibility.origin(seen)


@pytest.mark.parametrize('file', ['soak.json', 'soak_seed_1.json'])
@pytest.mark.parametrize('failed', [[], ['fp8: 3 answers no rounding explains']])
def test_the_last_run_under_load_counts(compatibility, tmp_path, failed, file):
    """Beside the tests: a run that fails is a row that fails, whatever shorter tests said before."""
    environment = {'gpu': 'H200', 'gpus': '1', 'commit': 'abc'}
    tests = [{'test': 'tests/a.py::b', 'covers': ['load.soak'], 'outcome': 'passed'}]
    (tmp_path / 'compatibility_gpu.json').write_text(json.dumps({'environment': environment, 'rows': tests}))
    (tmp_path / file).write_text(json.dumps({'environment': environment, 'failed': failed, 'rows': []}))
    line = compatibility.tables(compatibility.evidence(tmp_path))[SECTIONS['load']][0]  # load.soak comes first
    assert line[1] == ('**fails**' if failed else 'works') and f'soak.py): {int(not failed)} on GPU' in line[2]


@pytest.mark.parametrize('failed', [[], ['round 1: 3 blocks stay in use']])
def test_audits_of_pages_count(compatibility, tmp_path, failed):
    """By what scripts/page_audit.py says of them."""
    (tmp_path / 'page_audit_x.json').write_text(json.dumps({
        'environment': {'gpu': 'H200', 'gpus': '1', 'commit': 'abc'}, 'failed': failed, 'rows': []}))
    line = compatibility.tables(compatibility.evidence(tmp_path))[SECTIONS['load']][1]  # load.pages comes second
    assert line[1] == ('**fails**' if failed else 'works') and 'page_audit.py' in line[2]


@pytest.mark.parametrize('failed', [[], ['racecheck: fp8']])
def test_the_last_run_of_sanitizers_counts(compatibility, tmp_path, failed):
    """Of all formats and both tools, hence not what the folder of an older run holds, sanitize_6661cf2.json."""
    for name, found in (('sanitize', failed), ('sanitize_abc', ['memcheck: fp8'])):
        (tmp_path / f'{name}.json').write_text(json.dumps({
            'environment': {'gpu': 'H200', 'gpus': '1', 'commit': 'abc'}, 'failed': found, 'rows': []}))
    lines = compatibility.tables(compatibility.evidence(tmp_path))[SECTIONS['fault']]
    state, = (line[1] for line in lines if 'sanitize.py' in line[2])
    assert state == ('**fails**' if failed else 'works')


def test_rows_have_sections_and_names_of_their_own():
    """Ids are unique and belong to a section."""
    assert len(BY_ID) == len(ROWS) and {row.id.partition('.')[0] for row in ROWS} == set(SECTIONS)
