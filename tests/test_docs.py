"""README and docs: generated parts are current, links lead somewhere, and the examples run."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])


def test_generated_parts_are_current():
    """scripts/readme.py would write nothing new."""
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'readme.py', '--check'], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    """Every relative link of a page names a file or folder of the repository."""
    for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text(encoding='utf-8')):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


def test_readme_example_runs():
    """The kernels' example of the README, as it stands, on CPU tensors."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)
    code = next(block for block in blocks if 'PagedCache' in block)
    code += '\nassert out.shape == (1, 8, 64) and out.isfinite().all() and dense_key.shape == (100, 2, 64)\n' \
            'assert (dense_key - key).abs().max() < 0.05\n'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True, capture_output=True,
                          env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks' / 'results').glob('*.json')), ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    """A result file names GPU, versions and commit, and has rows."""
    data = json.loads(path.read_text())
    assert data['rows'] and {'gpu', 'torch', 'triton', 'lmdeploy', 'commit', 'date'} <= set(data['environment'])
