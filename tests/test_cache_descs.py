"""Pages as LMDeploy allocates them, through its own cache schema, plan and layout, and the models that are refused."""
import types

import pytest
import torch
from helpers import by_name, finite, frobenius, problem
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.config import CacheConfig, ModelConfig
from lmdeploy.pytorch.engine import executor
from lmdeploy.pytorch.engine.cache_engine import engine, layout, schema
from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference
from lmdeploy_kvq.backends import cache as backend
from lmdeploy_kvq.backends.attention import page_views
from lmdeploy_kvq.kernels.fill import TokenLayout, fill

FORMATS = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
SHAPE = 'kv_heads, head_dim, v_head_dim, block_size, kernel_block_size, world_size'
EACH_SHAPE = pytest.mark.parametrize(SHAPE, [
    (4, 64, None, 64, 64, 1), (4, 64, None, 64, 64, 2), (8, 128, None, 128, 64, 4), (3, 80, None, 16, 16, 1),
    (2, 96, 64, 64, 32, 2), (1, 256, None, 256, 256, 1), (5, 16, None, 16, 16, 1), (2, 192, 128, 64, 64, 1),
])


@pytest.fixture(scope='module', autouse=True)
def installed():
    """The hook, whatever this process's environment says."""
    kvq.install()


def model_config(kv_heads: int = 4, head_dim: int = 64, v_head_dim: int | None = None, heads: int | None = None,
                 architecture: str = 'LlamaForCausalLM', **changes) -> ModelConfig:
    """A model configuration as LMDeploy builds it from a Hugging Face one."""
    heads = 4 * kv_heads if heads is None else heads
    return ModelConfig(hidden_size=heads * head_dim, num_layers=3, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, bos_token_id=1, eos_token_id=[2], head_dim=head_dim,
                       k_head_dim=None if v_head_dim is None else head_dim, v_head_dim=v_head_dim,
                       dtype=torch.bfloat16, hf_config=types.SimpleNamespace(architectures=[architecture]), **changes)


def cache_config(policy: int, block_size: int = 64, kernel_block_size: int = -1, **changes) -> CacheConfig:
    """A cache configuration as the engine makes it."""
    return CacheConfig(**{'max_batches': 8, 'block_size': block_size, 'kernel_block_size': kernel_block_size,
                          'num_cpu_blocks': 0, 'num_gpu_blocks': 6, 'quant_policy': QuantPolicy(policy), **changes})


@EACH_SHAPE
@FORMATS
def test_descriptors(fmt, kv_heads, head_dim, v_head_dim, block_size, kernel_block_size, world_size):
    """Rows of tokens, scales beside them, in kernel blocks and per rank."""
    config = model_config(kv_heads, head_dim, v_head_dim)
    cache = cache_config(fmt.policy, block_size, kernel_block_size)
    k = schema.build_k_cache_desc(config, cache, world_size)
    v = schema.build_v_cache_desc(config, cache, world_size)
    scales = schema.build_quant_cache_descs(k, v, config, cache)
    heads, v_dim = kv_heads // world_size, v_head_dim or head_dim
    for desc, encoding, dim in ((k, fmt.key, head_dim), (v, fmt.value, v_dim)):
        row = -(-dim * encoding.codec.bits // 8 // 16) * 16  # bytes
        assert (desc.dtype, list(desc.shape)) == (torch.uint8, [heads, kernel_block_size, row])
    assert len(scales) == (2 if fmt.per_token_head else 0)  # what models unpack
    for encoding, desc in zip((fmt.key, fmt.value), scales, strict=False):
        assert desc.dtype == torch.float32
        assert list(desc.shape) == [heads, kernel_block_size if encoding.per_token_head else 0]
    stored = sum(desc.size for desc in (k, v, *scales))
    elements = heads * kernel_block_size * (head_dim + v_dim)
    assert stored == fmt.bits_per_element(head_dim, v_dim) * elements / 8
    assert all(desc.alignment == 256 for desc in (k, v, *scales))


@EACH_SHAPE
@FORMATS
def test_bytes_per_block_in_the_engines_plan(fmt, kv_heads, head_dim, v_head_dim, block_size, kernel_block_size,
                                             world_size):
    """What LMDeploy divides free memory by: our bytes, plus its alignment of each tensor."""
    config = model_config(kv_heads, head_dim, v_head_dim)
    cache = cache_config(fmt.policy, block_size, kernel_block_size)
    plan = build_block_cache_plan(config, cache, world_size)
    v_dim, heads = v_head_dim or head_dim, kv_heads // world_size
    block = kernel_block_size * heads * (head_dim + v_dim) * fmt.bits_per_element(head_dim, v_dim) / 8
    padding = 255 * len(plan.tensor_specs)
    layers, per_logical = config.num_layers, block_size // kernel_block_size
    assert block * layers * per_logical <= plan.logical_block_nbytes <= (block + padding) * layers * per_logical
    own = kvq.PagedCache.allocate(fmt, per_logical, kernel_block_size, heads, head_dim, v_dim, device='cpu')
    static = sum(4 for s in (own.k_static_scale, own.v_static_scale) if s is not None)
    assert own.nbytes - static == block * per_logical


@FORMATS
def test_experimental_formats_say_so_when_chosen(fmt, caplog):
    from lmdeploy import PytorchEngineConfig
    PytorchEngineConfig(quant_policy=fmt.name)
    assert (f'{fmt.name} is EXPERIMENTAL' in caplog.text) == bool(fmt.experimental)


def test_heads_that_do_not_split_are_named():
    for fmt in kvq.FORMATS:
        for build in (schema.build_k_cache_desc, schema.build_v_cache_desc):
            with pytest.raises(ValueError, match='3 KV heads do not split over 2'):
                build(model_config(3), cache_config(fmt.policy), 2)


def descriptors(policy: int, config: ModelConfig, world_size: int = 1, block_size: int = 64):
    cache = cache_config(policy, block_size)
    k = schema.build_k_cache_desc(config, cache, world_size)
    v = schema.build_v_cache_desc(config, cache, world_size)
    return k, v, schema.build_quant_cache_descs(k, v, config, cache)


@pytest.mark.parametrize('world_size', [1, 2])
@pytest.mark.parametrize('config', [
    model_config(), model_config(2, 128), model_config(2, 192, 128), model_config(2, 576, 512, use_flash_mla=True),
], ids=['64', '128', '192/128', 'mla'])
@pytest.mark.parametrize('policy', [0, 4, 8, 42])
def test_lmdeploys_own_policies_get_what_they_always_got(policy, config, world_size):
    ours = descriptors(policy, config, world_size)
    kvq.uninstall()
    try:
        theirs = descriptors(policy, config, world_size)
    finally:
        kvq.install()
    assert ours == theirs
    assert ours[0].dtype == (torch.bfloat16 if policy == 0 else torch.uint8)


def test_policies_are_ints_or_members():
    """cache_config.quant_policy is a plain int in places."""
    for fmt in kvq.FORMATS:
        config, cache = model_config(), cache_config(fmt.policy)
        cache.quant_policy = fmt.policy
        assert schema.build_k_cache_desc(config, cache) == descriptors(QuantPolicy(fmt.policy), config)[0]


def test_the_engine_names_the_format_in_its_log():
    for fmt in kvq.FORMATS:
        assert fmt.name in engine._KV_CACHE_QUANT_POLICY_DESCS[QuantPolicy(fmt.policy)]
    assert engine._KV_CACHE_QUANT_POLICY_DESCS[QuantPolicy.INT8] == 'int8 KV cache'


@pytest.mark.parametrize('kv_heads, head_dim, v_head_dim', [(2, 64, None), (3, 80, None), (2, 192, 128)])
@FORMATS
def test_pages_as_lmdeploy_allocates_them(fmt, kv_heads, head_dim, v_head_dim, device):
    """The views of one layer of the packed pool: written and read by the kernels, every other byte left alone."""
    config, cache = model_config(kv_heads, head_dim, v_head_dim), cache_config(fmt.policy, 32, 16)
    plan = build_block_cache_plan(config, cache, 1)
    assert isinstance(plan.layout, layout.PackedBlockCacheLayout)
    allocation = plan.allocate(6, device)  # 12 kernel blocks
    pool, = allocation.pools
    pool.tensor.fill_(0xFF)
    layer = [view[1] for view in allocation.tensor_views]
    static = [torch.full((), 0.02, device=device) for _ in range(2)]
    k_cache, v_cache, k_scale, v_scale = (*layer[:2], *(layer[2:] or static))
    pages = page_views(fmt, k_cache, v_cache, head_dim, v_head_dim or head_dim, k_scale, v_scale)
    assert (pages.num_blocks, pages.num_kv_heads, pages.block_size) == (12, kv_heads, 16)
    assert (pages.head_dim, pages.v_head_dim) == (head_dim, v_head_dim or head_dim)
    assert not pages.k_codes.is_contiguous() and pages.k_codes.data_ptr() == k_cache.data_ptr()

    source = problem(fmt, [5, 0, 18], device=device, head_dim=head_dim, v_head_dim=v_head_dim, kv_heads=kv_heads,
                     fill=False)
    q_lens = source.kv_lens
    fill(source.key, source.value, pages, TokenLayout(q_start=q_lens.cumsum(0) - q_lens, q_lens=q_lens, kv_lens=q_lens,
                                                      block_table=source.block_table))
    dense = kvq.flatten(pages, source.block_table, q_lens, torch.float32)
    for x, raw in zip(dense, (source.key, source.value), strict=True):
        assert frobenius(x, raw) <= 1.1 * fmt.max_error
    query = torch.randn(3, 4 * kv_heads, head_dim, generator=torch.Generator().manual_seed(2)).to(device)
    out = kvq.paged_attention(query, pages, source.block_table, q_lens)
    expected = reference.paged_attention(query, pages, source.block_table, q_lens, dtype=torch.float64)
    assert finite(out) and frobenius(out, expected) <= 1e-3 and not out[1].any()

    assert (pool.tensor[0] == 0xFF).all() and (pool.tensor[2] == 0xFF).all()  # the other layers
    free = sorted(set(range(12)) - set(source.block_table[0, :1].tolist()) - set(source.block_table[2, :2].tolist()))
    assert len(free) == 9 and (pool.tensor[1, free] == 0xFF).all()


@FORMATS
def test_page_views_carries_static_scales(fmt):
    """Scales per layer, or per KV head; where the format computes scales, the page's tensors are taken instead."""
    cache = kvq.PagedCache.allocate(fmt, 2, 16, 2, 64, device='cpu')
    given = [torch.tensor([0.5, 2.0]), torch.tensor(3.0)]
    scales = [one if own is None else own for one, own in zip(given, (cache.k_scales, cache.v_scales), strict=True)]
    pages = page_views(fmt, cache.k_codes, cache.v_codes, 64, 64, *scales)
    assert (pages.k_static_scale is given[0]) != fmt.key.per_token_head
    assert (pages.v_static_scale is given[1]) != fmt.value.per_token_head
    assert (pages.k_scales is cache.k_scales) and (pages.v_scales is cache.v_scales)


REFUSED = {
    'flash MLA': (model_config(1, 576, 512, heads=16, use_flash_mla=True, architecture='DeepseekV3ForCausalLM'),
                  ['DeepseekV3ForCausalLM', 'MLA']),
    'V aliased to K': (model_config(1, 128, 0, heads=16, architecture='DeepseekV2ForCausalLM'),
                       ['DeepseekV2ForCausalLM', 'MLA']),
    'MiniCPM3': (model_config(40, 96, 64, heads=40, architecture='MiniCPM3ForCausalLM'), ['MiniCPM3ForCausalLM']),
    'DeepSeek V4': (model_config(1, 128, architecture='DeepseekV4ForCausalLM'), ['DeepseekV4ForCausalLM']),
    'own cache': (model_config(use_standard_kv_cache=False), ['LlamaForCausalLM']),
    'block diffusion with a window': (
        model_config(model_paradigm='dllm', architecture='SDARForCausalLM', sliding_window=64),
        ['SDARForCausalLM', 'diffusion', 'window']),
    'head_dim 20': (model_config(4, 20), ['head_dim 20', 'multiples of 8']),
    'v_head_dim 12': (model_config(4, 64, 12), ['v_head_dim 12', 'multiples of 8']),
    'head_dim 512': (model_config(4, 512), ['head_dim 512', '256']),
    '128 heads per KV head': (model_config(1, 64, heads=128), ['128 query heads per KV head', '64']),
}


@pytest.mark.parametrize('config, words', REFUSED.values(), ids=REFUSED.keys())
@FORMATS
def test_models_that_cannot_be_served_are_refused_before_loading(fmt, config, words):
    """In the engine's own hook point, with what would work."""
    cache, finalize = cache_config(fmt.policy), executor._finalize_sparse_mla_cache_policy
    for check in (lambda: backend.check_model(fmt, config, cache), lambda: finalize([config], cache),
                  lambda: finalize([model_config(), config], cache)):
        with pytest.raises(ValueError) as caught:
            check()
        for word in (fmt.name, 'quant_policy', *words):
            assert word in str(caught.value)


@FORMATS
def test_batches_beyond_the_kernels_are_refused(fmt):
    assert backend.check_model(fmt, model_config(), cache_config(fmt.policy, max_batches=1024)) is None
    with pytest.raises(ValueError, match='max_batch_size 1025 is above 1024'):
        executor._finalize_sparse_mla_cache_policy([model_config()], cache_config(fmt.policy, max_batches=1025))


@pytest.mark.parametrize('config', [
    model_config(3, 64, heads=9), model_config(8, 128, heads=32), model_config(1, 256, heads=4),
    model_config(8, 80, heads=8), model_config(2, 192, 128, heads=16), model_config(1, 64, heads=64),
    model_config(4, 96, heads=28), model_config(model_paradigm='dllm', architecture='SDARForCausalLM'),
], ids=['SmolLM2', 'Llama 3', 'Gemma 3', 'head_dim 80', 'K and V differ', 'group 64', 'group 7',
        'block diffusion'])
@FORMATS
def test_models_that_can_be_served_pass(fmt, config):
    cache = cache_config(fmt.policy)
    assert executor._finalize_sparse_mla_cache_policy([config], cache) is None
    assert cache.quant_policy == fmt.policy


@pytest.mark.parametrize('policy', [0, 4, 8, 42])
def test_lmdeploys_own_policies_are_never_refused(policy):
    for config, _ in REFUSED.values():
        cache = cache_config(policy, max_batches=4096)
        executor._finalize_sparse_mla_cache_policy([config], cache)
        assert cache.quant_policy == policy


@pytest.mark.covers('arch.mla')
def test_sparse_mla_stays_lmdeploys():
    """DSA models give fp8 a meaning of their own; LMDeploy refuses every other policy for them itself."""
    for fmt in kvq.FORMATS:
        config = model_config(1, 576, 512, use_flash_mla=True, mla_index_topk=64)
        cache = cache_config(fmt.policy)
        if fmt.policy == QuantPolicy.FP8:
            executor._finalize_sparse_mla_cache_policy([config], cache)
            assert cache.quant_policy == QuantPolicy.NONE and config.mla_kv_cache_dtype == 'fp8_ds_mla'
        else:
            with pytest.raises(ValueError, match='Sparse MLA does not support'):
                executor._finalize_sparse_mla_cache_policy([config], cache)


@pytest.mark.covers('parallel.replicated')
@FORMATS
def test_fewer_kv_heads_than_gpus_are_replicated(fmt):
    """LMDeploy's own configuration of a model with two KV heads on four GPUs: a page has one head, a scale file two."""
    from lmdeploy.pytorch.config import DistConfig
    from transformers import LlamaConfig

    from lmdeploy_kvq.backends.loading import kv_heads
    hf_config = LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                            num_hidden_layers=2, architectures=['LlamaForCausalLM'])
    config = ModelConfig.from_hf_config(hf_config, dist_config=DistConfig(tp=4), device_type='ascend')
    cache = cache_config(fmt.policy)
    assert (config.num_key_value_heads, kv_heads(config)) == (4, 2)
    assert schema.build_k_cache_desc(config, cache, 4).shape[0] == 1
    backend.check_model(fmt, config, cache)
