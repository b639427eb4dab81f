"""Attaching to the real LMDeploy, each scenario in a process of its own."""
import pytest
from helpers import python

from lmdeploy_kvq import _autoload, hook

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
