"""An LMDeploy that is not what we know: nothing is patched, our policies are refused and everything else works."""
import re
import sys

import pytest
from helpers import RUN_CLI, python

from lmdeploy_kvq import hook, patching

FIRST, LAST = ('.'.join(map(str, version)) for version in hook.SUPPORTED)
SENTENCE = f'supports LMDeploy >= {FIRST}, < {LAST}; found '

FAKE_VERSION = """
import importlib.metadata, sys
real_version = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == 'lmdeploy' else real_version(name)
"""


def with_version(version: str, code: str) -> str:
    """``code`` where LMDeploy's metadata says ``version``."""
    return FAKE_VERSION.format(version=version) + code


@pytest.mark.parametrize('version, supported', [
    ('0.18.0', True), ('0.18.7', True), ('0.18.0rc1', True), ('0.18.0+cu128', True), ('0.15.9', False),
    ('0.19.0', False), ('0.19rc1', False), ('1.0', False), ('0.2.18', False),
])
def test_version_range(version, supported, monkeypatch):
    real = hook.metadata.version
    monkeypatch.setattr(hook.metadata, 'version', lambda name: version if name == 'lmdeploy' else real(name))
    found = hook.Hook()
    problems = found.check()
    assert problems == [] if supported else len(problems) == 1 and problems[0].endswith(SENTENCE + version)
    if not supported:
        before = list(sys.meta_path)
        with pytest.raises(RuntimeError, match=re.escape(version)):
            found.install()
        assert sys.meta_path == before and not found.installed


def test_lmdeploy_is_not_installed(monkeypatch):
    def absent(name):
        raise hook.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hook.metadata, 'version', absent)
    with pytest.raises(RuntimeError, match='not installed'):
        hook.Hook().install()


def nothing(*args, **kwargs):
    """A patch that is never applied."""
    raise AssertionError('applied')


@pytest.mark.parametrize('row, words', [
    (patching.wrap('lmdeploy.messages', 'PytorchEngineConfig.__post_init__', 'self config', nothing, 'test'),
     ['lmdeploy.messages.PytorchEngineConfig.__post_init__', '(self)', '(self, config)']),
    (patching.wrap('lmdeploy.messages', 'PytorchEngineConfig.no_such_method', 'self', nothing, 'test'),
     ['lmdeploy.messages.PytorchEngineConfig.no_such_method', 'does not exist']),
    (patching.wrap('lmdeploy.no_such_module', 'f', '', nothing, 'test'), ['lmdeploy.no_such_module', 'not found']),
    (patching.data('lmdeploy.messages', 'NO_SUCH_TABLE', nothing, 'test'), ['NO_SUCH_TABLE', 'does not exist']),
    (patching.wrap('lmdeploy.messages', 'QuantPolicy', 'self', nothing, 'test'), ['QuantPolicy', 'not a function']),
], ids=['parameters', 'method', 'module', 'data', 'kind'])
def test_one_wrong_row_stops_all(row, words):
    """Checked without importing anything; a strict install says what is wrong and changes nothing."""
    wrong = hook.Hook((*hook.PATCHES, row))
    problems = wrong.check()
    assert len(problems) == 1 and all(word in problems[0] for word in words)
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=re.escape(problems[0])):
        wrong.install()
    assert sys.meta_path == before and not wrong.installed


def test_strict_install_changes_nothing():
    python(with_version('0.19.0', """
import lmdeploy.messages as messages
import lmdeploy_kvq as kvq
members, post_init = list(messages.QuantPolicy), messages.PytorchEngineConfig.__post_init__
finders = list(sys.meta_path)
try:
    kvq.install()
except RuntimeError as error:
    assert '0.19.0' in str(error) and '>= 0.16, < 0.19' in str(error)
else:
    raise AssertionError('installed')
assert list(messages.QuantPolicy) == members and messages.PytorchEngineConfig.__post_init__ is post_init
assert '_missing_' not in vars(messages.QuantPolicy) and sys.meta_path == finders
"""), LMDEPLOY_KVQ='0')


REFUSED = """
import traceback
import lmdeploy
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy, TurbomindEngineConfig
import lmdeploy_kvq as kvq
from lmdeploy_kvq import hook
sentence = hook.HOOK.problems[0]
assert not hook.HOOK.installed and {hook.HOOK.state(p) for p in hook.PATCHES} == {'refused'}
for fmt in kvq.FORMATS:
    if not fmt.upstream:
        for policy in (fmt.policy, fmt.name):
            try:
                PytorchEngineConfig(quant_policy=policy)
            except ValueError:
                assert sentence in traceback.format_exc(), (policy, traceback.format_exc())
            else:
                raise AssertionError(policy)
assert [p.value for p in QuantPolicy] == [0, 4, 8, 16, 17, 42]
for policy in QuantPolicy:
    assert PytorchEngineConfig(quant_policy=policy).quant_policy is policy
assert TurbomindEngineConfig(quant_policy=8).quant_policy == 8
try:
    QuantPolicy(99)
except ValueError as error:
    assert sentence not in str(error)
assert PytorchEngineConfig.__post_init__.__code__.co_filename.endswith('messages.py')
kvq.uninstall()
assert '_missing_' not in vars(QuantPolicy)
try:
    QuantPolicy(116)
except ValueError as error:
    assert sentence not in str(error)
"""


def test_an_unknown_lmdeploy_refuses_only_our_policies():
    """The sentence names the versions, by number and by name; everything of LMDeploy's own works."""
    done = python(with_version('0.19.0', REFUSED + f'assert sentence.endswith({SENTENCE + "0.19.0"!r})'))
    assert 'lmdeploy_kvq' not in done.stderr  # nobody asked for a policy of ours on the command line


def test_a_changed_lmdeploy_refuses_only_our_policies():
    python("""
from lmdeploy_kvq import hook, patching
row = patching.wrap('lmdeploy.messages', 'PytorchEngineConfig.__post_init__', 'self config', None, 'test')
hook.HOOK.patches = (*hook.PATCHES[:1], row, *hook.PATCHES[1:])
hook.HOOK.install(strict=False)
""" + REFUSED + "assert 'takes (self), expected (self, config)' in sentence", LMDEPLOY_KVQ='0')


@pytest.mark.parametrize('argument', [
    ['--quant_policy', 'INT8_PER_TOKEN_HEAD'], ['--quant-policy=fp8_per_token_head'], ['--quant-policy', '116'],
], ids=' '.join)
def test_an_unknown_lmdeploy_says_why_on_the_command_line(argument, tmp_path):
    done = python(with_version('0.19.0', RUN_CLI), 'serve', 'api_server', str(tmp_path), *argument, check=False)
    assert done.returncode == 2 and SENTENCE + '0.19.0' in done.stdout + done.stderr


def test_an_unknown_lmdeploys_own_policies_work_on_the_command_line():
    done = python(with_version('0.19.0', """
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
SubCliServe.add_parsers()
assert CLI.parser.parse_args(['serve', 'api_server', 'M', '--quant-policy', 'int8']).quant_policy == 8
"""))
    assert 'lmdeploy_kvq' not in done.stderr
