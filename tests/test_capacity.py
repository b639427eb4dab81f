"""Bytes per token, against the pages this package and LMDeploy really allocate."""
import json

import pytest
from helpers import by_name, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq import capacity
from lmdeploy_kvq.capacity import CacheShape, bf16_bytes_per_token, block_bytes, bytes_per_token, gain, tokens_in

SHAPES = [  # layers, kv heads, head_dim, v_head_dim, block size: SmolLM2, Llama-3-8B, odd sizes, K and V that differ
    CacheShape(30, 3, 64),
    CacheShape(32, 8, 128),
    CacheShape(2, 1, 24, None, 16),
    CacheShape(5, 3, 192, 128, 32),
    CacheShape(1, 7, 72, 40, 128),
]


def by_size(shape):
    return '-'.join(str(n) for n in (shape.num_layers, shape.kv_heads, *shape.dims, shape.block_size))


@pytest.mark.parametrize('shape', SHAPES, ids=by_size)
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_unaligned_size_is_what_a_paged_cache_holds(fmt, shape):
    cache = kvq.PagedCache.allocate(fmt, 4, shape.block_size, shape.kv_heads, *shape.dims, device='cpu')
    static = sum(4 * s.numel() for s in (cache.k_static_scale, cache.v_static_scale) if s is not None)
    packed = CacheShape(**{**vars(shape), 'num_layers': 1, 'alignment': 1})
    assert 4 * block_bytes(fmt, packed) == cache.nbytes - static
    assert block_bytes(fmt, packed) / (shape.kv_heads * shape.block_size * sum(shape.dims)) * 8 == (
        pytest.approx(fmt.bits_per_element(*shape.dims)))


@pytest.mark.parametrize('name, least', [('int8_per_token_head', 1.93), ('k8v4', 2.55), ('int4_per_token_head', 3.7),
                                         ('k4v2', 4.9), ('int2', 7.0)])
@pytest.mark.parametrize('kv_heads', [1, 8])
def test_blocks_against_bf16_at_head_dim_128(name, least, kv_heads):
    for block_size in (64, 128):
        assert gain(name, CacheShape(32, kv_heads, 128, block_size=block_size)) >= least


def test_aligned_size_is_what_lmdeploy_allocates():
    """Through LMDeploy's own descriptors and packed layout, patched as in a server."""
    done = python("""
import json, sys
from types import SimpleNamespace
import torch
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.config import CacheConfig
from lmdeploy.pytorch.engine.cache_engine import schema
from lmdeploy.pytorch.engine.cache_engine.layout import PackedBlockCacheLayout
import lmdeploy_kvq as kvq
sizes = []
for layers, heads, k_dim, v_dim, block in json.loads(sys.argv[1]):
    model = SimpleNamespace(num_key_value_heads=heads, head_dim=k_dim, k_head_dim=k_dim, v_head_dim=v_dim,
                            dtype=torch.bfloat16, use_mla_fp8_cache=False, mla_kv_cache_dtype=None, use_flash_mla=False,
                            use_standard_kv_cache=True)
    for policy in (0, *(fmt.policy for fmt in kvq.FORMATS)):
        config = CacheConfig(8, block, 0, 4, kernel_block_size=block, quant_policy=QuantPolicy(policy))
        specs = schema.build_model_block_cache_tensor_specs(model, config, world_size=1)
        sizes.append(PackedBlockCacheLayout(specs, layers).allocate(4, 'cpu').nbytes)
print(json.dumps(sizes))
""", json.dumps([(s.num_layers, s.kv_heads, *s.dims, s.block_size) for s in SHAPES]))
    expected = [4 * block_bytes(fmt, shape) for shape in SHAPES for fmt in (None, *kvq.FORMATS)]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_numbers_by_hand():
    llama = CacheShape(32, 8, 128)
    assert bf16_bytes_per_token(llama) == bytes_per_token(None, llama) == 32 * 8 * 2 * 128 * 2 == 131072
    assert bytes_per_token('fp8_per_token_head', llama) == 32 * 8 * 2 * (128 + 4)
    assert bytes_per_token('fp8', llama) == 32 * 8 * 2 * 128
    assert gain('fp8', llama) == 2.0
    assert gain(116, llama) == pytest.approx(256 / 132)
    assert CacheShape(1, 1, 16, block_size=16).alignment == capacity.ALIGNMENT
    # 64 bytes of scales -> 256
    assert block_bytes('int8_per_token_head', CacheShape(1, 1, 16, block_size=16)) == 4 * 256


def test_tokens_in_counts_whole_blocks():
    shape = CacheShape(30, 3, 64)
    size = block_bytes('fp8', shape)
    assert tokens_in(size, 'fp8', shape) == 64
    assert tokens_in(10 * size - 1, 'fp8', shape) == 9 * 64
    assert tokens_in(10 * size, None, shape) == 5 * 64
    assert tokens_in(0, 'fp8', shape) == 0


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match='kv_heads must be positive, got 0'):
        CacheShape(1, 0, 64)
    with pytest.raises(ValueError, match='head_dim 20 is not supported'):
        bytes_per_token('fp8', CacheShape(1, 1, 20))
    with pytest.raises(ValueError, match='unknown KV cache format'):
        gain('fp9', CacheShape(1, 1, 64))


def test_needs_no_torch():
    python('import sys, lmdeploy_kvq.capacity as c; c.gain("fp8", c.CacheShape(1, 1, 64)); '
           'assert "torch" not in sys.modules')
