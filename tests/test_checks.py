"""The programs that check features on a GPU: what of them runs without one. Configurations, models, limits."""
from __future__ import annotations

import sys

import dp_check
import engine_process
import features_check as features
import growth_check
import long_check
import memory_check
import parallel_check as parallel
import pytest
import smollm2
import torch

HERE = pytest.mark.skipif(not (smollm2.HOME / 'config.json').exists(), reason='needs SmolLM2: make demo')


@pytest.mark.parametrize('name', features.CASES)
def test_lmdeploy_takes_the_engine_arguments_of_every_case(name):
    """PytorchEngineConfig's checks, and its way into the cache's and the backend's configurations."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.engine.config_builder import ConfigBuilder
    case = features.CASES[name]
    config = ConfigBuilder.update_engine_config(PytorchEngineConfig(**{**features.PLAIN, **case.engine}))
    cache, backend = ConfigBuilder.build_cache_config(config), ConfigBuilder.build_backend_config(config)
    assert cache.enable_prefix_caching == (case.engine.get('enable_prefix_caching') is True)
    assert backend.piecewise_cudagraph_max_tokens == (1024 if 'graphs' in name else None)
    longest = 700 + features.NEW_TOKENS
    assert (cache.num_gpu_blocks - 2) * cache.block_size > longest, 'the longest request fits'


@HERE
def test_prompts_share_beginnings_and_overflow_the_small_pool():
    from transformers import AutoTokenizer
    rounds = features.make_rounds(AutoTokenizer.from_pretrained(smollm2.HOME))
    prompts = rounds[0]
    assert len(rounds) == 4 and all(sorted(other) == sorted(prompts) for other in rounds)
    assert len({tuple(ids[:448]) for ids in prompts}) == 6 and len({tuple(ids) for ids in prompts}) == 24
    assert all(490 <= len(ids) <= 700 for ids in prompts)
    left = {tuple(ids[:64 * n]) for ids in prompts for n in range(1, len(ids) // 64 + 1)}  # full blocks, by their path
    assert len(left) > 1.5 * features.SMALL
    assert 64 * features.SMALL < 8 * (490 + 400), 'long requests push each other out'


def test_the_control_is_an_answer_to_another_prompt():
    pairs = [[[family] * 64 + [n], [family, n]] for n in range(4) for family in range(3)] * 2
    for ids, _ in pairs:
        assert engine_process.stranger(ids, pairs)[0] != ids[0]


def rows_of_features(**changes) -> list[dict]:
    """A run of everything, in which nothing is wrong but the changes to one case."""
    rows = []
    for name, case in features.CASES.items():
        for policy in ([] if not case.bf16 else ['none']) + ['fp8_per_token_head']:
            row = {'case': name, 'format': policy, 'worst_gap': 0.2, 'control': 9.0, 'cached_tokens': 99, 'replays': 3}
            if case.scenario == 'pressure':
                row |= {'free': [40] * 4, 'evicted': 60, 'ended': 24, 'asked': 24}
            rows.append(row | (changes if name == changes.get('case') and policy != 'none' else {}))
    return rows


@pytest.mark.parametrize('change, said', [
    ({}, None), ({'worst_gap': 0.6}, None), ({'worst_gap': 0.7}, 'from likely'), ({'control': 2.0}, 'control'),
    ({'cached_tokens': 0}, 'prefix cache'), ({'evicted': 0}, 'evicted'), ({'free': [40, 40, 39, 39]}, 'free blocks'),
    ({'ended': 23}, '23 of 24'),
])
def test_verdicts_of_features(change, said):
    failed = features.verdicts(rows_of_features(case='small pool', **change))
    assert not failed if said is None else len(failed) == 1 and said in failed[0]
    assert all(line.startswith('small pool, fp8_per_token_head: ') for line in failed)


def test_prefill_graphs_that_are_not_replayed_are_seen():
    failed = features.verdicts(rows_of_features(case='qwen3, prefill graphs', replays=0))
    assert len(failed) == 1 and 'no prefill graph' in failed[0]


@HERE
def test_the_model_of_prefill_graphs_is_one_that_lmdeploy_captures(tmp_path):
    from lmdeploy.pytorch.models.utils.cudagraph import PiecewiseCudaGraphMixin

    from lmdeploy_kvq.backends.audit import build_empty
    for kind in ('llama', 'qwen3'):
        features.write_sharp(tmp_path / kind, smollm2.HOME, kind)
        model, config = build_empty(str(tmp_path / kind))
        assert isinstance(model, PiecewiseCudaGraphMixin) == (kind == 'qwen3')
        assert (config.num_key_value_heads, config.k_head_dim) == (2, 64)


def test_prompts_of_128k_tokens(tmp_path):
    long_check.write_prompts(tmp_path / 'prompts.pt', 131_072)
    whole, other, short = torch.load(tmp_path / 'prompts.pt')
    assert len(whole) == len(other) == 131_072 and len(short) == long_check.SHORT
    assert torch.equal(whole[65_536:], other[65_536:]) and (whole != other)[:65_536].float().mean() > 0.99


@pytest.mark.parametrize('change, said', [
    ({}, None), ({'mean_kl': 0.03}, 'mean KL'), ({'decode_gap': 1.5}, 'decoded token'),
])
def test_verdicts_of_long_prompts(change, said):
    rows = [{'format': 'none, another first half', 'mean_kl': 2.0},
            {'format': 'none again', 'mean_kl': 1e-4, 'short_kl': 1e-4, 'decode_gap': 0.1,
             'short_gap': 0.1},
            {'format': 'int8_per_token_head', 'mean_kl': 0.005, 'short_kl': 0.01, 'decode_gap': 0.3,
             'short_gap': 0.2, **change}]
    failed = long_check.verdicts(rows)
    assert not failed if said is None else len(failed) == 1 and said in failed[0]
    rows[0]['mean_kl'] = 0.01
    assert 'control' in long_check.verdicts(rows)[-1]


@pytest.mark.parametrize('change, said', [
    ({}, None), ({'num_gpu_blocks': 980}, 'of the bytes'), ({'pool_bytes': 5}, 'allocated'),
    ({'against_bf16': 1.9}, 'x the tokens'), ({'graphs': 0}, 'no graphs'), ({'table_bytes': 1 << 30}, 'block tables'),
])
def test_verdicts_of_memory(change, said):
    from lmdeploy_kvq.capacity import CacheShape, block_bytes
    size = block_bytes('int8_per_token_head', CacheShape(memory_check.LAYERS, memory_check.KV_HEADS, memory_check.DIM))
    row = {'format': 'int8_per_token_head', 'num_gpu_blocks': 995, 'block_bytes': size, 'budget': 1000 * size,
           'pool_bytes': 995 * size, 'against_bf16': 1.94, 'graphs': 1, 'table_bytes': 1000, **change}
    if 'num_gpu_blocks' in change:
        row['pool_bytes'] = change['num_gpu_blocks'] * size
    failed = memory_check.verdicts([row])
    assert not failed if said is None else len(failed) == 1 and said in failed[0]


@pytest.mark.parametrize('change, said', [
    ({}, None), ({'allocated': [100, 9_000_000]}, 'allocated'), ({'reserved': [0, 1 << 30]}, 'reserved'),
    ({'free': [900, 899]}, 'lost_blocks'),
])
def test_verdicts_of_growth(change, said):
    steady = {'allocated': [100, 5000, 100], 'reserved': [1 << 30] * 3, 'free': [900, 900], 'seconds': 1.0}
    rows = [growth_check.row('none', steady), growth_check.row('fp8', {**steady, **change})]
    failed = growth_check.verdicts(rows)
    assert not failed if said is None else len(failed) == 1 and said in failed[0]


def rows_of_parallel(**changes) -> list[dict]:
    """Two GPUs, in which nothing is wrong but the changes to one row."""
    kl = {'tp=1': 0.0, 'mp': 2e-4, 'control': 0.3}
    return [{'kv_heads': 8, 'check': check, 'way': way, 'mean_kl': kl[way], 'cost': 0.02, 'decode_gap': 0.1,
             **(changes if (check, way) == ('served', 'mp') else {})}
            for check in ('floor', 'scales', 'transforms', 'served') for way in kl if check in ('scales', 'transforms')
            or way != 'control']


@pytest.mark.parametrize('change, said', [
    ({}, None), ({'mean_kl': 0.011}, 'mean KL'), ({'decode_gap': 0.5}, 'decoded token'),
    ({'files_differ': 0.1}, 'scales'),
])
def test_verdicts_of_tensor_parallelism(change, said):
    failed = parallel.verdicts(rows_of_parallel(**change))
    assert not failed if said is None else len(failed) == 1 and said in failed[0]
    weak = [row | ({'mean_kl': 1e-4} if row['way'] == 'control' else {}) for row in rows_of_parallel()]
    assert len(parallel.verdicts(weak)) == 3, 'a control that shows nothing'


@HERE
def test_heads_with_magnitudes_of_their_own_change_nothing_and_their_files_reverse(tmp_path):
    """Powers of two; scores and outputs stay to the last bit. The control has the heads in the opposite order."""
    import transformers

    from lmdeploy_kvq.scales import read_file
    folder, ids = tmp_path / 'model', torch.arange(3, 40)[None]
    parallel.write_sharp(folder, smollm2.HOME, heads=4, kv_heads=4, head_dim=32, vocabulary=None)
    logits = []
    for spread in (False, True):
        if spread:
            parallel.spread_heads(folder, 4, 32)
        with torch.inference_mode():
            logits.append(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits)
    assert torch.equal(*logits)
    for check in ('scales', 'transforms'):
        parallel.calibrate(folder, check)
        file, control = (read_file(folder / f'{check}{end}.safetensors') for end in ('', '-control'))
        held, other = (file.layers, control.layers) if check == 'scales' else (file.transforms, control.transforms)
        assert held.keys() == other.keys() and len(held) == 2
        for n in held:
            pair = [x[n].resolved('')[0] if check == 'scales' else x[n] for x in (held, other)]
            assert torch.equal(pair[0], pair[1].flip(0)) and not torch.equal(*pair)
        if check == 'scales':
            k = held[0].resolved('')[0]
            assert float(k.max() / k.min()) > 1000


def test_what_an_engine_reads_and_writes(tmp_path):
    name = {(check, way): getattr(parallel.scale_file(tmp_path, parallel.Run(8, check, way)), 'name', '')
            for check in ('floor', 'scales', 'transforms', 'served') for way in ('tp=1', 'mp', 'control')}
    assert name['floor', 'mp'] == '' and name['scales', 'mp'] == name['scales', 'tp=1'] == 'scales.safetensors'
    assert name['transforms', 'control'] == 'transforms-control.safetensors'
    assert name['served', 'mp'] == '8-mp.safetensors' != name['served', 'tp=1'], 'every engine writes its own'


@pytest.mark.parametrize('arguments', [['--kv-heads', '1'], ['--tp', '4', '--kv-heads', '3'], ['--checks', 'served']])
def test_what_cannot_be_checked_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['parallel_check.py', *arguments])
    with pytest.raises(SystemExit, match='2'):
        parallel.main()
    assert '--kv-heads' in capsys.readouterr().err or '--checks' in arguments


@pytest.mark.covers('parallel.dp')
def test_lmdeploy_takes_the_arguments_of_every_data_parallel_rank(tmp_path):
    """Attention whole on each GPU, MLPs split over both; and nothing of the cache is refused."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.config import DistConfig
    from lmdeploy.pytorch.engine.cache_engine import schema
    from lmdeploy.pytorch.engine.config_builder import ConfigBuilder
    from test_cache_descs import cache_config, model_config

    from lmdeploy_kvq import FORMATS
    for fmt in FORMATS:
        spec = dp_check.rank_spec(fmt.name, 1, tmp_path, [[1], [2], [3]], ['a', 'b'])
        config = ConfigBuilder.update_engine_config(PytorchEngineConfig(quant_policy=fmt.name, **spec['engine']))
        dist = DistConfig.from_engine_config(config)
        assert (dist.dp, dist.dp_rank, dist.attn_tp, dist.mlp_tp, dist.world_size) == (2, 1, 1, 2, 2)
        model = model_config(3, 64)
        model.dist_config = dist
        desc = schema.build_k_cache_desc(model, cache_config(fmt.policy), dist.attn_tp)
        assert desc.shape[0] == 3, 'every rank has all heads'
    assert spec['rounds'] == [[[2]]] and dp_check.rank_env(1, 7)['CUDA_VISIBLE_DEVICES'] == '1'


@pytest.mark.parametrize('change, count', [({}, 0), ({'ranks_gap': 0.9}, 1), ({'mean_gap': 0.6}, 1),
                                           ({'mean_control': 0.5}, 1), ({'control': 1.0}, 1),
                                           ({'worst_gap': 9.0}, 0)])
def test_verdicts_of_data_parallelism(change, count):
    row = {'format': 'fp8', 'plain_gap': 0.3, 'ranks_gap': 0.8, 'worst_gap': 2.0, 'mean_gap': 0.2, 'mean_control': 2.0,
           'control': 6.0, **change}
    assert len(dp_check.verdicts([row])) == count


def test_ranks_wait_for_each_other(tmp_path, monkeypatch):
    """At two meetings, each of its own; and not for ever."""
    from concurrent.futures import ThreadPoolExecutor
    done = [str(tmp_path / 'a'), str(tmp_path / 'b')]

    def rank(number: int) -> list[int]:
        seen = []
        for when in ('answered', 'scored'):
            engine_process.meet({'done': done, 'engine': {'dp_rank': number}}, when)
            seen.append(len(list(tmp_path.glob(f'*-{when}'))))
        return seen

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [[2, 2], [2, 2]]
    monkeypatch.setattr(engine_process, 'TIMEOUT', 0.2)
    with pytest.raises(TimeoutError, match='has not left'):
        engine_process.meet({'done': done, 'engine': {'dp_rank': 0}}, 'left')
