"""The command line: ``lmdeploy-kvq doctor`` as a user runs it, and what it says of broken installations."""
import json
import os
import shutil
import subprocess
import sys

import pytest

import lmdeploy_kvq as kvq
from lmdeploy_kvq import capacity, cli, console, doctor, environment, formatcheck


def command(*arguments, **env):
    """Run ``lmdeploy-kvq`` in a fresh process, without this suite's environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('LMDEPLOY_KVQ', 'TRITON_INTERPRET', 'COLUMNS'))}
    return subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', *arguments], check=False, capture_output=True,
                          text=True, timeout=300, env={**clean, **env})


@pytest.fixture(scope='module')
def report():
    """The report of this machine, as JSON."""
    done = command('doctor', '--json')
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def section(text, title):
    """The lines under a heading."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start:lines.index('', start)]


@pytest.fixture(scope='module')
def text():
    """The report of this machine, as text."""
    done = command('doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_versions_and_gpus(report, text):
    versions = report['versions']
    assert versions['lmdeploy_kvq'] == kvq.__version__ and versions['lmdeploy'].startswith('0.18.')
    assert {'python', 'torch', 'cuda', 'triton', 'transformers'} <= versions.keys()
    assert all(line.split()[1] == versions[line.split()[0]] for line in section(text, 'Versions')[1:])
    for gpu in report['gpus']:
        assert gpu['name'] in text and gpu['fp8_conversion'] in ('hardware', 'integer decoding')
    assert report['gpus'] or 'none: serving needs one' in text


def test_hook_is_active_here_and_in_a_new_process(report, text):
    for state in report['hook'].values():
        assert state['active'] and state['error'] is None and not state['problems']
        assert state['policies'] == [fmt.name for fmt in kvq.FORMATS]
    lines = section(text, 'Hook')
    assert lines[1].split() == ['LMDEPLOY_KVQ', 'not', 'set', '(on)']
    assert all('active' in line and '116' in line and 'NOT' not in line for line in lines[2:])
    assert text.rstrip().endswith('OK: LMDeploy will use these formats.')


def test_every_format_is_listed(report, text):
    shape = capacity.CacheShape(1, 8, 128)
    lines = section(text, 'Formats')[2:]
    warned = ' '.join(text.split())
    for fmt in kvq.FORMATS:
        assert (f'{fmt.name} is EXPERIMENTAL' in warned) == bool(fmt.experimental)
    for fmt, row, line in zip(kvq.FORMATS, report['formats'], lines):  # reasons may stand below
        assert (row['name'], row['policy'], tuple(row['aliases'])) == (fmt.name, fmt.policy, fmt.aliases)
        share = capacity.bytes_per_token(fmt, shape) / capacity.bf16_bytes_per_token(shape)
        assert row['bytes_against_bf16'] == pytest.approx(share)
        assert line.split() == [fmt.name, str(fmt.policy), f'{fmt.bits_per_element(128):.2f}', f'{share:.1%}',
                                'yes' if row['supported'] else 'no', *fmt.aliases]


def test_whether_a_format_is_served_here(report, text):
    """With a GPU of Ampere or newer every format is; without one none, and the reason stands once."""
    usable = any(tuple(map(int, gpu['compute_capability'].split('.'))) >= (8, 0) for gpu in report['gpus'])
    assert {row['supported'] for row in report['formats']} == {usable}
    if not report['gpus']:
        assert text.count('  no: there is no CUDA GPU here') == 1


def gpu(capability, conversion='hardware', name='card'):
    return {'name': name, 'compute_capability': capability, 'memory_gib': 80.0, 'fp8_conversion': conversion}


def test_reasons_follow_the_gpu():
    def rows(*gpus, active=True):
        return formatcheck.format_rows(list(gpus), active)

    assert all(row['supported'] and not row['reason'] for row in rows(gpu('9.0')))
    assert all('8.0 or newer is needed; here 7.5' in row['reason'] and not row['supported'] for row in rows(gpu('7.5')))
    assert all('does not use this package' in row['reason'] for row in rows(gpu('9.0'), active=False))
    mixed = {row['name']: row for row in rows(gpu('7.5'), gpu('8.0', 'integer decoding', 'A100'))}
    assert all(row['supported'] for row in mixed.values())
    for fmt in kvq.FORMATS:
        fp8 = any(encoding.codec.name.startswith('e') for encoding in (fmt.key, fmt.value))
        assert ('integer arithmetic on A100' in mixed[fmt.name]['reason']) == fp8
    text = '\n'.join(formatcheck.format_lines(rows(gpu('7.5'))))
    assert text.count('  no: compute capability') == 1


def test_kernels_are_tried(device):
    """On the GPU, or in the interpreter: every format, within the limit; and what fails is said."""
    rows = formatcheck.format_rows([], True)
    assert formatcheck.run_kernels(rows) == []
    assert all(0 < row['kernel_error'] < formatcheck.MAX_KERNEL_ERROR for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        errors = iter([float('nan'), *[0.5] * (len(rows) - 1)])
        patch.setattr(formatcheck, 'try_kernels', lambda fmt: next(errors))
        assert all('are wrong here' in problem for problem in formatcheck.run_kernels(rows))

        def fail(fmt):
            raise RuntimeError('ptxas: no such file\nmore')

        patch.setattr(formatcheck, 'try_kernels', fail)
        problems = formatcheck.run_kernels(rows)
    assert len(problems) == len(rows) and all('RuntimeError: ptxas: no such file.' in problem for problem in problems)
    assert 'failed' in formatcheck.format_lines(rows)[0]


@pytest.mark.skipif(os.path.exists('/dev/nvidia0'), reason='kernels run here')
def test_kernels_need_a_gpu():
    done = command('doctor', '--kernels')
    assert done.returncode == 2 and 'needs a CUDA GPU' in done.stderr and not done.stdout


def test_the_report_has_no_secrets():
    done = command('doctor', '--json', LMDEPLOY_API_KEY='abc', TRITON_CACHE_DIR='/tmp/triton-x')
    environment = json.loads(done.stdout)['environment']
    assert environment['TRITON_CACHE_DIR'] == '/tmp/triton-x' and 'abc' not in done.stdout
    assert {'system', 'python'} <= json.loads(done.stdout)['machine'].keys()


def test_every_patch_is_listed_and_applied(report, text):
    from lmdeploy_kvq.hook import PATCHES
    assert [(row['module'], row['target'], row['why']) for row in report['patches']] == [
        (patch.module, patch.target, patch.why) for patch in PATCHES]
    for row in report['patches']:
        assert row['state'] == 'applied' or row['state'] == 'waiting' and row['reason'] and not report['gpus']
    flat = ' '.join(text.split())
    for patch in PATCHES:
        assert f'  {patch.module}\n' in text and f'    {patch.target}: ' in text and patch.why in flat


@pytest.mark.parametrize('columns', ['80', '200'])
def test_output_fits(columns):
    done = command('doctor', COLUMNS=columns)
    limit = min(int(columns), console.MAX_WIDTH)
    assert [line for line in done.stdout.splitlines() if len(line) > limit and ' ' in line.strip()] == []
    assert done.stdout.isascii()


def test_opted_out():
    done = command('doctor', LMDEPLOY_KVQ='0')
    assert done.returncode == 0, done.stdout
    assert "LMDEPLOY_KVQ   '0'" in done.stdout and done.stdout.count('off: opted out') == 2
    assert 'Unset LMDEPLOY_KVQ' in done.stdout.splitlines()[-1] + done.stdout.splitlines()[-2]
    assert ': applied' not in done.stdout and ': off' in done.stdout


def test_extensions_switched_off():
    done = command('doctor', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert done.returncode == 1
    assert '1 problem' in done.stdout and 'unset it' in done.stdout and done.stdout.count('NOT active') == 2


@pytest.mark.parametrize('name, version, advice', [
    ('lmdeploy', '0.15.2', 'pip install "lmdeploy>=0.16,<0.19"'),
    ('lmdeploy', '0.19.0', 'pip install "lmdeploy>=0.16,<0.19"'),
    ('triton', '3.1.0', 'pip install "triton>=3.4"'),
])
def test_wrong_versions(tmp_path, name, version, advice):
    """A package whose metadata says another version: one problem, with what to do."""
    info = tmp_path / f'{name}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    done = command('doctor', PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and '1 problem\n' in done.stdout, done.stdout + done.stderr
    problem = ' '.join(done.stdout[done.stdout.index('1 problem'):].split())
    assert version in problem and advice in problem
    assert 'Traceback' not in done.stdout + done.stderr


def test_broken_lmdeploy(tmp_path):
    """An LMDeploy that cannot be imported is said in a sentence, with the error.

    Here in new processes only: in the command's own, torch comes first, and the hook finds the module by itself.
    """
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\nclass Broken:\n    def find_spec(self, name, path=None, target=None):\n'
        '        if name == "lmdeploy.messages": raise ImportError("libcuda.so.1: cannot open shared object file")\n'
        'sys.meta_path.insert(0, Broken())\n')
    done = command('doctor', PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr
    problems = ' '.join(done.stdout[done.stdout.index('\n1 problem\n'):].split())
    assert 'in a new process: ImportError: libcuda.so.1' in problems and 'Repair that first' in problems


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(environment, 'version', lambda name: None)
    problems = environment.package_problems()
    for name in ('torch', 'triton', 'lmdeploy'):
        assert any(p.startswith(f'{name} is not installed') and 'pip install "' in p for p in problems)
    monkeypatch.setattr(doctor, 'version', lambda name: None)
    assert doctor.hook_problems({}, {}) == []


def test_old_gpus_are_named(monkeypatch):
    from types import SimpleNamespace

    import torch
    cards = [SimpleNamespace(name='T4', major=7, minor=5, total_memory=16 << 30),
             SimpleNamespace(name='A100', major=8, minor=0, total_memory=80 << 30),
             SimpleNamespace(name='L4', major=8, minor=9, total_memory=24 << 30)]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', cards.__getitem__)
    gpus, problems = environment.find_gpus()
    assert [gpu['fp8_conversion'] for gpu in gpus] == ['integer decoding', 'integer decoding', 'hardware']
    assert gpus[1] == {'name': 'A100', 'compute_capability': '8.0', 'memory_gib': 80.0,
                       'fp8_conversion': 'integer decoding'}
    assert len(problems) == 1 and 'GPU 0 (T4)' in problems[0] and '7.5' in problems[0]


def test_find_out_without_installing_the_entry_point():
    assert 'entry point' in doctor._missing_hook() or 'failed while loading' in doctor._missing_hook()


@pytest.mark.parametrize('arguments, says', [
    ((), 'usage: lmdeploy-kvq'), (('docter', ), "invalid choice: 'docter'"), (('doctor', '--jsn'), 'unrecognized'),
    (('doctor', 'extra'), 'unrecognized'), (('doctor', '--quant-policy', 'fp8'), 'give --model MODEL'),
    (('doctor', '--model', '/nowhere/at/all'), 'is no model'), (('calibrate', '--percentile', 'x', 'M'), 'not above 0'),
    (('calibrate', '/nowhere/at/all'), 'is no model'), (('plan', '/nowhere/at/all'), 'there is no'),
    (('eval', '/nowhere/at/all'), 'is no model'), (('eval', ), 'give a MODEL'),
    (('eval', '--task', 'gsm8k'), 'give --server'), (('eval', '--server', 'http://x'), 'needs --task'),
    (('eval', 'M', '--budget', '0'), 'not a number above 0'), (('eval', 'M', '--json', '/nowhere/x.json'), 'no folder'),
    (('eval', 'M', '--plot', 'x.bmp'), '.png, .svg or .pdf'), (('eval', 'M', '--formats', ','), 'separated by commas'),
])
def test_mistakes_end_without_a_traceback(arguments, says):
    done = command(*arguments)
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr and not done.stdout


def test_help_and_version_need_no_torch():
    for arguments in (('--help', ), ('--version', )):
        done = command(*arguments)
        assert done.returncode == 0 and 'lmdeploy-kvq' in done.stdout and not done.stderr
    for row in cli.COMMANDS:
        done = command(row.name, '--help')
        assert done.returncode == 0 and 'examples:\n  ' in done.stdout and f'lmdeploy-kvq {row.name} ' in done.stdout
        assert done.stdout.isascii() and not done.stderr
    code = 'import sys, lmdeploy_kvq.cli as c; c.build_parser(); assert not {"torch", "lmdeploy"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_user_errors_and_interrupts(monkeypatch, capsys):
    def fail(args):
        raise console.UserError('no model at /nowhere; give a folder')

    monkeypatch.setattr(doctor, 'run', fail)
    assert cli.main(['doctor']) == 2
    assert capsys.readouterr().err == 'lmdeploy-kvq: error: no model at /nowhere; give a folder\n'

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, 'run', interrupt)
    assert cli.main(['doctor']) == 130


def test_console_script():
    script = shutil.which('lmdeploy-kvq', path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip('lmdeploy_kvq is not installed in this environment')
    done = subprocess.run([script, '--version'], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f'lmdeploy-kvq {kvq.__version__}\n'


def test_output_into_a_closed_pipe():
    done = subprocess.run(f'"{sys.executable}" -m lmdeploy_kvq.cli doctor | head -n 1', shell=True, check=True,
                          capture_output=True, text=True, timeout=120)
    assert done.stdout == 'Machine\n' and 'BrokenPipe' not in done.stderr


def test_tables_align():
    assert console.table([('a', 1), ('long', 1000)], ['name', 'n'], right='n') == (
        '  name     n\n  a        1\n  long  1000')
    assert console.table([('a', 1), ('long', 10)]) == '  a     1\n  long  10'
