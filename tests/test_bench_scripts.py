"""What of the benchmark scripts needs no GPU: batches, presets and verdicts, step times, the random model, figures."""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bench_decode
import bench_prefill
import benchlib
import decode_clocks
import pytest
import targets
import timed_engine
import torch
from helpers import python

ROOT = Path(__file__).resolve().parent.parent
SHAPE = '32x8x128'


def rows_of(presets: dict, factor: float = 0.55, read_fraction: float = 0.95) -> list[dict]:
    """Rows in which a token costs the same everywhere; in our formats ``factor`` of that, or less if less is asked."""
    rows = []
    for (shape, page), contenders in bench_decode.combos(presets).items():
        for name, launches in contenders.items():
            kind, policy = timed_engine.parse_policy(name.removeprefix('kvq:'))
            for (load, query_len), preset in launches.items():
                ours = min(factor, 0.9 * targets.FORMAT_LIMITS.get(name.removeprefix('kvq:'), 1.0))
                us = float(bench_decode.Load.lengths(load).sum()) * (ours if kind == 'kvq' else 1) / 1e3
                rows.append({'contender': kind, 'policy': policy, 'shape': shape, 'load': load, 'page': page,
                             'query_len': query_len, 'preset': preset, 'us': us, 'payload_bytes': int(us * 4e6),
                             'read_us': us * read_fraction, 'read_fraction': read_fraction, 'relative_error': None})
    benchlib.add_vs_bf16(rows, 'us', ('shape', 'load', 'page', 'query_len'))
    return rows


def verdicts(rows: list[dict]) -> dict[str, dict]:
    """By name of the target."""
    return {line['target']: line for line in targets.verdicts('decode', rows)}


@pytest.mark.parametrize('page', [64, 128])
def test_loads_share_a_pool_and_use_pages_once(page):
    """No page serves two sequences of one walk, page 0 none but padding, and entries beyond a length are 0."""
    loads = bench_decode.Load.build_all(['64x512', '1x4096', '5x100+3', 'ragged:16'], page, 64, 'cpu')
    assert len({load.pool_blocks for load in loads.values()}) == 1
    assert loads['5x100+3'].lens.tolist() == [100] * 5 + [1] * 3
    for name, load in loads.items():
        blocks = (load.lens + page - 1) // page
        if '+' in name:
            blocks[-3:] = 0
        used = [row[:count] for table in load.tables for row, count in zip(table, blocks)]
        assert all((row[count:] == 0).all() for table in load.tables for row, count in zip(table, blocks))
        pages = torch.cat(used)
        assert pages.min() >= 1 and pages.max() < load.pool_blocks and len(pages.unique()) == len(pages)


def test_small_loads_leave_the_cache():
    """Where pages are few, a timed loop walks through at least 128 MB or 256 batches of them."""
    tables = bench_decode.Load.build('1x128', 64, 4096, device='cpu').tables
    assert len(tables) == 256 and benchlib.rotations(1 << 30) == 1 and benchlib.rotations(1 << 28) == 2


def test_presets_measure_each_combination_once():
    """A load that two presets want appears once; ``all`` holds what each of them holds."""
    every = bench_decode.combos(targets.PRESETS)
    for name, preset in targets.PRESETS.items():
        for place, contenders in bench_decode.combos({name: preset}).items():
            for contender, launches in contenders.items():
                assert set(launches) <= set(every[place][contender])
    keys = [tuple(row[k] for k in bench_decode.KEY) for row in rows_of(targets.PRESETS)]
    assert len(keys) == len(set(keys))


def test_verdicts():
    """Met where every row meets its bound, else the row that is furthest off is named; gaps are no success."""
    found = verdicts(rows_of(targets.PRESETS))
    assert {line['met'] for line in found.values()} == {'yes'}
    rows = rows_of(targets.PRESETS)
    bad = next(row for row in rows if row['contender'] == 'kvq' and row['load'] == '8x512')
    bad['vs_bf16'] = 1.2
    low = [row for row in rows if row['shape'] == '16x2x128' and row['load'] == '64x4096']
    for row in low:
        row['read_fraction'] = 0.86  # 85 % are asked for there
    line = verdicts(rows)['no load slower than bf16']
    assert (line['met'], line['missed'], line['worst']) == ('no', 1, 1.2) and '8x512' in line['worst_row']
    assert verdicts(rows)['share of read']['met'] == 'yes'
    low[-1]['shape'] = SHAPE  # 90 % are asked for here
    assert verdicts(rows)['share of read']['missed'] == 1
    assert {line['met'] for line in verdicts([]).values()} == {'not measured'}
    missed = targets.misses('decode', rows)
    assert sum(line.get('missed', 0) for line in verdicts(rows).values()) == len(missed) == 2
    assert [line['value'] for line in missed if line['target'] == 'no load slower than bf16'] == [1.2]
    assert targets.misses('decode', rows_of(targets.PRESETS)) == []


def test_other_benchmarks_have_verdicts():
    """The committed fill rows are judged; a row with an error is none."""
    rows = json.loads((ROOT / 'benchmarks' / 'results' / 'fill.json').read_text())['rows']
    assert {line['met'] for line in targets.verdicts('fill', rows)} <= {'yes', 'no'}
    row = {'contender': 'kvq', 'policy': 116, 'load': '64x8192', 'tp': 1}
    step, tokens = targets.verdicts('engine', [{**row, 'vs_bf16': 0.69}, {**row, 'vs_bf16': None, 'error': 'x'}])
    assert (step['met'], step['rows'], tokens['met']) == ('yes', 1, 'not measured')


def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    """The first file that a run writes leaves the second one's commit as it is; any other change does not."""
    monkeypatch.setattr(benchlib, 'ROOT', tmp_path)
    monkeypatch.delenv('KVQ_COMMIT', raising=False)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert benchlib.environment()['commit'] == 'unknown'
    results, code = tmp_path / 'benchmarks' / 'results' / 'fill.json', tmp_path / 'code.py'
    results.parent.mkdir(parents=True)
    for path in (results, code):
        path.write_text('1')
    for args in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a']):
        subprocess.run(['git', *args], cwd=tmp_path, check=True)
    clean = benchlib.environment()['commit']
    results.write_text('2')
    (tmp_path / 'untracked').touch()
    assert benchlib.environment()['commit'] == clean and 'dirty' not in clean
    code.write_text('2')
    assert benchlib.environment()['commit'] == f'{clean}-dirty'
    monkeypatch.setenv('KVQ_COMMIT', 'abc')
    assert benchlib.environment()['commit'] == 'abc'


def test_rows_of_another_build_are_not_kept(tmp_path):
    """--append joins only what one build measured on one GPU."""
    rows = rows_of({'query-len': targets.PRESETS['query-len']})
    path = benchlib.write_results('decode', rows, tmp_path)
    assert bench_decode.earlier_rows(path, rows) == []
    assert bench_decode.earlier_rows(path, rows[2:]) == rows[:2]
    data = json.loads(path.read_text())
    data['environment']['commit'] = 'another'
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match='commit'):
        bench_decode.earlier_rows(path, rows)


def test_step_time_of_the_phase_in_which_all_decode():
    """Prefills, steps of a part of the requests, and one slow step do not count."""
    generator = random.Random(0)
    prefill = [(0.2 * i, 1) for i in range(8)]
    full = [(2 + 0.012 * i + 1e-3 * generator.random() + (0.5 if i > 100 else 0), 8) for i in range(127)]
    tail = [(full[-1][0] + 0.001 * i, 3) for i in range(1, 9)]
    phase = timed_engine.decode_phase(prefill + full + tail, 8, 128)
    assert phase['step_ms'] == pytest.approx(12, rel=0.005) and phase['steps'] == 126
    with pytest.raises(ValueError, match='does the cache hold them'):
        timed_engine.decode_phase(prefill, 8, 128)


def test_prompts_share_the_prefix_only():
    a, b = timed_engine.make_prompts(2, 100, 1, 60, 128256)
    c, = timed_engine.make_prompts(1, 100, 2, 60, 128256)
    assert a[:60] == b[:60] == c[:60] and len({tuple(x[60:]) for x in (a, b, c)}) == 3


def test_policies_are_named_as_users_name_them():
    assert timed_engine.parse_policy('none') == ('lmdeploy', 0)
    assert timed_engine.parse_policy('lmdeploy:16') == ('lmdeploy', 16)
    assert timed_engine.parse_policy('fp8') == ('kvq', 16)
    with pytest.raises(ValueError, match='int8_per_token_head'):
        timed_engine.parse_policy('fp9')


def test_ratios_are_taken_round_by_round():
    found = bench_prefill.summary([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found['vs_bf16'] == pytest.approx(1.1) and found['ttft_min_s'] == 1.1
    assert found['spread'] == pytest.approx(1.0)


def test_random_llama_is_read_by_lmdeploys_loader(tmp_path):
    """The weights that LMDeploy's loader yields are a Llama's, and layers share their place in the file."""
    from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader
    from random_llama import LLAMA_8B, weights
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = {**LLAMA_8B, 'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 96, 'num_attention_heads': 4,
             'num_key_value_heads': 2, 'head_dim': 16}
    config = LlamaConfig(**shape, num_hidden_layers=8, tie_word_embeddings=False)
    torch.save(weights(config, 8, 0), tmp_path / 'pytorch_model.bin')
    loader = ModelWeightLoader(str(tmp_path))
    found = dict(loader._get_weights_iterator(loader._shard_paths[0]))
    want = LlamaForCausalLM(config).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in want.items()}
    assert sum(v.numel() for v in found.values()) * 2 > 2 * (tmp_path / 'pytorch_model.bin').stat().st_size
    assert found['lm_head.weight'].float().std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason='here the engine would start')
def test_an_engine_that_cannot_start_says_why(tmp_path):
    """The real LMDeploy, in its process, on a machine without a GPU: an error with the reason, and no process left."""
    with timed_engine.TimedEngine('none', limit=120) as engine:
        with pytest.raises(timed_engine.EngineError, match='none: '):
            engine.open(tmp_path / 'no-model')
        with pytest.raises(timed_engine.EngineError, match='not done after 0 s'):
            engine.limit = 0
            engine.open(tmp_path / 'no-model')
    assert engine._process.poll() is not None


@pytest.mark.skipif(find_spec('matplotlib') is None, reason='matplotlib is not installed (extra dev)')
def test_figures_depend_on_the_results_alone(tmp_path, monkeypatch, capsys):
    """Twice the same files, without a date; what has no rows is named and left out."""
    import plots
    benchlib.write_results('decode', rows_of(targets.PRESETS), tmp_path)
    monkeypatch.setattr(sys, 'argv', ['plots.py', '--results', str(tmp_path), '--out', str(tmp_path / 'a')])
    plots.main()
    assert 'engine: not drawn: engine.json is not there' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', [*sys.argv[:-1], str(tmp_path / 'b')])
    plots.main()
    drawn = sorted(path.name for path in (tmp_path / 'a').iterdir())
    assert drawn == ['decode_bandwidth.svg', 'decode_batch.svg', 'decode_context.svg']
    for name in drawn:
        text = (tmp_path / 'a' / name).read_text()
        assert text == (tmp_path / 'b' / name).read_text() and '<dc:date>' not in text


def test_counters_of_both_kernels():
    """A row of the fill has no query heads in its shape."""
    import profile_kernels
    found = [row for row in profile_kernels.ROWS if profile_kernels.is_fill(row)]
    assert 0 < len(found) < len(profile_kernels.ROWS)
    assert all(row.split(':')[2] in ('decode', 'prefill') for row in found)


def test_counters_are_read_in_their_units():
    """What ncu prints: notes, then names, units and values; figures come in microseconds and bytes."""
    import profile_kernels
    metrics = profile_kernels.METRICS
    text = '\n'.join(['==PROF== Connected to process 1', 'a line of the program',
                      f'"ID","Kernel Name","{metrics["us"]}","{metrics["bytes_read"]}","{metrics["registers"]}",'
                      f'"{metrics["stall_wait"]}"', '"","","ns","Mbyte","register/thread","inst"',
                      '"0","_decode_kernel","139,808","541.50","168","n/a"', '==PROF== Disconnected'])
    assert profile_kernels.parse(text) == pytest.approx({'us': 139.808, 'bytes_read': 541.5e6, 'registers': 168})
    with pytest.raises(ValueError, match='no table'):
        profile_kernels.parse('==ERROR== The user does not have permission')


@pytest.mark.parametrize('name', ['fp8_per_token_head', 'k8v4_per_token_head'])
def test_fill_tiles_are_swept_on_the_same_pages(name):
    """A sweep launches the tile it was given, which writes what the rule's tile writes; a wrong page is seen."""
    import bench_fill
    import tune_fill
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    ours = bench_fill.Ours(name, 'decode:3', 16, 2, 64, device=device)
    with tune_fill.launched_with(None) as used:
        ours(0)
    rule = used[0]
    with tune_fill.launched_with((8, 2)) as used:
        ours(1)
    assert used == [(8, 2)] != [rule]
    assert ours.caches[0].k_codes.any() and tune_fill.same_pages(ours, (8, 2))
    with tune_fill.launched_with(None) as used:
        ours(0)
    assert used == [rule]  # as it was
    kernel, shift = tune_fill.KERNEL.fill, iter((0, 1))
    with pytest.MonkeyPatch.context() as patch:  # another V for the tile than for the rule
        patch.setattr(tune_fill.KERNEL, 'fill', lambda k, v, *rest: kernel(k, v + next(shift), *rest))
        assert not tune_fill.same_pages(ours, (8, 2))


@pytest.mark.parametrize('name', ['fp8_per_token_head', 'int4_per_token_head'])
def test_a_layer_writes_its_tokens_and_attends_to_them(name, monkeypatch):
    import bench_layer
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    lens, table = torch.tensor([20, 1], dtype=torch.int32), torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    monkeypatch.setattr(bench_decode, 'fill_random', lambda *args: None)
    load = bench_decode.Load(lens.to(device), [table.to(device)], 4)
    layer = bench_layer.OurLayer(name, load, 16, 2, 64, {})
    for tensor in layer.cache.tensors()[:4]:
        tensor.view(torch.uint8).zero_()
    query = torch.randn((2, 4, 64), dtype=torch.bfloat16, device=device)
    assert layer.error(query, load.tables[0], load.lens, 1) < 5e-3
    written = layer.cache.k_codes.view(torch.uint8).ne(0).any(-1).any(1).nonzero().tolist()
    assert written == [[2, 3], [3, 0]]  # page and slot of each sequence's last token


def test_a_sweep_takes_the_configurations_it_is_given():
    """Those of ``--configs``; zeros are for others to choose, and nothing is what serving takes."""
    import tune_decode

    from lmdeploy_kvq.kernels.workspace import DecodeConfig

    def config(text: str) -> DecodeConfig:
        return DecodeConfig(**tune_decode.options(tune_decode.parse(text)))

    assert tune_decode.parse('default') == {}
    assert config('64:3:4:3:168') == DecodeConfig(64, 3, 4, 3, 168)
    assert config('128:2:8:2:0:33') == DecodeConfig(128, 2, 8, 2, None, 33)
    assert config('64:1:4:4') == DecodeConfig(64, 1, 4, 4)


def test_the_kernel_with_clocks_compiles(tmp_path):
    """Every stage's clock is in the compiled code; the script does not take another kernel for the one it knows."""
    source = (decode_clocks.PACKAGE / 'kernels' / 'decode.py').read_text()
    with pytest.raises(ValueError, match='is 0 times in the kernel'):
        decode_clocks.with_clocks(source.replace('total_l = tl.sum(l, 0)', 'total_l = tl.sum(l, axis=0)'))
    decode_clocks.copy_package(tmp_path)
    program = """
import sys
import torch
from aot import compile_launch, recorded
from aot_compile import plain
import lmdeploy_kvq as kvq
sys.modules['lmdeploy_kvq.kernels.decode'].CLOCKS[0] = torch.zeros(16, dtype=torch.int64)
with recorded(90) as launches:
    plain(kvq.PagedCache.allocate('int8_per_token_head', 4, 64, 8, 128, 128, device='cpu'))
launch, = (launch for launch in launches if launch[0].__name__ == '_decode_kernel')
print(kvq.__file__, compile_launch(*launch, 90).asm['ptx'].count('%clock64'))
"""
    done = python(program, cwd=str(tmp_path), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT / 'tests'))))
    assert done.stdout.split() == [str(tmp_path / 'lmdeploy_kvq' / '__init__.py'), str(len(decode_clocks.STAGES) + 1)]
