"""LMDeploy versions: in the supported ones' own wheels, and what the others are told.

Inside an older wheel the checks of inside_version.py run, in a process of their own whose path has the wheel first. The
installed LMDeploy, which is the newest supported, has the rest of this suite.
"""
from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import MODEL, clean_environment, python
from test_hook_unknown import REFUSED, with_version
from wheels import OLDER, ROOT, NoWheel, unpacked

from lmdeploy_kvq import FORMATS, hook, versions

FIRST, LAST = ('.'.join(map(str, version)) for version in hook.SUPPORTED)
EACH = pytest.mark.parametrize('version', [
    pytest.param(version, marks=pytest.mark.covers('version.' + '_'.join(version.split('.')[:2])))
    for version in OLDER])


def path_with(wheel: Path) -> dict[str, str]:
    """Environment of a process that finds a wheel's LMDeploy first, and this package."""
    before = os.environ.get('PYTHONPATH', '')  # it may be what has this package's entry point
    return {'PYTHONPATH': os.pathsep.join(filter(None, map(str, (wheel, ROOT, Path(__file__).parent, before))))}


def or_skip(version: str) -> Path:
    try:
        return unpacked(version)
    except NoWheel as error:
        pytest.skip(str(error))


# ---- older wheels

@pytest.fixture(scope='module')
def inside(tmp_path_factory):
    """Every older wheel's process, side by side: version to what it printed, as a future."""

    def run(version: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp(version)
        return subprocess.run(
            [sys.executable, Path(__file__).with_name('inside_version.py'), version, folder], check=False,
            capture_output=True, text=True, timeout=300, cwd=folder,
            env={**clean_environment(), **path_with(unpacked(version)), 'CUDA_VISIBLE_DEVICES': ''})

    with ThreadPoolExecutor(len(OLDER)) as pool:
        yield {version: pool.submit(run, version) for version in OLDER}


@EACH
def test_the_table_works_in_the_wheel(inside, version):
    """Policies, command line, pages, refusals, graphs, steps of a model, doctor; every original comes back."""
    or_skip(version)
    done = inside[version].result()
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    failed = {name: error for name, error in results.items() if error}
    assert len(results) > 5 and not failed, '\n'.join(f'{name}: {error}' for name, error in failed.items())


def test_the_adapter_stays_small():
    """One module below 150 lines, which alone knows of versions; else older ones are to be refused."""
    assert len(Path(versions.__file__).read_text(encoding='utf-8').splitlines()) < 150
    for path in Path(versions.__file__).parent.rglob('*.py'):
        if path.name not in ('versions.py', 'hook.py'):
            assert not re.search(r"version\('lmdeploy'\) *[<>=]|lmdeploy.__version__", path.read_text(encoding='utf-8'))


def test_rows_of_older_versions():
    """The table itself is the newest version's; a moved row keeps its reason, and none is adapted in vain."""
    assert versions.adapted(hook.PATCHES, versions.TABLE) is hook.PATCHES
    names = {patch.name for patch in hook.PATCHES}
    assert {*versions._OTHERWISE, *versions._GONE} <= names
    for version, gone, added in (((0, 17), 1, 0), ((0, 16), 2, 2)):
        rows = versions.adapted(hook.PATCHES, version)
        assert len(rows) == len(hook.PATCHES) - gone + added == len({row.name for row in rows})
        assert {row.why for row in rows[:len(rows) - added]} <= {patch.why for patch in hook.PATCHES}


# ---- the range

def test_the_range_is_the_one_that_is_installed():
    """hook.SUPPORTED, setup.cfg, and the wheels that are tested, agree."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    requires = parser['options']['install_requires'].split()
    assert f'lmdeploy>={FIRST},<{LAST}' in requires
    minors = sorted({tuple(map(int, version.split('.')[:2])) for version in OLDER} | {versions.TABLE})
    assert minors[0] == hook.SUPPORTED[0] and minors[-1] == versions.TABLE
    assert hook.SUPPORTED[1] == (versions.TABLE[0], versions.TABLE[1] + 1)
    for file in ('README.md', 'docs/index.md'):
        assert f'lmdeploy {FIRST} to {".".join(map(str, versions.TABLE))}' in (ROOT / file).read_text(encoding='utf-8')


@pytest.mark.covers('version.0_18')
def test_patch_releases_are_checked_row_by_row():
    """0.18.1 is taken at its word if its source has every target as expected (here it is 0.18.0's)."""
    python(with_version('0.18.1', """
import lmdeploy
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy_kvq import hook
assert hook.HOOK.installed and hook.HOOK.problems == []
assert PytorchEngineConfig(quant_policy='fp8_per_token_head').quant_policy == 116
"""))


def test_a_version_whose_source_is_otherwise_refuses_only_our_policies():
    """A package that says 0.17.0 and is not: the first row that differs is named, and nothing is touched."""
    python(with_version('0.17.0', REFUSED + """
assert sentence.startswith('LMDeploy 0.17.0: ') and 'CacheEngine.get_k_cache_desc does not exist' in sentence
"""))


# ---- on a GPU

CHOSEN = [fmt for fmt in FORMATS if fmt.name in ('int8_per_token_head', 'int4_per_token_head', 'fp8')]


@pytest.fixture(scope='module')
def engines(tmp_path_factory):
    """(version, policy) to what a real engine answered, with bf16's predictions of the same version as reference."""
    from engine_matrix import prompts
    from eval_engine import passages, probe
    from transformers import AutoTokenizer
    folder = tmp_path_factory.mktemp('engines')
    pieces = [ids for _, ids in passages(AutoTokenizer.from_pretrained(MODEL), 768)]
    versions_here = [*(version for version in OLDER if (ROOT / '.lmdeploy' / version).is_dir()), '']

    def ask(version: str, policy: int, spec: dict, **engine: bool) -> dict:
        everyone = {'model': MODEL, 'quant_policy': policy, 'prompts': prompts(8), 'new_tokens': 48,
                    'engine': {'num_gpu_blocks': 300, 'session_len': 2048, 'max_batch_size': 8, **engine}}
        return probe({**everyone, **spec}, {'LMDEPLOY_KVQ_PREFILL': 'cache', **(
            path_with(ROOT / '.lmdeploy' / version) if version else {})}, limit=200)

    def run(version: str, policy: int) -> dict:
        reference = str(folder / f'lmdeploy{version}.bf16')
        files = {'reference': reference, 'scores': f'{reference}.{policy}'} if policy else {'out': reference}
        answer = ask(version, policy, {'score_generated': True, 'passages': [pieces[0], pieces[-1]], **files})
        # an engine of its own: before 0.18, predictions of what the prefix cache holds are left out
        answer['rounds'] = ask(version, policy, {'batches': [8, 8]}, enable_prefix_caching=True)['rounds']
        if policy:
            answer['kl'] = float(torch.cat([part['kl'] for part in torch.load(files['scores'])]).mean())
        return answer

    keys = [(version, policy) for policy in (0, *(fmt.policy for fmt in CHOSEN)) for version in versions_here]
    with ThreadPoolExecutor(9) as pool:
        done = {}
        for some in (keys[:len(versions_here)], keys[len(versions_here):]):  # bf16 first
            done |= dict(zip(some, pool.map(lambda key: run(*key), some)))
    return done


@pytest.mark.gpu
@EACH
def test_an_older_engine_loses_what_the_newest_loses(engines, version):
    """Prefill, graphs, prefix cache and decoding in real engines: errors and agreement as with the installed one."""
    if not (ROOT / '.lmdeploy' / version).is_dir():
        pytest.skip(f'.lmdeploy/{version} is not here: run tests/wheels.py where there is a package index')
    for fmt in CHOSEN:
        old, new = engines[version, fmt.policy], engines['', fmt.policy]
        assert old['kl'] < 1.25 * new['kl'] + 5e-4, (fmt.name, old['kl'], new['kl'])
        for ours, floor, theirs in zip(old['decode_against_prefill'], engines[version, 0]['decode_against_prefill'],
                                       new['decode_against_prefill'], strict=True):
            assert ours['agreement'] >= min(floor['agreement'], theirs['agreement']) - 0.1, (fmt.name, ours, theirs)
        assert sum(old['rounds'][1]['cached_tokens']) == sum(new['rounds'][1]['cached_tokens']) > 0
        assert old['rounds'][1]['tokens'] == old['rounds'][0]['tokens'], 'the prefix cache reads what was written'
