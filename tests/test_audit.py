"""``lmdeploy-kvq doctor --model``: the engine's rules and table, without weights and without a GPU."""
from __future__ import annotations

import json

import pytest
import torch
from test_loading import add_scales, load, value, write_model

from lmdeploy_kvq import FORMATS, cli, modelcheck
from lmdeploy_kvq.backends import audit
from lmdeploy_kvq.backends.loading import SCALES, settle
from lmdeploy_kvq.console import UserError
from lmdeploy_kvq.scales import write_file


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path, 'Qwen3')
    return tmp_path


@pytest.fixture(autouse=True)
def no_scales_from_outside(monkeypatch):
    monkeypatch.setenv(SCALES, '')  # doctor sets it: restored after the test


@pytest.mark.parametrize('family', ['Llama', 'Qwen3Moe', 'Gemma', 'GptOss'])
def test_it_says_what_the_engine_settles_on(tmp_path, family):
    write_model(tmp_path, family)
    add_scales(tmp_path, {f'model.layers.{n}.self_attn.{x}_scale': value(n + 1.5) for n in range(2) for x in 'kv'})
    rows = audit.audit(str(tmp_path), 16)
    assert [row[1:] for row in rows] == [('1.5', '1.5', 'checkpoint'), ('2.5', '2.5', 'checkpoint')]
    if family != 'GptOss':  # its build wants CUDA where there are weights
        assert rows == settle(load(tmp_path), 16, str(tmp_path), 2)


def test_no_weights_are_read(folder):
    """The model has no memory, and of the checkpoint only scales are touched: weights may be unreadable."""
    add_scales(folder, {'model.layers.0.self_attn.k_scale': value(0.5), 'model.layers.1.self_attn.k_scale': value(2.0)})
    model, _ = audit.build_empty(str(folder))
    assert {p.device.type for p in model.parameters()} == {'meta'}
    seen = []
    from safetensors import safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            seen.append(name)
            return self.file.get_tensor(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('safetensors.safe_open', Counting)
        audit.audit(str(folder), 16)
    assert sorted(seen) == ['model.layers.0.self_attn.k_scale', 'model.layers.1.self_attn.k_scale']


def test_the_command_prints_the_table(folder, tmp_path, capsys):
    assert cli.main(['doctor', '--model', str(folder)]) == 1
    text = capsys.readouterr().out
    assert '\nscale file: none\n' in text and text.count('default') == 2
    assert '2 of 2 layers have no fp8 scale' in ' '.join(text.split())
    path = tmp_path / 'other.safetensors'
    write_file(path, {n: (torch.tensor([0.5, 0.25]), value(0.125)) for n in range(2)}, {'method': 'absmax'})
    assert cli.main(['doctor', '--model', str(folder), '--kv-scales', str(path)]) == 0
    text = capsys.readouterr().out
    assert text.count('0.25..0.5  0.125    calibrated') == 2 and text.rstrip().endswith('OK') and str(path) in text
    assert cli.main(['doctor', '--model', str(folder), '--kv-scales', str(path), '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['problems'] == []
    assert list(report['layers'][1].values()) == ['model.layers.1.self_attn.attn_fwd', '0.25..0.5', '0.125',
                                                  'calibrated']


def test_what_the_engine_refuses_is_the_problem(folder, tmp_path):
    assert 'strict: no scales for 2 of 2 layers' in modelcheck.audit(str(folder), 'fp8', 'strict')['problems'][0]
    assert modelcheck.audit(str(folder), 'fp8_e5m2', '')['problems'] == [], 'e5m2 has range to spare'
    path = tmp_path / 'wide.safetensors'
    write_file(path, {n: (value(0.1), value(0.1)) for n in range(2)}, {'format': 'fp8_e5m2'})
    assert 'is for fp8_e5m2' in modelcheck.audit(str(folder), 'fp8', str(path))['problems'][0]
    assert modelcheck.audit(str(folder), 'fp8_e5m2', str(path))['problems'] == []
    add_scales(folder, {'model.layers.0.self_attn.k_scale': value(0.0)})
    assert 'k_scale is 0' in modelcheck.audit(str(folder), 'fp8', '')['problems'][0]


def test_formats_that_can_store_a_model(folder, capsys):
    """Qwen3's heads can be stored by all; with heads of another size none can, and the engine's words say why."""
    found = modelcheck.check_model(str(folder))
    assert found['architecture'] == 'Qwen3ForCausalLM' and found['cache']['layers'] == 2
    assert [row['name'] for row in found['formats']] == [fmt.name for fmt in FORMATS]
    assert all(row['supported'] for row in found['formats']) and len(found['layers']) == 2
    for fmt in FORMATS:
        if fmt.per_token_head:
            found = modelcheck.check_model(str(folder), fmt.name)
            sources = [row['source'] for row in found['layers']]
            assert sources == (['default'] * 2 if fmt.takes_transform else [])
            assert found['problems'] == [] and found['format'] == fmt.name
    config = folder / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'head_dim': 20}))
    found = modelcheck.check_model(str(folder))
    assert not any(row['supported'] for row in found['formats']) and len(found['problems']) == 1
    assert 'head_dim 20 is not supported' in found['problems'][0]
    assert cli.main(['doctor', '--model', str(folder), '--quant-policy', FORMATS[0].name]) == 1
    text = ' '.join(capsys.readouterr().out.split())
    assert text.count(f'{FORMATS[0].name}: head_dim 20 is not supported') == 1 and not text.endswith('OK')


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"architectures": ["NoSuchForCausalLM"], "model_type": "none"}'])
def test_configurations_that_lmdeploy_cannot_read(tmp_path, content, capsys):
    (tmp_path / 'config.json').write_text(content)
    assert cli.main(['doctor', '--model', str(tmp_path)]) == 2
    assert f'LMDeploy cannot read {tmp_path}' in capsys.readouterr().err


def test_mistakes(folder):
    for fmt in FORMATS:
        if fmt.per_token_head and not fmt.takes_transform:
            with pytest.raises(UserError, match=f'{fmt.name} computes its scales as tokens are written'):
                modelcheck.audit(str(folder), fmt.name)
    with pytest.raises(UserError, match='unknown KV cache format'):
        modelcheck.audit(str(folder), 'fp9')
    with pytest.raises(UserError, match='is no model'):
        modelcheck.audit('/nowhere/at/all', 'fp8')


def test_a_file_of_another_model_is_used_with_a_warning(folder, caplog):
    write_file(folder / 'kv_scales.safetensors', {n: (value(0.1), value(0.1)) for n in range(2)},
               {'fingerprint': '0' * 16, 'model': 'another'})
    assert [row[3] for row in audit.audit(str(folder), 16)] == ['file'] * 2
    assert 'was made for another model (another)' in caplog.text


def test_it_works_where_servers_opted_out(folder):
    """In a fresh process with LMDEPLOY_KVQ=0, where LMDeploy's loader alone would not know these names."""
    import os
    import subprocess
    import sys
    add_scales(folder, {'model.layers.0.self_attn.k_scale': value(0.5), 'model.layers.1.self_attn.k_scale': value(2.0)})
    config = folder / 'config.json'
    scheme = {'quant_method': 'compressed-tensors', 'config_groups': {}, 'kv_cache_scheme': {'num_bits': 8}}
    config.write_text(json.dumps({**json.loads(config.read_text()), 'quantization_config': scheme}))
    done = subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'doctor', '--model', str(folder), '--json'],
                          text=True, capture_output=True, timeout=200, env={**os.environ, 'LMDEPLOY_KVQ': '0'})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row['source'] for row in json.loads(done.stdout)['layers']] == ['checkpoint'] * 2
