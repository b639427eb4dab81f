"""``lmdeploy-kvq plan``: agreement with what engines on GPUs allocated, and what it says of a user's mistakes."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy_kvq import FORMATS, capacity, cli
from lmdeploy_kvq.console import UserError
from lmdeploy_kvq.formats import find_format
from lmdeploy_kvq.plan import Settings, cache_shape, num_gpu_blocks, plan, quantity, read_model, tokens

RESULTS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'results'
LLAMA_8B = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 4096, 'num_hidden_layers': 32, 'vocab_size': 128256,
            'num_attention_heads': 32, 'num_key_value_heads': 8, 'intermediate_size': 14336}
H200 = 143771 * 2**20


@pytest.fixture
def written(tmp_path):
    """Writes a config.json with changes (None: left out) and returns its folder."""

    def write(**changes) -> Path:
        config = {key: value for key, value in {**LLAMA_8B, **changes}.items() if value is not None}
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize('file', ['engine', 'engine_tp2'])
def test_blocks_are_those_that_engines_allocated(file, written):
    """Within 1 %, for every format that was served on H200s."""
    model = read_model(written())
    rows = [row for row in json.loads((RESULTS / f'{file}.json').read_text())['rows'] if row.get('num_gpu_blocks')]
    assert {row['policy'] for row in rows} >= {0, 116}
    for row in rows:
        fmt = find_format(row['policy']) if row['contender'] == 'kvq' else None
        settings = Settings(H200, row['tp'], block_size=row['block_size'])
        assert num_gpu_blocks(fmt, model, settings) == pytest.approx(row['num_gpu_blocks'], rel=0.01)


def test_rows_agree_with_capacity(written):
    settings = Settings(80 * 10**9, tp=2)
    model = read_model(written())
    rows = plan(model, settings, 1000, bandwidth=3 * 10**12)
    assert [row['format'] for row in rows] == ['bf16', *(fmt.name for fmt in FORMATS)]
    shape = cache_shape(model, settings)
    assert shape.kv_heads == 4
    for row, fmt in zip(rows, (None, *FORMATS)):
        assert row['bytes_per_token'] == capacity.bytes_per_token(fmt, shape)
        assert row['tokens'] == row['num_gpu_blocks'] * 64
        assert row['requests'] == min(row['num_gpu_blocks'] // 16, 256)  # 1,000 tokens are 16 blocks of 64
        moved = model.weight_bytes / 2 + row['requests'] * 1000 * row['bytes_per_token']
        assert row['step_ms'] == pytest.approx(moved / 3e9)
    one = plan(model, settings, 1000, concurrency=1, bandwidth=3 * 10**12)
    assert one[0]['step_ms'] < rows[0]['step_ms']


def test_layers_without_a_kv_cache_are_not_counted(written):
    kinds = ['linear_attention', 'linear_attention', 'full_attention', 'sliding_attention'] * 8
    assert read_model(written(layer_types=kinds)).layers == 16
    assert read_model(written()).layers == 32


def test_weights_are_files_where_there_are_any(written):
    folder = written()
    assert read_model(folder).estimated
    assert read_model(folder).weight_bytes == pytest.approx(8.03e9 * 2, rel=1e-3)  # Llama-3.1-8B's parameters
    (folder / 'model.safetensors').write_bytes(bytes(1000))
    model = read_model(folder / 'config.json')
    assert (model.weight_bytes, model.estimated) == (1000, False)


def test_fewer_kv_heads_than_gpus_are_replicated(written):
    model = read_model(written(num_key_value_heads=2))
    assert cache_shape(model, Settings(H200, tp=4)).kv_heads == 1
    with pytest.raises(UserError, match='3 KV heads do not split over 2'):
        cache_shape(read_model(written(num_key_value_heads=3)), Settings(H200, tp=2))


def test_text_models_inside_others(written):
    assert read_model(written(text_config={**LLAMA_8B, 'num_hidden_layers': 7}, hidden_size=None)).layers == 7


@pytest.mark.parametrize('text, value', [('141G', 141 * 10**9), ('80Gi', 80 * 2**30), ('3.3T', 3_300_000_000_000),
                                         ('64', 64), ('1.5gib', 3 * 2**29)])
def test_quantities(text, value):
    assert quantity(text) == value
    assert tokens('32k') == 32768 and tokens('1000') == 1000


@pytest.mark.parametrize('arguments, words', [
    (['--gpu-memory', 'much'], 'no quantity'), (['--gpu-memory', '0'], 'no quantity'),
    (['--gpu-memory', '1.2.3G'], 'no quantity'),
    (['--gpu-memory', '80G', '--tp', '3'], 'do not split over 3 GPUs'),
    (['--gpu-memory', '80G', '--cache-max-entry-count', '2'], 'up to 1'),
])
def test_mistakes_are_named(arguments, words, written, capsys):
    try:
        code = cli.main(['plan', str(written()), *arguments])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize('changes, words', [
    ({'num_attention_heads': None}, 'num_attention_heads'), ({'kv_lora_rank': 512}, 'latent'),
])
def test_models_it_cannot_plan_are_named(changes, words, written):
    with pytest.raises(UserError, match=words):
        read_model(written(**changes))


@pytest.mark.parametrize('content', ['{', '[1]', '{"num_attention_heads": 0, "num_hidden_layers": 2, "hidden_size": 8}',
                                     '{"num_attention_heads": "8", "num_hidden_layers": 2, "hidden_size": 8}',
                                     '{"architectures": 3}'])
def test_damaged_configurations_are_named(tmp_path, content, capsys):
    (tmp_path / 'config.json').write_text(content)
    assert cli.main(['plan', str(tmp_path), '--gpu-memory', '80G']) == 2
    assert f'{tmp_path}/config.json' in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match='there is no'):
        read_model(tmp_path / 'nothing')


def test_what_a_user_sees(written, capsys):
    """The table, the answer to --concurrency, and exit code 1 if nothing fits."""
    folder = str(written())
    assert cli.main(['plan', folder, '--gpu-memory', '40G', '--context', '32k', '--concurrency', '6']) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    answer = ' '.join(text[text.index('6 requests of 32,768 tokens at once: '):].split())
    assert all(fmt.name in answer for fmt in FORMATS) and 'bf16' not in answer
    assert cli.main(['plan', folder, '--gpu-memory', '16G']) == 1
    capsys.readouterr()
    assert cli.main(['plan', folder, '--gpu-memory', '40G', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['rows'][0]['format'] == 'bf16'
