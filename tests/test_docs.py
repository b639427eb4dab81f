"""README and docs: generated parts are current, links lead somewhere, the examples run, and the site has every page."""
from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
RUNS = '<!-- runs on a CPU -->'
FENCE = re.compile(r'^(`{3,})(\w*)\n(.*?)^\1$', re.S | re.M)
MORE = {'README.md': 'assert out.shape == (1, 8, 64) and out.isfinite().all() and dense_key.shape == (100, 2, 64)\n'
                     'assert (dense_key - key).abs().max() < 0.05\n'}
"""Assertions that a page's example is not cluttered with."""


def read(page: Path) -> str:
    return page.read_text(encoding='utf-8')


def blocks(page: Path, language: str) -> list[str]:
    """Code of a page, in one language."""
    return [code for _, found, code in FENCE.findall(read(page)) if found == language]


def runnable(page: Path) -> list[str]:
    """Python blocks of a page that are marked as running without a GPU."""
    return re.findall(rf'{RUNS}\n```python\n(.*?)^```$', read(page), re.S | re.M)


def test_generated_parts_are_current():
    """scripts/readme.py would write nothing new."""
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'readme.py', '--check'], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    """Every relative link of a page names a file or folder of the repository."""
    for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', read(page)):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


@pytest.mark.parametrize('page, code', [pytest.param(page, code, id=f'{page.name}-{number}') for page in PAGES
                                        for number, code in enumerate(runnable(page))])
def test_examples_run(page, code):
    """Marked examples run as they stand, each in a process of its own, on CPU tensors."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', f'{code}\n{MORE.get(page.name, "")}'], text=True,
                          capture_output=True, timeout=60,
                          env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_examples_are_code(page):
    """All Python blocks compile, and every marker stands before one."""
    for code in blocks(page, 'python'):
        compile(code, page.name, 'exec')
    markers = re.findall(f'^{RUNS}$', read(page), re.M)
    assert len(markers) == len(runnable(page)), 'a marker stands right before a python block'


def test_the_readme_runs():
    """Its kernels' example is among those that run."""
    assert any('PagedCache' in code for code in runnable(ROOT / 'README.md'))


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_commands_exist(page):
    """Every command line of this package is one that its parser takes, and every policy is known."""
    from lmdeploy_kvq import get_format
    from lmdeploy_kvq.cli import build_parser
    parser = build_parser()
    for line in '\n'.join(blocks(page, 'bash')).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ['lmdeploy-kvq']:
            parser.parse_args(words[1:])  # an unknown option exits
        elif words[:1] == ['lmdeploy'] and '--quant-policy' in words:
            get_format(words[words.index('--quant-policy') + 1])


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_no_bare_angle_brackets(page):
    """What looks like a tag disappears from the site, though GitHub shows it: it has to be code."""
    text = re.sub(r'`[^`]+`', '', FENCE.sub('', read(page)))
    assert not re.findall(r'<[A-Za-z/][^>]*>', text)


def test_navigation_is_complete():
    """mkdocs.yml has every page of docs/ in its navigation, and nothing that is not there."""
    import yaml
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
    named = {path for entry in site['nav'] for path in entry.values()}
    assert named == {page.name for page in (ROOT / 'docs').glob('*.md')} | {'repository/CONTRIBUTING.md'}
    for path in (*site['hooks'], *(f'docs/{css}' for css in site['extra_css'])):
        assert (ROOT / path).is_file()


def test_linked_files_become_part_of_the_site(monkeypatch):
    """Links out of docs/ are rewritten to copies: source as a page, folders as a list, the rest as it is."""
    monkeypatch.syspath_prepend(ROOT / 'scripts')
    import mkdocs_hook as hook
    text = '[a](../lmdeploy_kvq/formats.py) ![b](../benchmarks/fill.svg) [c](../benchmarks/results) [d](scales.md#x)'
    assert hook.targets(text) == ['lmdeploy_kvq/formats.py', 'benchmarks/fill.svg', 'benchmarks/results']
    page = type('Page', (), {'file': type('File', (), {'src_uri': 'performance.md'})})
    assert hook.on_page_markdown(text, page) == (
        '[a](repository/lmdeploy_kvq/formats.py.md) ![b](repository/benchmarks/fill.svg) '
        '[c](repository/benchmarks/results/index.md) [d](scales.md#x)')
    assert 'FORMATS: tuple' in hook.content('lmdeploy_kvq/formats.py') and hook.content('benchmarks/fill.svg') is None
    assert '[decode.json](decode.json)' in hook.content('benchmarks/results')


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks' / 'results').glob('*.json')), ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    """A result file names GPU, versions and commit, and has rows."""
    data = json.loads(path.read_text())
    assert data['rows'] and {'gpu', 'torch', 'triton', 'lmdeploy', 'commit', 'date'} <= set(data['environment'])
