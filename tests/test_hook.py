"""Attaching to the real LMDeploy, each scenario in a process of its own."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import by_name, clean_environment, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq import _autoload, formats, hook, patching

ADDED = [fmt for fmt in kvq.FORMATS if not fmt.upstream]
FIRST, LAST = ('.'.join(map(str, version)) for version in hook.SUPPORTED)
SENTENCE = f'supports LMDeploy >= {FIRST}, < {LAST}; found '
MODELS_OWN = {'none': 0, 'int4': 4, 'int8': 8, 'turbo_quant': 42}

FAKE_VERSION = """
import importlib.metadata, sys
real_version = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == 'lmdeploy' else real_version(name)
"""


def with_version(version: str, code: str) -> str:
    """``code`` where LMDeploy's metadata says ``version``."""
    return FAKE_VERSION.format(version=version) + code


# Importing, opting out.

def test_importing_the_package_does_nothing():
    python("""
import sys
finders = list(sys.meta_path)
import lmdeploy_kvq as kvq
assert sys.meta_path == finders and 'torch' not in sys.modules and 'lmdeploy' not in sys.modules
assert kvq.FORMATS and kvq.get_format('fp8') and 'install' in dir(kvq)
assert 'torch' not in sys.modules and 'lmdeploy' not in sys.modules
""")


@pytest.mark.parametrize('first', ['import lmdeploy', 'import torch', 'from lmdeploy_kvq import install',
                                   'from lmdeploy.pytorch import envs'])
def test_importing_lmdeploy_is_all_it_takes(first):
    """Whatever is imported first, QuantPolicy ends up with members like any other."""
    python(f"""
{first}
import copy, enum, pickle
import lmdeploy
import lmdeploy_kvq as kvq
from lmdeploy.messages import QuantPolicy
assert QuantPolicy.FP8_PER_TOKEN_HEAD == 116
own = [0, 4, 8, 16, 17, 42]
for fmt in kvq.FORMATS:
    member = QuantPolicy(fmt.policy)
    name = fmt.name.upper()
    assert isinstance(member, QuantPolicy) and type(member) is QuantPolicy and isinstance(member, int)
    assert member is QuantPolicy[name] is getattr(QuantPolicy, name) is QuantPolicy.__members__[name]
    assert (member.name, member.value, int(member)) == (name, fmt.policy, fmt.policy)
    assert repr(member) == f'<QuantPolicy.{{name}}: {{fmt.policy}}>' and f'{{member:d}}' == str(fmt.policy)
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert member in list(QuantPolicy) and fmt.policy in list(QuantPolicy) and {{member: 1}}[fmt.policy] == 1
    assert member > QuantPolicy.NONE and member in QuantPolicy
values = [p.value for p in QuantPolicy]
assert values[:6] == own and sorted(values) == sorted({{*own, *(fmt.policy for fmt in kvq.FORMATS)}})
assert len(QuantPolicy) == len(values) == len(set(values))
try:
    QuantPolicy(99)
except ValueError:
    pass
else:
    raise AssertionError('99 became a policy')
""")


def test_lmdeploys_own_members_stay_the_same_objects():
    python("""
import lmdeploy
from lmdeploy.messages import QuantPolicy
import lmdeploy_kvq as kvq
before = list(QuantPolicy)[:6]
kvq.uninstall()
assert list(QuantPolicy) == before and all(a is b for a, b in zip(QuantPolicy, before))
kvq.install()
assert all(a is b for a, b in zip(QuantPolicy, before)) and QuantPolicy.FP8 is QuantPolicy(16)
assert QuantPolicy.FP8_E5M2 is QuantPolicy(17) and [p.name for p in before][-1] == 'TURBO_QUANT'
""")


@pytest.mark.parametrize('value, on', [
    (None, True), ('1', True), ('', True), ('0', False), ('false', False), ('OFF', False), (' no ', False),
])
def test_what_counts_as_opting_out(value, on, monkeypatch):
    monkeypatch.delenv('LMDEPLOY_KVQ', raising=False)
    if value is not None:
        monkeypatch.setenv('LMDEPLOY_KVQ', value)
    assert _autoload.enabled() is on


def test_opting_out():
    """LMDeploy refuses our names itself: never a bf16 cache in silence. Importing ours patches nothing either."""
    python("""
import sys
import lmdeploy, lmdeploy.messages
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy
assert 'lmdeploy_kvq.hook' not in sys.modules
import lmdeploy_kvq.hook, lmdeploy_kvq.paged, lmdeploy_kvq.reference
assert not lmdeploy_kvq.hook.HOOK.installed
assert not any(type(finder).__module__.startswith('lmdeploy_kvq') for finder in sys.meta_path)
assert [p.value for p in QuantPolicy] == [0, 4, 8, 16, 17, 42]
for policy in (116, 117, 108, 'fp8_per_token_head'):
    try:
        PytorchEngineConfig(quant_policy=policy)
    except ValueError as error:
        assert 'invalid quant_policy' in str(error)
    else:
        raise AssertionError(policy)
assert PytorchEngineConfig(quant_policy=16).quant_policy is QuantPolicy.FP8
assert PytorchEngineConfig.__post_init__.__module__ == 'lmdeploy.messages'
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
SubCliServe.add_parsers()
assert CLI.parser.parse_args(['serve', 'api_server', 'M', '--quant-policy', 'fp8']).quant_policy == 16
try:
    CLI.parser.parse_args(['serve', 'api_server', 'M', '--quant-policy', 'fp8_per_token_head'])
except SystemExit as stop:
    assert stop.code == 2
else:
    raise AssertionError('accepted')
""", LMDEPLOY_KVQ='0')


def test_opted_out_and_installed_by_hand():
    python("""
import lmdeploy_kvq as kvq
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy
kvq.install()
kvq.install()
assert PytorchEngineConfig(quant_policy='fp8_per_token_head').quant_policy is QuantPolicy(116)
kvq.uninstall()
kvq.uninstall()
assert 116 not in list(QuantPolicy)
""", LMDEPLOY_KVQ='0')


def test_uninstalling_before_lmdeploy_is_imported_keeps_it_off():
    python("""
import torch
import lmdeploy_kvq as kvq
kvq.uninstall()
from lmdeploy.messages import QuantPolicy
assert 116 not in list(QuantPolicy)
""")


def test_a_broken_hook_does_not_break_torch_or_lmdeploy():
    done = python("""
import sys
sys.modules['lmdeploy_kvq.patching'] = None
import torch, lmdeploy
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy
assert len(QuantPolicy) == 6 and PytorchEngineConfig(quant_policy=8).quant_policy == 8
""")
    assert done.stderr.count('lmdeploy_kvq could not be loaded') == 1


def test_spawned_processes_have_the_hook(tmp_path):
    """As LMDeploy's executors: the child unpickles a member, and has never seen the parent's script."""
    script = tmp_path / 'parent.py'
    script.write_text("""
import multiprocessing as mp

def child(policy, queue):
    from lmdeploy.messages import PytorchEngineConfig, QuantPolicy
    from lmdeploy_kvq import hook
    config = PytorchEngineConfig(quant_policy=policy)
    queue.put((policy is QuantPolicy(116), config, hook.HOOK.installed, QuantPolicy(108)))

if __name__ == '__main__':
    import lmdeploy
    from lmdeploy.messages import QuantPolicy
    context = mp.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=child, args=(QuantPolicy.FP8_PER_TOKEN_HEAD, queue))
    process.start()
    same, config, installed, back = queue.get(timeout=100)
    process.join()
    assert process.exitcode == 0 and same and installed
    assert config.quant_policy is QuantPolicy.FP8_PER_TOKEN_HEAD and back is QuantPolicy.INT8_PER_TOKEN_HEAD
""")
    python(f'import runpy; runpy.run_path({str(script)!r}, run_name="__main__")')


# The patch table.

@pytest.mark.parametrize('patch', hook.PATCHES, ids=lambda patch: patch.name)
def test_every_row_matches_the_installed_lmdeploy(patch):
    assert hook.Hook((patch, )).check() == []
    assert patch.module.startswith('lmdeploy.') and patch.why and '\n' not in patch.why


def test_rows_are_unique():
    names = [patch.name for patch in hook.PATCHES]
    assert len(set(names)) == len(names) and hook.Hook().check() == []


ROWS = """
import importlib, functools, sys
import lmdeploy_kvq as kvq
from lmdeploy_kvq import hook

def owner_of(patch):
    *parents, leaf = patch.target.split('.')
    return functools.reduce(getattr, parents, importlib.import_module(patch.module)), leaf

def contents(value):
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, type):
        maps = {name: (list(v.items()) if isinstance(v, dict) else list(v) if isinstance(v, list) else v)
                for name, v in vars(value).items()}
        return maps
    return value
"""


def test_uninstall_restores_every_original():
    """Twice, because what is installed again must be restored again."""
    python(ROWS + """
before = {p.name: (vars(owner_of(p)[0])[owner_of(p)[1]], contents(vars(owner_of(p)[0])[owner_of(p)[1]]))
          for p in hook.PATCHES}
finders = list(sys.meta_path)
for _ in range(2):
    kvq.install()
    assert hook.HOOK.installed and {hook.HOOK.state(p) for p in hook.PATCHES} == {'applied'}
    for p in hook.PATCHES:
        owner, leaf = owner_of(p)
        value = vars(owner)[leaf]
        if p.parameters is None:
            assert value is before[p.name][0] and contents(value) != before[p.name][1], p.name
        else:
            assert value is not before[p.name][0], p.name
    kvq.uninstall()
    assert not hook.HOOK.installed and {hook.HOOK.state(p) for p in hook.PATCHES} == {'off'}
    for p in hook.PATCHES:
        owner, leaf = owner_of(p)
        assert vars(owner)[leaf] is before[p.name][0], p.name
        assert contents(vars(owner)[leaf]) == before[p.name][1], p.name
    assert sys.meta_path == finders
""", LMDEPLOY_KVQ='0', LMDEPLOY_KVQ_PREFILL='cache')


def test_uninstall_restores_what_was_patched_while_importing():
    """Rows that took effect as LMDeploy's modules were imported, and modules imported afterwards."""
    python('import lmdeploy.cli.serve' + ROWS + """
late = [p for p in hook.PATCHES if p.module not in sys.modules]
assert late and all(hook.HOOK.state(p) == ('waiting' if p in late else 'applied') for p in hook.PATCHES)
def ours(p):
    value = vars(owner_of(p)[0])[owner_of(p)[1]]
    code = getattr(getattr(value, '__func__', value), '__code__', None)  # functools.cache has none
    return code is not None and 'lmdeploy_kvq' in code.co_filename
functions = [p for p in hook.PATCHES if p.parameters is not None]
assert all(ours(p) for p in functions if p not in late)
kvq.uninstall()
assert not any(ours(p) for p in functions) and all(p.module in sys.modules for p in late)
""")


def test_wrapped_functions_look_like_the_originals():
    """Names, documentation and signatures survive, and static methods stay static."""
    python(ROWS + """
import inspect
look = lambda p: vars(owner_of(p)[0])[owner_of(p)[1]]
functions = [p for p in hook.PATCHES if p.parameters is not None]
before = {p.name: (look(p), inspect.signature(getattr(owner_of(p)[0], owner_of(p)[1]))) for p in functions}
kvq.install()
for p in functions:
    old, signature = before[p.name]
    new = look(p)
    assert isinstance(new, staticmethod) == isinstance(old, staticmethod)
    assert inspect.signature(getattr(owner_of(p)[0], owner_of(p)[1])) == signature
    assert (new.__name__, new.__doc__, new.__module__) == (old.__name__, old.__doc__, old.__module__)
""", LMDEPLOY_KVQ='0')


def test_our_environment_variables_travel_to_ray_workers():
    """LMDeploy forwards what envs.get_all_envs() returns, and nothing else, to other nodes."""
    python("""
import os
from lmdeploy.pytorch import envs
import lmdeploy_kvq as kvq
from lmdeploy_kvq import _autoload
found = envs.get_all_envs()
assert found['LMDEPLOY_KVQ'] == '1' and found['LMDEPLOY_KVQ_PREFILL'] == 'cache'
assert {name for name in os.environ if name.startswith('LMDEPLOY_KVQ')} <= set(_autoload.ENVIRONMENT)
kvq.uninstall()
assert not any(name.startswith('LMDEPLOY_KVQ') for name in envs.get_all_envs())
""", LMDEPLOY_KVQ='1', LMDEPLOY_KVQ_PREFILL='cache')


# LMDeploy is not what we know.

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


RUN_CLI = """
from lmdeploy.cli.entrypoint import run
run()
"""


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


# Configurations.

def test_pytorch_engine_config():
    python("""
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy
import lmdeploy_kvq as kvq
from lmdeploy_kvq import formats

def refused(*words, **given):
    try:
        PytorchEngineConfig(**given)
    except ValueError as error:
        assert all(word in str(error) for word in words), (words, str(error))
    else:
        raise AssertionError(f'accepted {given}')

for name, policy in formats.format_names().items():
    for given in (name, name.upper(), policy, str(policy), QuantPolicy(policy)):
        config = PytorchEngineConfig(quant_policy=given, block_size=128, tp=2)
        assert config.quant_policy is QuantPolicy(policy), (given, config.quant_policy)
        assert config.device_type == 'cuda' and config.kernel_block_size == 128 and config.tp == 2
for member in list(QuantPolicy)[:6]:
    for given in (member, member.value, member.name.lower()):
        assert PytorchEngineConfig(quant_policy=given).quant_policy is member
assert PytorchEngineConfig().quant_policy is QuantPolicy.NONE

known = [f'{fmt.name} ({fmt.policy})' for fmt in kvq.FORMATS] + ['int8 (8)', 'turbo_quant (42)', 'none (0)']
for unknown in ('fp9', '', 'fp8_per_head', 99, -1, '99', None, 1.5):
    refused(repr(unknown) if unknown != '99' else '99', *known, quant_policy=unknown)

for fmt in kvq.FORMATS:
    for device in ('maca', 'camb', 'ascend'):
        if not (fmt.upstream and device == 'ascend'):  # what LMDeploy itself does on ascend is its own affair
            refused(fmt.name, 'cuda', device, 'none', quant_policy=fmt.policy, device_type=device)
            refused(fmt.name, 'cuda', device, quant_policy=fmt.name, device_type=device)
assert PytorchEngineConfig(quant_policy=8, device_type='ascend').quant_policy == 8
assert PytorchEngineConfig(device_type='camb').block_size == 16
""")


def test_turbomind_engine_config():
    python("""
from lmdeploy.messages import QuantPolicy, TurbomindEngineConfig
import lmdeploy_kvq as kvq
for fmt in kvq.FORMATS:
    for policy in (fmt.policy, QuantPolicy(fmt.policy)):
        try:
            TurbomindEngineConfig(quant_policy=policy)
        except ValueError as error:
            for words in (fmt.name, 'TurboMind', 'PytorchEngineConfig', '--backend pytorch'):
                assert words in str(error), (words, str(error))
        else:
            raise AssertionError(fmt.name)
for policy in (0, 4, 8, 42):
    assert TurbomindEngineConfig(quant_policy=policy).quant_policy == policy
""")


# The command line, with LMDeploy's own parsers.

PARSE_ALL = """
import contextlib, io, json, sys
import lmdeploy
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe
CLI.add_parsers()
SubCliServe.add_parsers()
from lmdeploy_kvq.backends.config import run_with_backend

def attempt(argv):
    result, stderr, stdout = {}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            args = CLI.parser.parse_args(argv)
            result['run'] = getattr(args.run, '__qualname__', '')
            result['policy'] = args.quant_policy
            calls = []
            run_with_backend(calls.append, args)
            result['calls'] = len(calls)
            result['same'] = calls == [args]
            result['backend'] = args.backend
            result['plain'] = json.loads(json.dumps(args.backend)) == args.backend
        except SystemExit as stop:
            result['exit'] = stop.code
    return {**result, 'stderr': stderr.getvalue(), 'stdout': stdout.getvalue()}

for line in sys.stdin:
    print(json.dumps(attempt(json.loads(line))), flush=True)
"""


@pytest.fixture(scope='module')
def cli():
    """Parse and run command lines in one process: ``cli(*argv)`` gives what happened."""
    process = subprocess.Popen([sys.executable, '-c', PARSE_ALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=clean_environment())

    def attempt(*argv: str) -> dict:
        process.stdin.write(json.dumps(argv) + '\n')
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield attempt
    process.stdin.close()
    assert process.wait(60) == 0


def outcome(result: dict) -> tuple:
    """Policy, backend, number of calls of the original, and what was printed."""
    return result['policy'], result['backend'], result['calls'], result['stderr']


COMMANDS = [('serve', 'api_server'), ('chat', )]
NAMES = sorted(formats.format_names().items())


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
@pytest.mark.parametrize('name, policy', NAMES)
def test_our_policies_select_the_pytorch_engine(cli, command, name, policy):
    for given in (name, name.upper(), str(policy)):
        result = cli(*command, 'MODEL', '--quant-policy', given)
        assert outcome(result)[:3] == (policy, 'pytorch', 1) and result['same']
        lines = result['stderr'].splitlines()
        assert len(lines) == 1 and '--backend pytorch' in lines[0] and kvq.get_format(policy).name in lines[0]
        assert result['stdout'] == ''


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_an_explicit_pytorch_backend_needs_no_words(cli, command):
    result = cli(*command, 'MODEL', '--quant-policy', 'fp8_per_token_head', '--backend', 'pytorch')
    assert outcome(result) == (116, 'pytorch', 1, '')


@pytest.mark.parametrize('backend', [['--backend', 'turbomind'], ['--backend=turbomind']], ids=' '.join)
@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_an_explicit_turbomind_is_an_error(cli, fmt, command, backend):
    result = cli(*command, 'MODEL', *backend, '--quant-policy', fmt.name)
    assert 'calls' not in result and result['stdout'] == ''
    assert fmt.name in result['exit'] and '--backend pytorch' in result['exit'] and 'turbomind' in result['exit']


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
@pytest.mark.parametrize('name, policy', MODELS_OWN.items())
def test_lmdeploys_own_policies_go_their_way(cli, command, name, policy):
    for given in (name, str(policy)):
        assert outcome(cli(*command, 'MODEL', '--quant-policy', given)) == (policy, 'turbomind', 1, '')
    for backend in ('turbomind', 'pytorch'):
        assert outcome(cli(*command, 'MODEL', '--quant-policy', name, '--backend', backend)) == (policy, backend, 1, '')


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_no_policy_changes_nothing(cli, command):
    result = cli(*command, 'MODEL')
    assert outcome(result) == (0, 'turbomind', 1, '')
    assert result['plain']


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
@pytest.mark.parametrize('unknown', ['fp9', '99', '', '-3', 'fp8_per_head'])
def test_unknown_policies_list_the_known_ones(cli, command, unknown):
    result = cli(*command, 'MODEL', f'--quant-policy={unknown}')
    assert result['exit'] == 2 and 'calls' not in result
    for words in ('--quant-policy', 'unknown', repr(unknown), 'int8 (8)', 'turbo_quant (42)',
                  *(f'{fmt.name} ({fmt.policy})' for fmt in kvq.FORMATS)):
        assert words in result['stderr']


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_help_lists_our_formats(cli, command):
    result = cli(*command, '--help')
    text = ' '.join(result['stdout'].split())
    assert result['exit'] == 0 and 'int4' in text
    for fmt in kvq.FORMATS:
        assert re.sub(r'[-\s]', '', fmt.name) in re.sub(r'[-\s]', '', text) and str(fmt.policy) in text
    for fmt in ADDED:
        assert re.sub(r'[-\s]', '', fmt.summary) in re.sub(r'[-\s]', '', text)


def test_the_command_itself(tmp_path):
    """``lmdeploy serve api_server``, unedited, down to the refusal."""
    Path(tmp_path, 'config.json').write_text('{}')
    done = python(RUN_CLI, 'serve', 'api_server', str(tmp_path), '--quant-policy', 'fp8_per_token_head', '--backend',
                  'turbomind', check=False)
    assert done.returncode == 1 and done.stdout == ''
    assert 'fp8_per_token_head' in done.stderr and '--backend pytorch' in done.stderr
    assert 'Traceback' not in done.stderr
