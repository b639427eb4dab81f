"""The configuration surface: any combination is refused before a model loads, or its cache is allocated and works.

Every stage is LMDeploy's own, as its engine runs them: the engine's configuration, the model's configuration from a
Hugging Face one, the check of the cache's policy, and the plan by which the cache engine allocates; here on the CPU.
Then the kernels write and read one layer of one rank.
"""
from __future__ import annotations

import pytest
import torch
from helpers import finite, frobenius
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from lmdeploy import PytorchEngineConfig
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.engine import executor
from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan
from lmdeploy.pytorch.engine.config_builder import ConfigBuilder

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.backends.attention import page_views
from lmdeploy_kvq.formats import find_format, format_names, page_shape
from lmdeploy_kvq.kernels.decode import decode
from lmdeploy_kvq.kernels.fill import TokenLayout, fill
from lmdeploy_kvq.kernels.workspace import DecodeConfig

transformers = pytest.importorskip('transformers', minversion='5')

OURS = st.sampled_from([*format_names(), *(fmt.policy for fmt in kvq.FORMATS), *map(QuantPolicy, (16, 17))])
THEIRS = st.sampled_from([0, 4, 8, 42, 'none', 'int8', ' TURBO_QUANT ', QuantPolicy.NONE])
NONSENSE = st.sampled_from(['fp9', '', 'fp8,int4', '-1', '99', 99, -1, 2**70, 3.5, True, None, (), [], {}, b'fp8',
                            float('nan')])
PATHS = {'none': None, 'strict': 'strict', 'missing': '/no/such/file.safetensors', 'folder': '/', 'empty': '  '}
CONFIGURATIONS = st.fixed_dictionaries({
    'policy': st.one_of(*[OURS] * 12, THEIRS, NONSENSE),
    'block_size': st.sampled_from([64] * 8 + [16, 32, 128, 256, 512] * 2 + [48, 17, 8, 0, -16]),
    'kernel_block_size': st.sampled_from([-1] * 9 + [16] * 4 + [32, 64, 128, 48, 8, 0]),
    'head_dim': st.sampled_from([64, 128, 16, 24, 80, 96, 192, 256] * 3 + [8, 20, 63, 264, 512]),
    'v_head_dim': st.sampled_from([None] * 12 + [64, 32, 128, 40] * 2 + [0, 12, 300]),
    'kv_heads': st.sampled_from([1, 2, 2, 3, 4, 8]),
    'heads_per_kv': st.sampled_from([1, 2, 3, 4, 7, 16] * 3 + [2.5, 64, 65]),
    'tp': st.sampled_from([1] * 8 + [2, 2, 3, 4, 16]),
    'device_type': st.sampled_from(['cuda'] * 20 + ['ascend', 'maca', 'camb', 'cpu']),
    'dtype': st.sampled_from(['auto', 'float16', 'bfloat16'] * 4 + ['float32']),
    'weights': st.sampled_from(['bfloat16', 'float16', 'float32']),
    'max_batch_size': st.sampled_from([8, 256, 1024] * 4 + [1025]),
    'kv_scales': st.sampled_from(['none'] * 30 + [*PATHS]),
    'kv_calibrate': st.sampled_from([None] * 40 + ['16', '16,head', '0', 'all', '16,layer']),
    'prefill': st.sampled_from([None] * 8 + ['raw', ' CACHE ', ''] * 3 + ['quantized']),
})
DEFAULT = {'policy': 'fp8', 'block_size': 64, 'kernel_block_size': -1, 'head_dim': 64, 'v_head_dim': None,
           'kv_heads': 2, 'heads_per_kv': 2, 'tp': 1, 'device_type': 'cuda', 'dtype': 'auto', 'weights': 'bfloat16',
           'max_batch_size': 8, 'kv_scales': 'none', 'kv_calibrate': None, 'prefill': None}


@pytest.fixture(scope='module', autouse=True)
def installed():
    kvq.install()


@pytest.fixture(scope='module')
def trips() -> list:
    """Formats that went through the kernels."""
    found: list = []
    yield found
    assert len(found) == TRIPS


class Refused(Exception):
    """A configuration is refused, in these words."""


def lmdeploys_own(case: dict) -> bool:
    """LMDeploy refuses this engine configuration whatever the policy: with an assertion of its own."""
    try:
        engine_config({**case, 'policy': 0})
    except (AssertionError, ValueError):
        return True
    return False


def engine_config(case: dict) -> PytorchEngineConfig:
    return PytorchEngineConfig(quant_policy=case['policy'], tp=case['tp'], dtype=case['dtype'],
                               **{name: case[name] for name in ('block_size', 'kernel_block_size', 'device_type',
                                                                'max_batch_size')})


def configure(case: dict):
    """The stages before anything is loaded: LMDeploy's cache and model configurations.

    Raises:
        Refused: one of them refuses the case, in words of ours or, where it has nothing to do with the cache's policy,
            of LMDeploy's.
    """
    try:
        engine = engine_config(case)
    except AssertionError as error:
        theirs = case['policy'] in (4, 8, 42, 'int8', ' TURBO_QUANT ')
        assert theirs or lmdeploys_own(case), f'an assertion about {case["policy"]!r}, no sentence: {error}'
        raise Refused(f'LMDeploy: {error}') from error
    except ValueError as error:
        raise Refused(str(error)) from error
    engine = ConfigBuilder.update_engine_config(engine)
    cache, dist = ConfigBuilder.build_cache_config(engine), ConfigBuilder.build_dist_config(engine)
    heads = int(case['kv_heads'] * case['heads_per_kv'])
    hf = transformers.LlamaConfig(
        hidden_size=heads * 16, num_attention_heads=heads, num_key_value_heads=case['kv_heads'], num_hidden_layers=2,
        head_dim=case['head_dim'], vocab_size=64, dtype=case['weights'], architectures=['LlamaForCausalLM'])
    try:
        # the device is only asked for bf16, by looking at the GPU for 'cuda'
        model = ModelConfig.from_hf_config(hf, '', dtype=case['dtype'], dist_config=dist, device_type='ascend')
    except AssertionError as error:
        assert heads % case['tp'] or max(case['kv_heads'], case['tp']) % min(case['kv_heads'], case['tp'])
        raise Refused('LMDeploy: heads do not split') from error
    if case['v_head_dim'] is not None:
        model.v_head_dim = case['v_head_dim']
    try:
        executor._finalize_sparse_mla_cache_policy([model], cache)
    except ValueError as error:
        raise Refused(str(error)) from error
    return engine, cache, model


def layer_pages(fmt, plan, cache, model, tp: int) -> kvq.PagedCache:
    """The second layer of one rank, as LMDeploy's plan allocates it, eight pages of the kernels or more; checked."""
    page, dims = cache.kernel_block_size, (model.k_head_dim, model.v_head_dim)
    kv_heads, per_block = model.num_key_value_heads // tp, cache.block_size // page
    device = 'cpu' if plan.logical_block_nbytes < 2**20 else 'meta'
    allocation = plan.allocate(-(-8 // per_block), device)
    views = [view[1] for view in allocation.tensor_views]
    assert len(views) == (4 if fmt.per_token_head else 2) and views[0].size(0) >= 8
    stored = 0
    for view, encoding, dim in zip(views, (fmt.key, fmt.value), dims):
        assert view.dtype == torch.uint8 and view.shape[1:] == (kv_heads, *page_shape(page, dim, encoding))
        stored += view[0].numel()
    for view, encoding in zip(views[2:], (fmt.key, fmt.value)):
        assert view.dtype == torch.float32 and view.shape[1:] == (kv_heads, page if encoding.per_token_head else 0)
        stored += 4 * view[0].numel()
    assert stored * 8 == pytest.approx(fmt.bits_per_element(*dims) * sum(dims) * page * kv_heads, rel=1e-9)
    assert 0 <= plan.logical_block_nbytes - 2 * stored * per_block < 2 * 256 * 4 * per_block  # LMDeploy aligns tensors
    static = [torch.full((), 0.02)] * 2
    return page_views(fmt, *views[:2], *dims, *(views[2:] or static))


def round_trip(fmt, pages: kvq.PagedCache, heads: int, dtype: torch.dtype) -> None:
    """Three sequences: what the kernels write is what the reference writes, and they attend to it as it does."""
    kv_heads, dims = pages.num_kv_heads, (pages.head_dim, pages.v_head_dim)
    lens = torch.tensor([min(pages.block_size + 3, 40), 1, 21])
    table = torch.tensor([[1, 5, 4], [3, 0, 0], [6, 2, 0]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    total = int(lens.sum())
    key, value = (torch.randn(total, kv_heads, dim, generator=generator).to(dtype) for dim in dims)
    fill(key, value, pages, TokenLayout(q_start=lens.cumsum(0) - lens, q_lens=lens, kv_lens=lens, block_table=table))
    for x, raw in zip(reference.flatten(pages, table, lens, torch.float32), (key, value)):
        assert frobenius(x, raw) <= 1.2 * fmt.max_error  # the table's bound is for larger tensors
    query = torch.randn(3, heads, dims[0], generator=generator).to(dtype)
    out = decode(query, pages, table, lens, query.new_empty(3, heads, dims[1]), query_len=1, sm_scale=dims[0]**-0.5,
                 config=DecodeConfig(16, 1, num_warps=2, programs=2))
    expected = reference.paged_attention(query.float(), pages, table, lens, dtype=torch.float64)
    assert finite(out) and frobenius(out, expected) <= (1e-2 if dtype == torch.bfloat16 else 2e-3)


TRIPS = 3
"""How many configurations go through the kernels, each of another format: seconds each in Triton's interpreter."""


@pytest.mark.covers('fault.fuzz')
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True,
          phases=(Phase.explicit, Phase.generate, Phase.shrink))
@given(CONFIGURATIONS)
def test_any_configuration_works_or_is_refused_before_loading(trips, case):
    names = {'LMDEPLOY_KVQ_SCALES': PATHS[case['kv_scales']], 'LMDEPLOY_KVQ_CALIBRATE': case['kv_calibrate'],
             'LMDEPLOY_KVQ_PREFILL': case['prefill']}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        try:
            _, cache, model = configure(case)
        except Refused as refusal:
            event('refused')
            assert str(refusal).startswith('LMDeploy') or len(str(refusal)) > 25 and '\n' not in str(refusal)
            return
        fmt = find_format(cache.quant_policy)
        assert isinstance(cache.quant_policy, QuantPolicy | int)
        if fmt is None or case['device_type'] != 'cuda':  # LMDeploy's own; what Ascend makes of fp8 is, too
            event('not ours')
            return
        event('works')
        pages = layer_pages(fmt, build_block_cache_plan(model, cache, case['tp']), cache, model, case['tp'])
        heads = model.num_attention_heads // case['tp']
        small = pages.k_codes.device.type == 'cpu' and heads * pages.head_dim <= 1024
        if small and len(trips) < TRIPS and fmt not in trips:
            event('goes through the kernels')
            trips.append(fmt)
            round_trip(fmt, pages, heads, model.dtype)


@pytest.mark.covers('fault.fuzz')
@pytest.mark.parametrize('changes, words', [
    ({'prefill': 'quantized'}, "LMDEPLOY_KVQ_PREFILL is 'quantized'"),  # was refused by the first prompt
    ({'heads_per_kv': 2.5}, '5 query heads do not share 2 KV heads evenly'),  # was refused by the first decode step
], ids=['prefill', 'heads'])
def test_what_was_refused_too_late(monkeypatch, changes, words):
    """Found by the test above: errors that came when the model had been loaded."""
    case = {**DEFAULT, **changes}
    if case['prefill']:
        monkeypatch.setenv('LMDEPLOY_KVQ_PREFILL', case['prefill'])
    with pytest.raises(Refused, match=words):
        configure(case)
