"""Our policies in LMDeploy's configuration classes and on its command line, parsed by its own parsers."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import RUN_CLI, by_name, clean_environment, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq import formats

ADDED = [fmt for fmt in kvq.FORMATS if not fmt.upstream]
MODELS_OWN = {'none': 0, 'int4': 4, 'int8': 8, 'turbo_quant': 42}


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
