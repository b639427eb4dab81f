"""The checks of scripts/soak.py, without a server: what it asks, how it judges, its options."""
from __future__ import annotations

import itertools
import math
import subprocess

import numpy
import pytest
import torch

pytest.importorskip('transformers', minversion='5')
pytest.importorskip('aiohttp')
import gpu_memory
import soak
import soak_checks as checks
import soak_load as load
from rounding import COPIES, Rounding
from soak_load import Answer, Request
from test_calibrate import folder as small_model  # noqa: F401  a fixture: a small Llama with a tokenizer

# ---- prompts and requests


def test_prompts_follow_from_the_seed():
    """Log-uniform lengths up to the longest; a third shares a beginning with others."""
    first, again, other = (load.make_prompts(range(30_000), 600, 16384, 128, seed) for seed in (5, 5, 6))
    assert first == again and first != other
    lengths = numpy.array([len(p.ids) for p in first])
    assert lengths.min() == 1 and 8192 < lengths.max() <= 16384
    assert abs(numpy.log(lengths).mean() / math.log(16384) - 0.5) < 0.05  # every factor of two alike
    answers = [p.new_tokens for p in first]
    assert min(answers) == 1 and 64 < max(answers) <= 128
    begins = [p.ids[:32] for p in first if len(p.ids) > 32]
    shared = [b for b in begins if begins.count(b) > 2]  # two may begin at the same place by chance
    assert 1 <= len(set(shared)) <= load.PREFIXES and 0.2 < len(shared) / len(begins) < 0.45
    assert len({p.ids for p in first if len(p.ids) > 64}) > 0.95 * sum(len(p.ids) > 64 for p in first)


def test_requests_follow_from_the_seed():
    prompts = load.make_prompts(range(1000), 50, 100, 20, seed=0)
    first, again = (list(itertools.islice(load.make_requests(prompts, 3), 2000)) for _ in range(2))
    assert first == again and {r.prompt for r in first} == set(range(50))
    assert abs(sum(r.stream for r in first) / 2000 - 2 / 3) < 0.05
    aborted = [r for r in first if r.abort_tokens or r.abort_seconds]
    assert abs(len(aborted) / 2000 - 1 / 8) < 0.03
    assert all((r.abort_tokens is None) != r.stream for r in aborted)
    assert all(1 <= r.abort_tokens <= prompts[r.prompt].new_tokens for r in aborted if r.stream)


# ---- scores and verdicts


def answer(ids: list[int], logprobs: list[float], prompt: int = 0, **fields) -> Answer:
    return Answer(Request(prompt), ids=ids, logprobs=logprobs, finish='length', **fields)


REFERENCE = answer([7, 8, 9], [-0.1, -0.2, -0.3], top=[[(-0.1, 7), (-2.0, 1)], [(-0.2, 8), (-0.5, 5), (-3.0, 2)],
                                                      [(-0.3, 9), (-1.0, 4)]])


@pytest.mark.parametrize('ids, logprobs, expected', [
    ([7, 8, 9], [-0.1, -0.2, -0.3], checks.Score(3, 3, 0.0, 0.0)),
    ([7, 8, 9], [-0.2, -0.1, -0.3], checks.Score(3, 3, 0.2, 0.0)),
    ([7, 5, 9], [-0.1, -0.6, -0.3], checks.Score(3, 1, 0.0, 0.3)),  # the next likeliest token
    ([7, 99], [-0.1, -9.0], checks.Score(2, 1, 0.0, 2.8)),  # none of the likeliest: at least so far
    ([7], [-0.1], checks.Score(1, 1, 0.0, 0.0)),  # broken off
])
def test_scores(ids, logprobs, expected):
    found = checks.score(answer(ids, logprobs), REFERENCE)
    assert (found.tokens, found.same) == (expected.tokens, expected.same)
    assert found.change == pytest.approx(expected.change) and found.gap == pytest.approx(expected.gap)


def test_deviations_leave_out_errors():
    answers = [answer([7, 8, 9], [-0.1, -0.2, -0.3]), answer([7, 5, 1], [-0.3, -0.6, -2.0]),
               answer([1], [-5.0], error='HTTP 500'), answer([], [])]
    found = checks.deviation(answers, {0: REFERENCE})
    assert (found.answers, found.equal) == (2, 0.5) and found.prefix == pytest.approx((1 + 1 / 3) / 2)
    assert found.change == pytest.approx(0.2 / 4) and found.gaps == pytest.approx((0.3, ))
    assert checks.deviation([], {}).answers == 0


def test_what_is_said_of_the_farthest_answers():
    """One row per difference, the largest gap first; errors and equal answers have none."""
    answers = [answer([7, 8, 9], [-0.1, -0.2, -0.3]), answer([7, 5, 1], [-0.3, -0.6, -2.0], started=3.0),
               answer([7, 99], [-0.1, -9.0], aborted=True), answer([1], [-5.0], error='HTTP 500'), answer([], [])]
    found = checks.farthest(answers, {0: REFERENCE})
    assert [(row['at'], row['token'], row['kept'], row['logprob']) for row in found] == [
        (1, 99, False, -9.0), (1, 5, True, -0.6)]
    assert [row['gap'] for row in found] == pytest.approx([2.8, 0.3])
    assert [row['aborted'] for row in found] == [True, False] and found[1]['started'] == 3.0
    assert len(checks.farthest(answers, {0: REFERENCE}, count=1)) == 1


def test_percentiles_are_numpys():
    values = [i / 1000 for i in range(1, 101)]
    assert checks.percentiles(values, 'x') == pytest.approx({'x_p50': 50.5, 'x_p95': 95.05, 'x_p99': 99.01})
    assert checks.percentiles([], 'x') == {'x_p50': None, 'x_p95': None, 'x_p99': None}


def test_growth_is_between_the_halves():
    flat = [(float(i), 100.0 + (i % 3)) for i in range(20)]
    assert checks.growth(flat) == 0 and checks.growth([(t, mib + 2 * t) for t, mib in flat]) == pytest.approx(20, abs=2)
    assert checks.growth(flat[:3]) is None


ROW = {'format': 'x', 'errors': 0, 'blocks_in_use': 0, 'spare_blocks': 8, 'whole_cache_after': True,
       'memory_growth_mib': 0.0, 'unfinished': 0}
FLOOR, EFFECT = checks.Deviation(100, 0.8, 0.9, 0.01, (0.2, )), checks.Deviation(100, 0.3, 0.5, 0.05, (0.7, 0.1))


@pytest.mark.parametrize('own, row, words', [
    (checks.Deviation(100, 0.7, 0.8, 0.059, (1.3, 0.2)), {}, None),
    (checks.Deviation(100, 0.7, 0.8, 0.061, ()), {}, 'the limit is 0.0600'),
    (checks.Deviation(100, 0.7, 0.8, 0.01, (1.5, 1.45, 0.2)), {}, '2 answers no rounding explains'),
    (checks.Deviation(0, 0.0, 0.0, 0.0, ()), {}, 'no answer could be compared'),
    (FLOOR, {'errors': 2}, '2 errors'), (FLOOR, {'blocks_in_use': 3}, '3 blocks'),
    (FLOOR, {'blocks_in_use': None}, 'blocks are in use'), (FLOOR, {'whole_cache_after': False}, 'blocks leaked'),
    (FLOOR, {'spare_blocks': None}, 'even before the load'),
    (FLOOR, {'memory_growth_mib': 65.0}, 'grew by 65.0'), (FLOOR, {'memory_growth_mib': None}, 'grew by None'),
    (FLOOR, {'unfinished': 7}, '7 requests short'),
])
def test_verdicts(own, row, words):
    row = {**ROW, **row}
    failed = checks.judge(row, FLOOR, EFFECT, own)
    assert not failed if words is None else len(failed) == 1 and words in failed[0], failed
    assert row['limit'] == pytest.approx(0.06) and row['gap_limit'] == pytest.approx(1.4)


def test_rare_answers_are_wrong_unless_rounding_explains_them():
    own, row = checks.Deviation(100, 0.7, 0.8, 0.01, (1.5, 1.45, 1.45, 0.2)), dict(ROW)
    failed, = checks.judge(row, FLOOR, EFFECT, own, 2)
    assert '1 answers no rounding explains' in failed and (row['rare_answers'], row['wrong_answers']) == (3, 1)
    assert checks.judge(row, FLOOR, EFFECT, own, 3) == [] and (row['rare_answers'], row['wrong_answers']) == (3, 0)
    rows = [{'answers': 2, 'smallest_gap': checks.GAP_LIMIT}, {'answers': 3, 'smallest_gap': checks.GAP_LIMIT + 0.01},
            {'answers': 4, 'smallest_gap': None}]
    assert checks.explained(rows, 2) == checks.explained(rows, checks.MOST_RARE) == 2
    assert checks.explained(rows, checks.MOST_RARE + 1) == 0


def test_rare_answers_by_kind():
    answers = [answer([7, 8, 9], [-0.1, -0.2, -0.3]), answer([7, 5, 1], [-0.3, -0.6, -2.0]),
               answer([7, 99], [-0.1, -9.0]), answer([7, 99, 3], [-0.1, -9.0, -1.0]), answer([7, 2], [-0.1, -3.0]),
               answer([1], [-5.0], error='HTTP 500')]
    assert checks.rare(answers, {0: REFERENCE}, 1.0) == {(0, (7, ), 99): 2, (0, (7, ), 2): 1}
    assert checks.rare(answers, {0: REFERENCE}, 2.9) == {}
    assert [len(checks.came_by(answers, 0, text)) for text in ((), (7, ), (7, 99), (8, ))] == [5, 5, 1, 0]
    assert checks.came_by(answers, 1, (7, )) == []


def test_what_others_say_there():
    answers = [answer([7, 5, 9], [-0.1, -0.6, -0.3]), answer([7, 8, 9], [-0.1, -0.2, -0.3]),
               answer([7, 8], [-0.1, -0.25]), answer([1, 8], [-0.1, -9.0]), answer([7], [-0.1])]
    row = next(row for row in checks.farthest(answers, {0: REFERENCE}) if row['token'] == 5)
    assert row['company'] == [{'token': 8, 'answers': 2, 'least': -0.25, 'most': -0.2},
                              {'token': 5, 'answers': 1, 'least': -0.6, 'most': -0.6}]
    assert row['changes'] == [0.0] and row['top'] == REFERENCE.top[1]


def test_an_answer_that_nobody_would_give_is_not_explained(small_model, monkeypatch):  # noqa: F811
    """What the model itself says is explained, and what it finds least likely is not."""
    settings = soak.parse(['--model', str(small_model), '--prompts', '2', '--longest', '40', '--new-tokens', '6'])[2]
    prompts = load.make_prompts(range(3, 250), 2, 40, 6, seed=1)
    monkeypatch.setattr(soak, 'all_prompts', lambda settings: prompts)
    rounding = Rounding(str(small_model))
    logits = rounding.gaps('none', prompts[0].ids, [5], range(rounding.model.config.vocab_size), 1)[0]
    order = logits.argsort().tolist()
    reference = answer([5, order[0]], [-1.0, -1.0], top=[[(-1.0, 5)], [(-1.0, token) for token in order[:8]]])
    for token, good in ((order[1], True), (order[-1], False)):
        row, = soak.explain(settings, 'none', {(0, (5, ), token): 3}, [reference], [reference] * 7)
        assert (row['prompt'], row['at'], row['token'], row['own'], row['answers']) == (0, 1, token, order[0], 3)
        assert row['visits'] == 7 and row['text'] == (5, ) and row['reference_gap'] == 0
        assert (checks.explained([row], 1) == 3) == good == (row['copies'] < COPIES), row
    too_many = {(0, (5, ), token): 1 for token in range(checks.MOST_RARE + 1)}
    assert soak.explain(settings, 'none', too_many, [reference], []) == []
    assert soak.explain(settings, 'none', {}, [reference], []) == []

    def without_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('no memory')

    monkeypatch.setattr(Rounding, 'explain', without_memory)
    row, = soak.explain(settings, 'none', {(0, (5, ), order[1]): 3}, [reference], [])
    assert row['error'] == 'no memory' and checks.explained([row], 1) == 0


def test_the_floor_itself_is_bounded():
    row = dict(ROW)
    assert checks.judge(row, FLOOR, None, FLOOR) == [] and row['gap_limit'] == checks.GAP_LIMIT
    assert len(checks.judge(row, FLOOR, None, checks.Deviation(9, 0.1, 0.1, 0.2, (3.0, )))) == 2


def test_rare_answers_count_as_wrong_until_they_are_explained():
    """So they do in the file that is there while rounding.py is asked."""
    far = answer([5, 1], [-1.0, -9.0])
    first = answer([5, 2], [-1.0, -0.1], top=[[(-1.0, 5)], [(-0.1, 2), (-9.0, 1)]])
    asked = []

    def ask(policy, kinds, references, answers):
        asked.append((policy, kinds))
        return [{'answers': sum(kinds.values()), 'smallest_gap': 0.3}] if kinds else []

    row = {**ROW, **checks.speed([far], [3]), 'errors': 0}
    other = {**row, 'format': 'y'}
    results = [(row, [first], [first]), (other, [first], [far, far])]
    failed, = soak.verdict(results)
    assert '2 answers no rounding explains' in failed and other['wrong_answers'] == 2 and other['rare'] == []
    assert soak.verdict(results, ask) == [] and other['wrong_answers'] == 0 and other['rare_answers'] == 2
    assert asked == [('x', {}), ('y', {(0, (5, ), 1): 2})]


def test_a_server_that_fails_is_a_row():
    """The verdict says so, and judges the others only where bf16 is there to compare with."""
    row, other = dict(ROW), {**ROW, 'format': 'y'}
    for r in (row, other):
        r |= checks.speed([REFERENCE], [3]) | {'errors': 0}
    good = (row, [REFERENCE], [REFERENCE])
    failed = soak.verdict([good, ({'format': 'z', 'error': 'RuntimeError: it ended'}, [], []),
                           (other, [REFERENCE], [REFERENCE])])
    assert failed == ['z: RuntimeError: it ended'] and row['equal_answers'] == other['equal_answers'] == 1
    assert soak.verdict([({'format': 'none', 'error': 'no'}, [], []), good]) == ['none: no']


def test_options():
    _, formats, settings = soak.parse(['--requests', '10000', '--parallel', '--formats', 'none,116'])
    assert formats == ['none', 'fp8_per_token_head'] and settings.longest == 64 and settings.requests == 10000
    _, formats, settings = soak.parse(['--minutes', '0.5', '--prompts', '9'])
    assert settings.load_seconds == 30 and settings.longest == 16384
    assert (settings.prompts, settings.pool_tokens) == (9, 131072)
    options = soak.server_arguments('int4_per_token_head', settings)
    assert options[options.index('--num-gpu-blocks') + 1] == '2048' and '--enable-prefix-caching' in options
    for wrong in (['--formats', 'fp8'], ['--formats', 'none,none'], ['--longest', '131072']):
        with pytest.raises(SystemExit):
            soak.parse(wrong)


def test_server_options_are_lmdeploys():
    """Its own parser takes them."""
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe
    CLI.add_parsers()
    SubCliServe.add_parsers()
    _, formats, settings = soak.parse([])
    for name in formats:
        args = CLI.parser.parse_args(['serve', 'api_server', 'M', *soak.server_arguments(name, settings)])
        assert (args.num_gpu_blocks, args.session_len, args.logprobs_mode) == (2048, 131136, 'raw_logprobs')
        assert args.enable_prefix_caching and args.max_batch_size == 48


def test_memory_of_a_process_includes_its_children():
    child = subprocess.Popen(['sleep', '30'])
    try:
        assert child.pid in gpu_memory.descendants(1) | gpu_memory.descendants(subprocess.os.getpid())
        assert gpu_memory.descendants(child.pid) == {child.pid}
    finally:
        child.kill()
        child.wait()
