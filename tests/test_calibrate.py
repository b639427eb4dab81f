"""``lmdeploy-kvq calibrate`` on a small model through transformers, and the observer of LMDeploy's attention."""
from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmdeploy_kvq import calibrate, cli
from lmdeploy_kvq.console import UserError
from lmdeploy_kvq.kvstats import ModelStatistics
from lmdeploy_kvq.scales import fingerprint, read_file, validate

pytest.importorskip('transformers', minversion='5')
from transformers import LlamaConfig, LlamaForCausalLM

from lmdeploy_kvq import hf_observer
from lmdeploy_kvq.hf_cache import QuantizedCache

LAYERS, KV_HEADS, DIM = 3, 2, 16


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(**dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=4096, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1) | changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    # LMDeploy takes a chat template by the folder's name; pytest's third 'llama' on a worker would be a Llama 2
    path = tmp_path_factory.mktemp('model') / 'tiny'
    llama().save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def kv(model, ids):
    """Post-RoPE K and V [tokens, kv_heads, dim] of every layer, from the model's own cache."""
    with torch.inference_mode():
        layers = model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    return [tuple(x[0].transpose(0, 1) for x in (layer.keys, layer.values)) for layer in layers]


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_transformers_are_observed(attention):
    """Statistics are those of the model's own cache, prompts and generated tokens; logits stay as they are."""
    model, ids = llama(attn_implementation=attention), list(range(3, 40))
    before = model(torch.tensor([ids])).logits
    seen, done = ModelStatistics(), []
    hf_observer.observe(model, [ids, ids[:20]], 6, seen, done.append)
    assert done == [37, 20] and sorted(seen.layers) == list(range(LAYERS))
    assert model.config._attn_implementation == attention
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([ids])).logits, before)
        whole = [model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, pad_token_id=0,
                                eos_token_id=None)[0, :-1].tolist() for p in (ids, ids[:20])]
    assert seen.tokens == sum(map(len, whole)) == 37 + 20 + 2 * 5
    for layer, pairs in enumerate(zip(*(kv(model, p) for p in whole))):
        got = seen.layers[layer]
        torch.testing.assert_close(got.key.absmax, torch.cat([k for k, _ in pairs]).abs().amax((0, 2)))
        torch.testing.assert_close(got.value.absmax, torch.cat([v for _, v in pairs]).abs().amax((0, 2)))
        k = torch.cat([k[1:] for k, _ in pairs])
        torch.testing.assert_close(got.tensors()['k_second_moment'], torch.einsum('thd,the->hde', k, k) / k.size(0))


def test_queries_are_those_that_attend():
    """Scores from the observed second moments: trace(Sq Sk) is the mean square score over all pairs of tokens."""
    model, ids = llama(num_hidden_layers=1), list(range(3, 60))
    seen = ModelStatistics()
    hf_observer.observe(model, [ids], 0, seen, lambda tokens: None)
    attention = model.model.layers[0].self_attn
    with torch.inference_mode():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
        q, k = (proj(hidden).view(1, len(ids), -1, DIM).transpose(1, 2) for proj in (attention.q_proj,
                                                                                      attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(hidden, torch.arange(len(ids))[None]))
    for head in range(KV_HEADS):
        scores = q[0, 2 * head:2 * head + 2, 1:] @ k[0, head, 1:].T
        moments = seen.layers[0].tensors()
        expected = torch.trace(moments['q_second_moment'][head] @ moments['k_second_moment'][head])
        torch.testing.assert_close(scores.square().mean(), expected)


def arguments(folder, out, *more):
    return ['calibrate', str(folder), '-o', str(out), '--tokens', '300', '--length', '100', '--new-tokens', '4',
            '--engine', 'transformers', *more]


def test_the_command_writes_a_file_that_fits_the_model(folder, tmp_path, capsys):
    out = tmp_path / 'scales.safetensors'
    assert cli.main(arguments(folder, out)) == 0
    printed = capsys.readouterr()
    assert f'{LAYERS} layers from 309 tokens' in printed.out and '300/300 tokens' in printed.err
    file = read_file(out)
    validate(file, range(LAYERS), KV_HEADS)
    assert file.metadata.pop('date').count('-') == 2
    assert file.metadata.pop('scale_digest')
    assert file.metadata == {'format': calibrate.STATIC[0].name, 'method': 'absmax', 'granularity': 'tensor',
                             'model': folder.name, 'fingerprint': fingerprint(folder), 'tokens': '309',
                             'data': 'built-in', 'engine': 'transformers', 'partial': 'false'}
    text = '\n'.join(path.read_text() for path in sorted((Path(cli.__file__).parent / 'data').glob('*.txt')))
    ids = calibrate.tokenize(str(folder), text)
    model = llama()
    seen = ModelStatistics()
    hf_observer.observe(model, calibrate.cut(ids, 100, 300), 4, seen, lambda tokens: None)
    for layer, pair in seen.scales(calibrate.STATIC[0]).items():
        for mine, theirs in zip(file.layers[layer].resolved('')[:2], pair):
            torch.testing.assert_close(mine, theirs)


def test_calibrating_from_python(folder, tmp_path):
    """The function returns what the file has."""
    settings = calibrate.Settings(tokens=200, length=100, new_tokens=2, engine='transformers', granularity='head')
    found = calibrate.calibrate(str(folder), tmp_path / 's.safetensors', settings=settings)
    assert (found.path, found.format, found.tokens, found.partial) == (
        tmp_path / 's.safetensors', calibrate.STATIC[0].name, 202, False)
    file = read_file(found.path)
    for layer, pair in found.scales.items():
        assert pair[0].shape == (KV_HEADS, )
        for mine, theirs in zip(pair, file.layers[layer].resolved('')[:2]):
            torch.testing.assert_close(mine, theirs)


def test_standard_input_per_head_and_methods(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'scales.safetensors'
    fmt = calibrate.STATIC[-1]
    monkeypatch.setattr('sys.stdin', io.StringIO('Some text to run, long enough to be cut into pieces. ' * 10))
    assert cli.main(arguments(folder, out, '--data', '-', '--granularity', 'head', '--method', 'percentile',
                              '--percentile', '99', '--format', fmt.name)) == 0
    file = read_file(out)
    validate(file, range(LAYERS), KV_HEADS)
    assert file.layers[0].k.shape == (KV_HEADS, ) and file.metadata['data'] == 'stdin'
    assert file.metadata['percentile'] == '99.0' and file.metadata['format'] == fmt.name


def test_interrupted(folder, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle: what has been seen is written, marked; before anything is seen, nothing is."""
    out = tmp_path / 'scales.safetensors'
    real = hf_observer.observe

    def interrupted(model, pieces, new_tokens, statistics, done, count=2):
        real(model, pieces[:count], new_tokens, statistics, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_observer, 'observe', interrupted)
    assert cli.main(arguments(folder, out)) == 130
    file = read_file(out)
    validate(file, range(LAYERS), KV_HEADS)
    assert file.metadata['partial'] == 'true' and file.metadata['tokens'] == '206'
    out.unlink()
    monkeypatch.setattr(hf_observer, 'observe', lambda *args: interrupted(*args, count=0))
    assert cli.main(arguments(folder, out)) == 130
    assert not out.exists() and 'nothing is written' in capsys.readouterr().err


def test_ctrl_c_of_a_real_process(folder, tmp_path):
    """SIGINT while the bar runs: a valid partial file and exit code 130, no traceback."""
    out = tmp_path / 'scales.safetensors'
    code = f"""
import os, signal, sys
from lmdeploy_kvq import cli, hf_observer, kvstats
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
update, count = kvstats.ModelStatistics.update, [0]
def slow(self, *args):
    update(self, *args)
    count[0] += 1
    if count[0] == 8:
        os.kill(os.getpid(), signal.SIGINT)
kvstats.ModelStatistics.update = slow
sys.exit(cli.main({arguments(folder, out)!r}))
"""
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, timeout=120)
    assert done.returncode == 130 and 'Traceback' not in done.stderr, done.stderr
    assert read_file(out).metadata['partial'] == 'true'


@pytest.mark.parametrize(('more', 'message'), [
    (['--data', '/nowhere.txt'], '/nowhere.txt cannot be read as text'),
    (['-o', '/nowhere/x.safetensors'], '/nowhere is no folder'),
    (['--engine', 'lmdeploy'], '--engine lmdeploy needs a GPU'),
])
def test_mistakes_are_said_in_a_sentence(folder, tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert cli.main(arguments(folder, tmp_path / 'x.safetensors', *more)) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_model_or_no_text(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'is no model: FileNotFoundError: no folder with a config\.json'):
        calibrate.model_folder(str(tmp_path))
    monkeypatch.setattr('sys.stdin', io.StringIO(''))
    args = cli.build_parser().parse_args(arguments(folder, tmp_path / 'x.safetensors', '--data', '-'))
    with pytest.raises(UserError, match='stdin holds no text'):
        calibrate.run(args)


def test_pieces_are_spread_over_the_text():
    ids = list(range(1000))
    pieces = calibrate.cut(ids, 100, 300)
    assert [p[0] for p in pieces] == [0, 300, 600] and all(len(p) == 100 for p in pieces)
    assert calibrate.cut(ids, 2000, 4000) == [ids] and calibrate.cut(ids, 100, 50) == [ids[:50]]
    assert calibrate.cut([], 100, 300) == []


def test_files_of_scales_serve_the_transformers_cache(folder, tmp_path):
    """One pair per layer: keys beyond fp8's range lose no more than the model whose keys are within it."""
    from lmdeploy_kvq.scales import ScaleError, write_file
    model, ids = llama(), torch.tensor([list(range(3, 60))])
    out, fmt = tmp_path / 's.safetensors', calibrate.STATIC[0]

    @torch.inference_mode()
    def error(**how):
        full = model(ids).logits
        return float((model(ids, past_key_values=QuantizedCache(fmt, **how)).logits - full).norm() / full.norm())

    within = error()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 500
        layer.self_attn.q_proj.weight.data /= 500
    seen = ModelStatistics()
    hf_observer.observe(model, [ids[0].tolist()], 0, seen, lambda tokens: None)
    write_file(out, seen.scales(fmt), {})
    assert error(scales=out) < 1.2 * within and error() > 2 * within
    write_file(out, {0: (torch.ones(()), torch.ones(()))}, {})
    with pytest.raises(ScaleError, match='no scales for layer 1'):
        model(ids, past_key_values=QuantizedCache(fmt, scales=out))


@pytest.mark.parametrize('kind', [None, 'balanced', 'diagonal'])
def test_transforms_from_the_command(folder, tmp_path, capsys, kind):
    """A file of transforms alone; the transformers cache takes it, and the model's own statistics are in it."""
    from lmdeploy_kvq.scales import ScaleError, validate_transforms
    from lmdeploy_kvq.transforms import digest_of
    out = tmp_path / 's.safetensors'
    fmt = next(fmt for fmt in calibrate.CALIBRATED if fmt.takes_transform)
    more = [] if kind is None else ['--transform', kind]
    assert cli.main(arguments(folder, out, '--format', fmt.name, *more)) == 0
    assert f'{kind or "balanced"} transforms of {LAYERS} layers' in capsys.readouterr().out
    file = read_file(out)
    assert file.layers == {} and file.metadata['transform'] == (kind or 'balanced')
    assert file.metadata['transform_digest'] == digest_of(file.transforms) and 'method' not in file.metadata
    validate_transforms(file, range(LAYERS), KV_HEADS, DIM)
    model, ids = llama(), torch.tensor([list(range(3, 60))])
    with torch.inference_mode():
        logits = [model(ids, past_key_values=QuantizedCache(fmt, scales=path)).logits for path in (None, out)]
    assert not torch.equal(*logits) and logits[1].isfinite().all()
    with pytest.raises(ScaleError, match='no scales for layer 0'):
        model(ids, past_key_values=QuantizedCache(calibrate.STATIC[0], scales=out))


def test_one_file_for_scales_and_transforms(folder, tmp_path, capsys):
    out = tmp_path / 's.safetensors'
    assert cli.main(arguments(folder, out, '--transform', 'diagonal')) == 0
    file = read_file(out)
    assert sorted(file.layers) == sorted(file.transforms) == list(range(LAYERS))
    assert 'fp8 scales and diagonal transforms' in capsys.readouterr().out
    fmt = next(fmt for fmt in calibrate.CALIBRATED if fmt.takes_transform)
    assert cli.main(arguments(folder, out, '--format', fmt.name, '--transform', 'none')) == 2
    assert 'leaves nothing to write' in capsys.readouterr().err


def test_the_engines_attention_is_observed(monkeypatch):
    """Packed sequences through the hook's own wrapper: prefill with and without history, then decoding."""
    from lmdeploy_kvq.backends import attention, observer
    seen = ModelStatistics()
    watcher = observer.Observer(seen)
    impls = [object(), object()]
    watcher.attach({5: SimpleNamespace(impl=impls[0]), 9: SimpleNamespace(impl=impls[1])})
    monkeypatch.setattr(observer, 'ACTIVE', watcher)
    calls = []

    def step(impl, q_lens, kv_lens, padding=0):
        tokens = sum(q_lens) + padding
        q, k, v = torch.randn(tokens, 4, DIM), torch.randn(tokens, KV_HEADS, DIM), torch.randn(tokens, KV_HEADS, DIM)
        meta = SimpleNamespace(quant_policy=0, q_seqlens=torch.tensor(q_lens), kv_seqlens=torch.tensor(kv_lens))
        attention.forward(lambda impl, *args, **kwargs: calls.append(args), impl, q, k, v, None, None, meta)
        return k[:sum(q_lens)]

    step(impls[0], [3, 4], [3, 4])
    assert not seen.layers, 'warm-up is not counted'
    watcher.counting = True
    parts = [step(impls[0], [3, 4], [3, 9]), step(impls[0], [1, 1], [4, 10], padding=2)]
    step(object(), [5], [5])
    assert sorted(seen.layers) == [5] and len(calls) == 4
    layer, k = seen.layers[5], torch.cat(parts)
    assert layer.tokens == 9 and layer.moment_tokens == 8, 'the first token of the only fresh sequence is left out'
    assert torch.equal(layer.key.absmax, k.abs().amax((0, 2)))
    torch.testing.assert_close(layer.key_moment, torch.einsum('thd,the->hde', k[1:], k[1:]))


def test_the_engine_watches_the_layers_it_builds(monkeypatch):
    """LMDeploy 0.18 accepts what the observer asks of it: one GPU, in this process, eager, unquantized."""
    import inspect

    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.engine import executor
    assert executor.get_distributed_executor_backend(1, 1, 'cuda') == 'uni'
    config = PytorchEngineConfig(quant_policy=0, eager_mode=True, distributed_executor_backend='uni')
    assert config.distributed_executor_backend == 'uni' and not config.enable_mp_engine
    source = inspect.getsource(executor.build_executor)
    assert "distributed_executor_backend == 'uni'" in source
