"""Mistakes and damaged files: ``lmdeploy-kvq eval`` and ``calibrate`` say each in a sentence."""
from __future__ import annotations

import os
import shutil

import pytest
import torch

from lmdeploy_kvq import FORMATS, cli, console
from lmdeploy_kvq.console import UserError

pytest.importorskip('transformers', minversion='5')
pytest.importorskip('rich')
from test_calibrate import folder  # noqa: F401  a fixture
from test_eval import QUICK

from lmdeploy_kvq.evaluation import through_transformers


@pytest.mark.parametrize('arguments, words', [
    (['--formats', 'fp9'], "unknown cache format 'fp9'; known are all, " + FORMATS[0].name),
    (['--formats', 'fp9'], "LMDeploy's own, int4, int8, lmdeploy:fp8"),
    (['--formats', 'int4'], "int4 is LMDeploy's own; it can be measured where there is a GPU"),
    (['--formats', 'lmdeploy:fp8'], "lmdeploy:fp8 is LMDeploy's own"),
    (['--length', '5k'], '--length 5,120: this model reads 4,096 tokens at most'),
    (['--needles', '8k'], '--needles 8,192: this model reads 4,096'), (['--needles', '20'], 'cannot hold a needle'),
    (['--needles', 'x'], 'no quantity'), (['--new-tokens', 'x'], "'x' is no number"),
    (['--text', '/nowhere.txt'], '/nowhere.txt cannot be read as text'), (['--text', 'EMPTY'], 'no text to score'),
    (['--text', 'BINARY'], 'cannot be read as text'), (['--kv-scales', '/nowhere'], 'there is no scale file /nowhere'),
    (['--per-layer', 'none'], '--per-layer needs a format of this package'),
    (['--per-layer', 'fp9'], 'unknown cache format'), (['--json', 'FOLDER'], 'it is a folder'),
    (['--engine', 'lmdeploy'], 'needs a GPU'),
])
def test_mistakes_are_said_in_a_sentence(folder, tmp_path, arguments, words, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (tmp_path / 'BINARY').write_bytes(b'\xff\xfe\x00\x01')
    (tmp_path / 'EMPTY').write_text('')
    (tmp_path / 'FOLDER').mkdir()
    arguments = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    quick = list(QUICK) if '--engine' not in arguments else []
    try:
        code = cli.main(['eval', str(folder), *quick, *arguments])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    err = capsys.readouterr().err
    assert words in err and err.strip().splitlines()[-1].startswith('lmdeploy-kvq')


@pytest.mark.parametrize('break_it, words', [
    (lambda path: (path / 'config.json').write_text('{'), 'config.json'),
    (lambda path: (path / 'config.json').write_text('{"model_type": "none"}'), 'config.json'),
    (lambda path: (path / 'model.safetensors').unlink(), 'transformers cannot load'),
    (lambda path: (path / 'model.safetensors').write_bytes(b'broken'), 'transformers cannot load'),
    (lambda path: (path / 'tokenizer.json').write_text('{'), 'no tokenizer'),
])
@pytest.mark.parametrize('command', ['eval', 'calibrate'])
def test_damaged_models_are_said_in_a_sentence(folder, tmp_path, command, break_it, words, capsys):  # noqa: F811
    model = shutil.copytree(folder, tmp_path / 'model')
    break_it(model)
    more = QUICK if command == 'eval' else ('-o', str(tmp_path / 'x'), '--engine', 'transformers', '--tokens', '100')
    assert cli.main([command, str(model), *more]) == 2
    err = capsys.readouterr().err
    assert words in err or (command == 'calibrate' and str(model) in err)
    assert err.strip().splitlines()[-1].startswith('lmdeploy-kvq: error: ') and not (tmp_path / 'x').exists()


def test_models_without_plain_caches_are_refused(tmp_path):
    """A Mamba keeps a state instead of K and V."""
    from transformers import MambaConfig, MambaForCausalLM
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).save_pretrained(
        tmp_path)
    with pytest.raises(UserError, match='MambaForCausalLM'):
        through_transformers.prepare(str(tmp_path))


@pytest.mark.parametrize('package, arguments', [('rich', ()), ('matplotlib', ('--plot', 'x.png'))])
def test_missing_extras_are_named_before_any_work(folder, package, arguments, monkeypatch, capsys):  # noqa: F811
    real = console.find_spec
    monkeypatch.setattr(console, 'find_spec', lambda name: None if name == package else real(name))
    assert cli.main(['eval', str(folder), *QUICK, *arguments]) == 2
    assert f'{package} is not installed; run `pip install "lmdeploy-kvq[tools]"`' in capsys.readouterr().err


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='nothing is forbidden to root')
def test_files_that_must_not_be_written(folder, tmp_path, capsys):  # noqa: F811
    tmp_path.chmod(0o500)
    assert cli.main(['eval', str(folder), '--json', str(tmp_path / 'e.json')]) == 2
    assert 'no permission' in capsys.readouterr().err
    assert cli.main(['calibrate', str(folder), '-o', str(tmp_path / 's.safetensors')]) == 2
    assert 'no permission' in capsys.readouterr().err
