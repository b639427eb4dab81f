"""``lmdeploy-kvq eval`` through LMDeploy's engine: what of it needs no GPU. The rest is in test_engine_gpu.py."""
from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time

import pytest
import torch

from lmdeploy_kvq import FORMATS, accuracy
from lmdeploy_kvq.backends import probe as engine_probe
from lmdeploy_kvq.backends.policies import lmdeploy_policies
from lmdeploy_kvq.calibrate import STATIC
from lmdeploy_kvq.evaluation import through_engine
from lmdeploy_kvq.evaluation.contenders import find_contenders, layer_contender
from lmdeploy_kvq.evaluation.material import Contender, Material, Needle, Passage, Run
from lmdeploy_kvq.evaluation.rows import Sizes, make_rows
from lmdeploy_kvq.scales import write_file

CONFIG = {'architectures': ['LlamaForCausalLM'], 'hidden_size': 64, 'num_hidden_layers': 2, 'vocab_size': 256,
          'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 64, 'intermediate_size': 96}


def test_names_become_contenders(tmp_path):
    """The unquantized cache first and, on a GPU, once more; LMDeploy's own policies beside ours, each by its number."""
    found = find_contenders(('all', 'int4', 'lmdeploy:fp8', 'none', str(FORMATS[0].policy)), None, str(tmp_path),
                            'lmdeploy')
    assert [c.name for c in found] == ['none', 'none again', *(fmt.name for fmt in FORMATS), 'int4', 'lmdeploy:fp8']
    assert found[1].floor and not found[0].floor and [c.policy for c in found[:2]] == [0, 0]
    assert [(c.policy, c.stock, c.format) for c in found[-2:]] == [(4, True, None), (16, True, None)]
    assert all(c.format is get and not c.stock for c, get in zip(found[2:], FORMATS))
    assert layer_contender('', found, None, str(tmp_path)).format.bits_per_element(128) == min(
        fmt.bits_per_element(128) for fmt in FORMATS)
    (tmp_path / 'kv_scales.safetensors').touch()
    for c in find_contenders(('all', ), None, str(tmp_path), 'lmdeploy'):
        assert (c.scales is not None) == (c.format in STATIC)
    for transforms in (True, False):  # formats get the file if it has what they take
        scale, matrix = torch.tensor(0.1), torch.eye(64).expand(2, 64, 64)
        write_file(tmp_path / 'kv_scales.safetensors', {} if transforms else {0: (scale, scale)}, {},
                   {0: {'k_transform': matrix}} if transforms else {})
        for c in find_contenders(('all', ), None, str(tmp_path), 'lmdeploy'):
            takes = c.format is not None and (c.format.takes_transform if transforms else c.format.needs_scales)
            assert (c.scales is not None) == takes


def test_lmdeploys_own_policies():
    policies = lmdeploy_policies()
    assert policies['int4'] == 4 and policies['fp8'] == 16 and 0 not in policies.values()
    assert not {fmt.policy for fmt in FORMATS if not fmt.upstream} & set(policies.values())


def test_the_environment_of_an_engine(tmp_path):
    """Every query reads the cache; LMDeploy's own policies run without this package; a file reaches the workers."""
    env = through_engine.environment(Contender('x', 16, STATIC[0], scales='a.safetensors'))
    assert env['LMDEPLOY_KVQ_PREFILL'] == 'cache' and env['LMDEPLOY_KVQ'] == '1'
    assert env['LMDEPLOY_KVQ_SCALES'].startswith('/') and env['LMDEPLOY_KVQ_SCALES'].endswith('/a.safetensors')
    env = through_engine.environment(Contender('int4', 4, stock=True))
    assert env['LMDEPLOY_KVQ'] == '0' and 'LMDEPLOY_KVQ_SCALES' not in env


@pytest.mark.skipif(torch.cuda.is_available(), reason='here the engine would start')
def test_an_engine_that_cannot_start_says_why(tmp_path):
    """The real LMDeploy in its process: one line for the user, the log beside it; too slow a one is stopped."""
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    with pytest.raises(through_engine.EngineError) as failed:
        through_engine.probe({'model': str(tmp_path), 'quant_policy': FORMATS[0].policy}, limit=200)
    assert '\n' not in str(failed.value) and str(failed.value) and 'Traceback' in failed.value.log
    start = time.monotonic()
    with pytest.raises(through_engine.EngineError, match='not done after 0 s'):
        through_engine.probe({'model': str(tmp_path)}, limit=0.3)
    assert time.monotonic() - start < 5
    running = subprocess.run(['ps', '-ewwo', 'args'], text=True, capture_output=True).stdout
    assert 'lmdeploy_kvq.backends.probe' not in running or str(tmp_path) not in running


def test_an_engine_ends_with_the_process_that_asked_for_it(tmp_path):
    """Also where that is killed, and can do nothing about it; so does what the engine has started."""
    program, asking, mark = tmp_path / 'program.py', tmp_path / 'asking.py', tmp_path / 'started'
    program.write_text(f"""
import pathlib, subprocess, time
from lmdeploy_kvq.backends.probe import as_program
def main(spec):
    worker = subprocess.Popen(['sleep', '612'])
    pathlib.Path({str(mark)!r}).write_text(str(worker.pid))
    time.sleep(612)
as_program(main)
""")
    asking.write_text(f"""
from lmdeploy_kvq.evaluation.through_engine import probe
probe({{}}, program=({str(program)!r}, ))
""")

    def running() -> list[str]:
        lines = subprocess.run(['ps', '-ewwo', 'pid,stat,args'], text=True, capture_output=True).stdout.splitlines()
        found = [line.split(maxsplit=2) for line in lines[1:]]
        return [pid for pid, state, args in found if state[0] != 'Z'
                and (str(program) in args or mark.exists() and pid == mark.read_text())]

    process = subprocess.Popen([sys.executable, str(asking)])
    try:
        deadline = time.monotonic() + 120
        while len(running()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(running()) == 2
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running()


@pytest.mark.skipif(torch.cuda.is_available(), reason='here the engine would start')
def test_a_model_that_lmdeploy_cannot_run_is_a_sentence(tmp_path):
    from lmdeploy_kvq.console import UserError
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    material = Material([Passage('x', [1, 2])], [], 0, [])
    with pytest.raises(UserError, match='LMDeploy cannot run'):
        through_engine.run(str(tmp_path), material, [Contender('none', 0)], lambda done: None)


def test_passages_are_compared_in_the_engines_process(tmp_path, monkeypatch):
    """Files of one run are the reference of the next; what is written is read back as it was."""
    torch.manual_seed(0)
    passages = [torch.randint(0, 40, (n, )).tolist() for n in (30, 20)]
    first, second = ([torch.randn(len(ids), 40) for ids in passages] for _ in range(2))

    def run(logits, **files):
        given = iter(logits)
        monkeypatch.setattr(engine_probe, '_logits', lambda pipe, ids: next(given))
        return engine_probe._score(None, {'passages': passages, **{k: str(v) for k, v in files.items()}})

    own = run(first, out=tmp_path / 'base.pt', scores=tmp_path / 'base-scores.pt')
    assert all(not scores.kl.any() for scores in own)
    found = run(second, reference=tmp_path / 'base.pt', scores=tmp_path / 'scores.pt')
    material = Material([Passage(d, ids) for d, ids in zip('ab', passages)], ['x'], 3,
                        [Needle(9, 0.0, 'p', '123', [1, 2, 3], [2, 3]), Needle(9, 1.0, 'p', '123', [1, 2, 3], [3])])
    answer = {'rounds': [{'tokens': [[1, 2, 3]]}], 'answers': [' 123.', ' 12'], 'ranks': [[1, 1], [1, 4]],
              'block_bytes': 640, 'block_size': 64}
    read = through_engine.read(answer, material, tmp_path / 'scores.pt')
    for a, b, p, q, ids in zip(read.scores, found, first, second, passages):
        assert torch.equal(a.kl, b.kl)
        torch.testing.assert_close(a.kl, accuracy.score(ids, q, p).kl, rtol=1e-2, atol=1e-2)
    assert [f.exact for f in read.found] == [True, False] and read.found[1].reciprocal_rank == 0.625
    base = through_engine.read({**answer, 'rounds': [{'tokens': [[1, 5, 3]]}], 'block_bytes': 1280}, material,
                               tmp_path / 'base-scores.pt')
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    table = make_rows([Contender('none', 0), Contender('int4', 4, stock=True), Contender('bad', 8, stock=True)],
                      [base, read, Run(error='no')], material, Sizes(str(tmp_path), 10**12, 1))
    assert table[1]['greedy_agreement'] == 1 and table[1]['needle_exact'] == 0.5
    assert table[1]['bytes_per_token'] == 10 and table[1]['domains'].keys() == {'a', 'b'}
    assert table[1]['tokens_that_fit'] == pytest.approx(table[0]['tokens_that_fit'] * table[1]['gain'],
                                                        rel=1e-3)
    assert table[2]['error'] == 'no' and table[2]['tokens_that_fit'] is None and 'mean_kl' not in table[2]


def test_lmdeploy_has_what_the_probe_asks_for():
    """Names and signatures of LMDeploy 0.18."""
    from lmdeploy.pytorch.engine.cache_engine.plan import BlockCachePlan
    from lmdeploy.pytorch.engine.executor import uni_executor
    from lmdeploy.pytorch.engine.model_agent import agent
    from lmdeploy.serve.core.async_engine import AsyncEngine
    assert 'input_ids' in inspect.signature(AsyncEngine.async_get_logits).parameters
    assert isinstance(BlockCachePlan.logical_block_nbytes, property)
    assert 'self.block_cache_plan = build_block_cache_plan' in inspect.getsource(agent)
    assert 'self.model_agent = ' in inspect.getsource(uni_executor)
