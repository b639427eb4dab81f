"""``lmdeploy-kvq eval`` through transformers on a small model: figures against independent ones, output, mistakes."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from lmdeploy_kvq import FORMATS, accuracy, capacity, cli
from lmdeploy_kvq.calibrate import STATIC
from lmdeploy_kvq.console import UserError

pytest.importorskip('transformers', minversion='5')
pytest.importorskip('rich')
from test_calibrate import DIM, KV_HEADS, LAYERS, folder, llama  # noqa: F401  a fixture
from transformers import AutoTokenizer

from lmdeploy_kvq.eval import Settings, evaluate
from lmdeploy_kvq.evaluation import material, rows, through_transformers
from lmdeploy_kvq.hf_cache import QuantizedCache

TEXT = 'The tide came in over the sand, and the boats that had lain on their sides stood up one by one. ' * 8
SMALL = {'tokens': 300, 'length': 100, 'new_tokens': 6, 'needles': (200, 300), 'engine': 'transformers'}
QUICK = ('--tokens', '120', '--length', '60', '--new-tokens', '3', '--needles', '160', '--engine', 'transformers')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'tide.txt'
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope='module')
def found(folder, text):  # noqa: F811
    return evaluate(str(folder), Settings(text=text, gpu_memory=80 * 10**9, per_layer=FORMATS[0].name, **SMALL))


# --- figures -------------------------------------------------------------------------------------------------------


def test_scores_follow_their_formulas():
    """KL(p || q), nats, by PyTorch's own function; likeliest tokens; log-probability of what follows."""
    torch.manual_seed(0)
    p, q, ids = torch.randn(300, 50), torch.randn(300, 50), torch.randint(0, 50, (300, )).tolist()
    found = accuracy.score(ids, q, p.log_softmax(-1).half())
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction='none', log_target=True)
    torch.testing.assert_close(found.kl, expected.sum(-1), rtol=5e-3, atol=5e-3)
    assert (found.same == (p.argmax(-1) == q.argmax(-1))).float().mean() > 0.99
    loss = torch.nn.functional.cross_entropy(q[:-1], torch.tensor(ids[1:]))
    figures = accuracy.summary([found])
    assert figures['perplexity'] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures['tokens'] == 300 and figures['p99_kl'] == pytest.approx(float(found.kl.quantile(0.99)), rel=1e-4)
    own = accuracy.score(ids, q)
    assert own.kl.abs().max() == 0 and own.same.all()


def test_a_reference_with_impossible_tokens_is_finite():
    """fp16 stores log-probabilities below -65,504 as -inf; they contribute nothing."""
    p = torch.tensor([[0.0, -float('inf'), 1.0]] * 2)
    found = accuracy.score([0, 2], torch.zeros(2, 3), p)
    assert found.kl.isfinite().all() and (found.kl > 0).all()


def test_broken_predictions_look_bad():
    logits = torch.full((2, 5), float('nan'))
    assert accuracy.ranks(logits, [1, 2]) == [5, 5]
    figures = accuracy.summary([accuracy.score([0, 1], logits, torch.zeros(2, 5))])
    assert math.isnan(figures['mean_kl'])
    row = {'format': 'x', 'policy': 1, 'stock': False, 'error': None, 'bytes_per_token': 1.0, 'gain': 2.0, **figures}
    assert rows.pick([row], 10.0) is None and rows.advice([row], 10.0, '').startswith('No cache is within')


def test_gaps_are_zero_for_the_likeliest():
    """In nats, whatever is added to a row; logits of 16 bits are compared as fp32."""
    logits = torch.tensor([[1.0, 3.0, 2.5], [4.0, 0.0, 4.0]], dtype=torch.bfloat16) + torch.tensor([[2.0], [-8.0]])
    assert accuracy.gaps(logits.bfloat16(), [2, 1]).tolist() == pytest.approx([0.5, 4.0])
    assert accuracy.gaps(logits, [1, 2]).tolist() == [0.0, 0.0]


def test_ranks_and_agreement():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    assert accuracy.ranks(logits, [0, 2]) == [1, 2], 'of equal ones the first is what greedy decoding takes'
    assert accuracy.ranks(logits, [3, 1]) == [4, 1]
    assert accuracy.agreeing([1, 2, 3], [1, 2, 4]) == 2 and accuracy.agreeing([1, 2], [1, 2]) == 2


def test_rows_are_those_of_an_independent_run(found, folder, text):  # noqa: F811
    """KL and greedy continuations, computed here with the cache itself."""
    assert [row['format'] for row in found.rows] == ['none', *(fmt.name for fmt in FORMATS)]
    model, tokenizer = llama().float(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT)
    pieces = [ids[i * len(ids) // 100 // 3 * 100:][:100] for i in range(3)]
    assert found.rows[0]['mean_kl'] == 0 and found.rows[0]['tokens'] == 300
    shape = capacity.CacheShape(LAYERS, KV_HEADS, DIM)

    @torch.inference_mode()
    def logp(piece, cache):
        return model(torch.tensor([piece]), past_key_values=cache).logits[0].log_softmax(-1)

    for fmt, row in zip(FORMATS, found.rows[1:]):
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in ((logp(x, None), logp(x, QuantizedCache(fmt))) for x in pieces)]
        assert row['mean_kl'] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3) and row['mean_kl'] > 0
        assert row['bytes_per_token'] == capacity.bytes_per_token(fmt, shape)
        assert row['gain'] == pytest.approx(capacity.gain(fmt, shape))
        assert row['tokens_that_fit'] > found.rows[0]['tokens_that_fit']
        assert list(row['domains']) == ['tide.txt'] and 0 <= row['greedy_agreement'] <= row['greedy_tokens'] == 6


def test_greedy_agreement_is_that_of_generate(found, folder):  # noqa: F811
    model, tokenizer = llama().float(), AutoTokenizer.from_pretrained(folder)
    fmt = FORMATS[-1]
    agree = []
    ids = tokenizer.encode(TEXT)
    for i in range(3):
        prompt = torch.tensor([ids[i * len(ids) // 100 // 3 * 100:][:material.PROMPT_TOKENS]])
        out = [model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0,
                              eos_token_id=None)[0, prompt.size(1):].tolist() for cache in (None, QuantizedCache(fmt))]
        agree.append(accuracy.agreeing(*out))
    assert found.rows[-1]['greedy_agreement'] == pytest.approx(sum(agree) / 3)


def test_one_layer_at_a_time(found, text, tmp_path):
    """Ranked; of a model with one layer, that layer alone is the whole cache; other layers stay exact."""
    assert [row['layer'] for row in found.layers] != [] and len(found.layers) == LAYERS
    kls = [row['mean_kl'] for row in found.layers]
    assert kls == sorted(kls, reverse=True) and kls[-1] > 0 and found.layer_format == FORMATS[0].name
    model, ids = llama(num_hidden_layers=2).float(), torch.tensor([list(range(3, 90))])
    with torch.inference_mode():
        caches = [through_transformers.OneLayerCache(FORMATS[0], 1), None]
        one, exact = (model(ids, past_key_values=cache, use_cache=True).past_key_values for cache in caches)
        assert torch.equal(one.layers[0].keys, exact.layers[0].keys)
        assert not torch.equal(one.layers[1].keys, exact.layers[1].keys)
        # token by token, the same is stored
        steps = through_transformers.OneLayerCache(FORMATS[0], 1)
        for i in range(ids.size(1)):
            model(ids[:, i:i + 1], past_key_values=steps)
        torch.testing.assert_close(steps.layers[1].keys, one.layers[1].keys, rtol=1e-2, atol=1e-2)
        single = llama(num_hidden_layers=1).float()
        torch.testing.assert_close(
            single(ids, past_key_values=through_transformers.OneLayerCache(FORMATS[0], 0)).logits,
            single(ids, past_key_values=QuantizedCache(FORMATS[0])).logits)


# --- material ------------------------------------------------------------------------------------------------------


def test_needles_stand_where_they_should(folder):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    needles = material.needles(tokenizer, (400, 2000, 100_000))
    assert len(needles) == 3 * len(material.DEPTHS) and len({needle.answer for needle in needles}) > 10
    for needle in needles:
        assert abs(len(needle.ids) - needle.length) <= 8
        sentence = needle.prompt[needle.prompt.rindex('The secret number'):]
        at = needle.prompt.index(f'{sentence} {needle.answer}.')
        assert needle.prompt.count(f'{sentence} {needle.answer}') == 1 and needle.prompt.endswith(sentence)
        hay = len(needle.prompt) - 2 * len(sentence)
        assert abs(at / hay - needle.depth) < (0.3 if needle.length < 1000 else 0.1)
        answer = tokenizer.decode(needle.answer_ids)
        assert answer.strip() == needle.answer and needle.ids[-len(needle.answer_ids):] == needle.answer_ids
    assert needles == material.needles(tokenizer, (400, 2000, 100_000))
    with pytest.raises(UserError, match='cannot hold a needle'):
        material.needles(tokenizer, (20, ))


def test_an_answer_is_found_as_greedy_decoding_finds_it(folder):  # noqa: F811
    """One pass over prompt and answer says what generate() says, for right answers and wrong ones."""
    model, tokenizer = llama().float(), AutoTokenizer.from_pretrained(folder)
    needle = material.needles(tokenizer, (200, ))[0]
    prompt = needle.ids[:-len(needle.answer_ids)]
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0,
                             eos_token_id=None)[0, len(prompt):].tolist()
        right = material.Needle(200, 0, '', '', prompt + out, out)
        found = through_transformers._search(model, right, None)
        assert found.exact and found.ranks == [1] * 5 and found.reciprocal_rank == 1
        wrong = [*out[:3], (out[3] + 1) % 256, out[4]]
        found = through_transformers._search(model, material.Needle(200, 0, '', '', prompt + wrong, wrong), None)
        assert not found.exact and found.ranks[:3] == [1] * 3 and found.ranks[3] > 1


def test_a_tokenizers_first_token_begins_every_passage(folder):  # noqa: F811
    from tokenizers.processors import TemplateProcessing
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({'bos_token': '<s>'})
    first = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', first)])
    found = material.gather(tokenizer, None, 200, 50, 4, (200, ))
    assert all(passage.ids[0] == first and first not in passage.ids[1:] for passage in found.passages)
    assert max(len(passage.ids) for passage in found.passages) == 50
    assert {passage.domain for passage in found.passages} == {'prose', 'technical'}
    assert all('<s>' not in prompt for prompt in found.prompts) and found.needles[0].ids[0] == first


# --- advice --------------------------------------------------------------------------------------------------------


def row(name, size, kl, **more):
    return {'format': name, 'policy': 1, 'stock': False, 'floor': False, 'error': None, 'bytes_per_token': size,
            'gain': 100 / size, 'mean_kl': kl, **more}


def test_the_smallest_within_the_budget():
    table = [row('none', 100, 0.0, policy=0), row('a', 50, 0.004), row('b', 50, 0.002), row('c', 20, 0.05),
             row('lmdeploy:c', 10, 0.001, stock=True), row('theirs', 30, 0.008, stock=True), row('d', 5, 0, error='x')]
    assert rows.pick(table, 0.01)['format'] == 'theirs' and rows.pick(table, 0.005)['format'] == 'b'
    assert rows.pick(table, 0.1)['format'] == 'c' and rows.pick(table, 1e-4) is None
    text = rows.advice(table, 0.005, '')
    assert '--quant-policy b:' in text and '2.00 times' in text and text.count('. ') == 0
    assert 'nearest is lmdeploy:c with 0.001' in rows.advice(table, 1e-4, '')


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def printed(folder, text, tmp_path_factory):  # noqa: F811
    """What a user gets who pipes the output, at 80 columns."""
    out = tmp_path_factory.mktemp('out')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('LMDEPLOY_KVQ', 'TRITON_INTERPRET'))}
    done = subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'eval', str(folder), *QUICK, '--text', text,
                           '--gpu-memory', '80G', '--budget', '5', '--json', str(out / 'e.json'), '--plot',
                           str(out / 'e.png'), '--per-layer'], text=True, capture_output=True, timeout=300,
                          env={**env, 'COLUMNS': '80', 'CUDA_VISIBLE_DEVICES': ''})
    return done, out


def test_what_a_user_sees(printed):
    done, _ = printed
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and done.stdout.isascii() and '\x1b' not in done.stdout + done.stderr
    for fmt in FORMATS:
        assert sum(line.startswith(f'{fmt.name} ') for line in lines) == 2, 'in the table, and among the needles'
    advice = done.stdout[done.stdout.index('Serve with --quant-policy'):]
    assert advice.count('. ') == 0 and advice.endswith('.\n')
    smallest = min(FORMATS, key=lambda fmt: fmt.bits_per_element(DIM)).bits_per_element(DIM)
    named = advice.partition('--quant-policy ')[2].partition(':')[0]
    assert next(fmt for fmt in FORMATS if fmt.name == named).bits_per_element(DIM) == smallest
    assert 'mean 1/rank' in done.stdout, 'a random model finds no needles, and the score says so'
    for fmt in STATIC:
        assert f'{fmt.name}: static scales of 1.0' in done.stdout
    assert 'measuring' in done.stderr and 'Traceback' not in done.stderr


def test_json_has_everything(printed, found):
    data = json.loads((printed[1] / 'e.json').read_text())
    assert {'torch', 'lmdeploy', 'transformers', 'gpus', 'date'} <= set(data['environment'])
    assert [row['format'] for row in data['rows']] == ['none', *(fmt.name for fmt in FORMATS)]
    assert data['rows'][1].keys() == found.rows[1].keys() and len(data['layers']) == LAYERS
    assert data['advice'] in ' '.join(printed[0].stdout.split()) and data['needle_measure'] == 'reciprocal_rank'
    assert data['settings']['tokens'] == 120 and data['engine'] == 'transformers' and data['budget'] == 5


def test_the_picture(printed, tmp_path, found):
    pytest.importorskip('matplotlib')
    from lmdeploy_kvq.evaluation import report
    assert (printed[1] / 'e.png').read_bytes().startswith(b'\x89PNG')
    report.draw(tmp_path / 'e.svg', found.rows, 0.01, 'title')
    drawn = (tmp_path / 'e.svg').read_text()
    assert all(f'>{fmt.name}<' in drawn for fmt in FORMATS) and 'budget: 0.01' in drawn
    with pytest.raises(UserError, match='is not drawn: no cache differs'):
        report.draw(tmp_path / 'f.svg', found.rows[:1], 0.01, 'title')
    with pytest.raises(UserError, match=r'is not drawn: .*xyz'):
        report.draw(tmp_path / 'f.xyz', found.rows, 0.01, 'title')


def test_without_a_gpu_the_gain_is_shown(found, capsys):
    from lmdeploy_kvq.evaluation import report
    report.print_rows(report.printer(), [{**row, 'tokens_that_fit': None} for row in found.rows], None, None, 0.01)
    text = capsys.readouterr().out
    for row in found.rows:
        line = next(line for line in text.splitlines() if line.startswith(f'{row["format"]} '))
        assert line.endswith(f' {row["gain"]:.2f}x')
    assert '--gpu-memory counts them' in text


def test_colours_only_on_terminals(found, monkeypatch):
    """rich writes colours to a terminal, unless NO_COLOR is set; and this console follows."""
    import io

    from lmdeploy_kvq.evaluation import report

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(stream):
        monkeypatch.setattr(sys, 'stdout', stream)
        report.print_rows(report.printer(), found.rows, found.needle_measure, found.rows[1], 0.01)
        return stream.getvalue()

    monkeypatch.setenv('TERM', 'xterm-256color')
    monkeypatch.delenv('NO_COLOR', raising=False)
    assert '\x1b[1;32m' in shown(Terminal()) and '\x1b' not in shown(io.StringIO())
    monkeypatch.setenv('NO_COLOR', '1')
    assert '32m' not in shown(Terminal())


def test_what_cannot_be_stored_is_a_row(folder, text, tmp_path, capsys):  # noqa: F811
    """Heads of 20: no format stores them; the table says so, nothing crashes, the exit code is 1."""
    llama(head_dim=20).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert cli.main(['eval', str(tmp_path), *QUICK, '--text', text]) == 1
    printed = ' '.join(capsys.readouterr().out.split())
    for fmt in FORMATS:
        assert f'{fmt.name}: not measured: {fmt.name}: head_dim 20 is not supported' in printed
    assert printed.endswith('No advice: no quantized cache was measured with its size.')


def test_scale_files_serve_static_formats(folder, text, tmp_path):  # noqa: F811
    from lmdeploy_kvq.scales import write_file
    path = tmp_path / 's.safetensors'
    scale = (torch.tensor(0.01), torch.tensor(0.01))
    write_file(path, {layer: scale for layer in range(LAYERS)}, {'format': STATIC[-1].name})
    small = {**SMALL, 'needles': (), 'new_tokens': 0, 'tokens': 100}
    names = tuple(fmt.name for fmt in (STATIC[0], STATIC[-1]))
    plain = evaluate(str(folder), Settings(formats=names, text=text, **small))
    scaled = evaluate(str(folder), Settings(formats=names, text=text, kv_scales=str(path), **small))
    assert scaled.rows[2]['mean_kl'] != plain.rows[2]['mean_kl'] and scaled.rows[2]['scales'] == str(path)
    if STATIC[-1].key.codec.qmax > STATIC[0].key.codec.qmax:
        assert f'is for {STATIC[-1].name}' in scaled.rows[1]['error'], 'as the engine refuses it'
    assert len(plain.notes) == 2 and not any('1.0' in note for note in scaled.notes)
    assert 'needles' not in plain.rows[1] and 'greedy_agreement' not in plain.rows[1]
