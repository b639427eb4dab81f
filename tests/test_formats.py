"""The format table and its look-ups."""
import dataclasses
import enum

import pytest
import torch
from helpers import by_name, frobenius, grid, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq import formats, reference

NAMES = sorted((name, fmt) for fmt in kvq.FORMATS for name in (fmt.name, *fmt.aliases))


Policy = enum.IntEnum('Policy', {fmt.name.upper(): fmt.policy for fmt in kvq.FORMATS})


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_entries_are_well_formed(fmt):
    assert fmt.name == fmt.name.lower() and fmt.summary and 0 < fmt.max_error < 1
    assert fmt.policy > 0 and isinstance(fmt.policy, int)
    for encoding in (fmt.key, fmt.value):
        assert encoding.codec.bits in (2, 4, 8) and encoding.codec.qmax > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.policy = 1


def test_names_and_policies_are_unique():
    names = [name for fmt in kvq.FORMATS for name in (fmt.name, *fmt.aliases)]
    assert len(set(names)) == len(names)
    assert len({fmt.policy for fmt in kvq.FORMATS}) == len(kvq.FORMATS)


def test_the_numbers_users_have_written_down():
    """Values are an interface: scripts and servers store them."""
    promised = {'fp8': 16, 'fp8_e4m3': 16, 'fp8_e5m2': 17, 'fp8_per_token_head': 116, 'fp8_e4m3_per_token_head': 116,
                'fp8_e5m2_per_token_head': 117, 'int8_per_token_head': 108, 'int4_per_token_head': 104,
                'k8v4_per_token_head': 184, 'k8v4': 184, 'k4v2_per_token_head': 142, 'k4v2': 142,
                'int2_per_token_head': 102, 'int2': 102}
    assert {name: kvq.get_format(name).policy for name in promised} == promised
    assert promised.items() <= formats.format_names().items()


@pytest.mark.parametrize('policy', [0, 4, 8, 42])
def test_lmdeploys_own_policies_are_not_ours(policy):
    assert kvq.find_format(policy) is None
    with pytest.raises(ValueError, match='unknown'):
        kvq.get_format(policy)


@pytest.mark.parametrize('name, fmt', NAMES)
def test_get_format_by_name_in_any_case(name, fmt):
    for text in (name, name.upper(), name.title(), f' {name} '):
        assert kvq.get_format(text) is fmt


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_get_format_by_number(fmt):
    assert kvq.get_format(fmt.policy) is fmt
    assert kvq.get_format(str(fmt.policy)) is fmt
    assert kvq.get_format(Policy(fmt.policy)) is fmt
    assert kvq.get_format(fmt) is fmt
    assert kvq.find_format(fmt.policy) is fmt and kvq.find_format(Policy(fmt.policy)) is fmt


def test_get_format_by_lmdeploys_member():
    python("""
import lmdeploy_kvq as kvq
from lmdeploy.messages import QuantPolicy
for fmt in kvq.FORMATS:
    assert kvq.get_format(QuantPolicy(fmt.policy)) is fmt, fmt.name
    assert kvq.get_format(QuantPolicy[fmt.name.upper()]) is fmt, fmt.name
""")


@pytest.mark.parametrize('key', ['', 'fp9', 'none', '0', '-16', '16.0', 0, -16, 1000, 'fp8 per_token_head'])
def test_unknown_keys_list_what_exists(key):
    with pytest.raises(ValueError) as caught:
        kvq.get_format(key)
    assert repr(key) in str(caught.value)
    for fmt in kvq.FORMATS:
        assert f'{fmt.name} ({fmt.policy})' in str(caught.value)


@pytest.mark.parametrize('key', [None, 16.0, True, b'fp8', ('fp8', )])
def test_keys_of_other_types_are_refused(key):
    with pytest.raises(TypeError, match=type(key).__name__):
        kvq.get_format(key)


@pytest.mark.parametrize('change, word', [
    ({'policy': 1000}, 'twice'),
    ({'name': 'something_else'}, 'policy'),
    ({'name': 'something_else', 'policy': 1000, 'aliases': ('int8_per_token_head', )}, 'twice'),
    ({'name': 'Upper', 'policy': 1000}, 'lower case'),
    ({'name': 'something_else', 'policy': 1000, 'aliases': ('Upper', )}, 'lower case'),
])
def test_duplicates_and_capitals_raise(change, word):
    first = kvq.get_format('int8_per_token_head')
    with pytest.raises(ValueError, match=word):
        formats._index((first, dataclasses.replace(first, **change)))


@pytest.mark.parametrize('head_dim, v_head_dim', [
    (64, None), (128, None), (80, None), (192, 128), (32, 256), (256, 16),
])
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_bits_per_element_is_what_gets_allocated(fmt, head_dim, v_head_dim):
    blocks, block_size, heads = 3, 32, 5
    cache = kvq.PagedCache.allocate(fmt, blocks, block_size, heads, head_dim, v_head_dim, device='cpu')
    elements = blocks * block_size * heads * (head_dim + (v_head_dim or head_dim))
    per_layer = sum(4 * s.numel() for s in (cache.k_static_scale, cache.v_static_scale) if s is not None)
    assert cache.nbytes == fmt.bits_per_element(head_dim, v_head_dim) * elements / 8 + per_layer


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_allocated_shapes(fmt):
    cache = kvq.PagedCache.allocate(fmt.name, 3, 32, 5, 64, 128, device='cpu')
    assert cache.format is fmt
    k_bytes, v_bytes = 64 * fmt.key.codec.bits // 8, 128 * fmt.value.codec.bits // 8
    assert cache.k_codes.shape == (3, 5, 32, k_bytes) and cache.v_codes.shape == (3, 5, 32, v_bytes)
    assert cache.k_codes.dtype == cache.v_codes.dtype == torch.uint8
    assert not cache.k_codes.any() and not cache.v_codes.any()
    assert (cache.num_blocks, cache.num_kv_heads, cache.block_size) == (3, 5, 32)
    assert (cache.head_dim, cache.v_head_dim) == (64, 128)
    for encoding, scale in ((fmt.key, cache.k_scale), (fmt.value, cache.v_scale)):
        assert scale.dtype == torch.float32
        assert scale.shape == ((3, 32, 5) if encoding.per_token_head else ())
        assert encoding.per_token_head or scale.item() == 1.0


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_a_page_knows_its_transforms(fmt):
    cache = kvq.PagedCache.allocate(fmt, 2, 16, 2, 96, 64, device='cpu')
    for encoding, transform, dim in ((fmt.key, cache.k_transform, 96), (fmt.value, cache.v_transform, 64)):
        assert (transform is None) == (encoding.rotation is None)
        assert transform is None or transform.dim == dim


def test_what_is_experimental_says_so_wherever_it_is_described():
    for fmt in kvq.FORMATS:
        assert ('EXPERIMENTAL' in fmt.label) == bool(fmt.experimental) and fmt.label.startswith(fmt.summary)
    assert kvq.get_format('int2').experimental


@pytest.mark.parametrize('block_size', [0, 1, 8, 15, 24, 48, 100, -16])
def test_block_sizes_that_are_no_power_of_two_are_refused(block_size):
    for fmt in kvq.FORMATS:
        with pytest.raises(ValueError, match='block_size must be a power of two from 16 up'):
            kvq.PagedCache.allocate(fmt, 2, block_size, 2, 64, device='cpu')


@pytest.mark.parametrize('head_dim, v_head_dim, named', [
    (20, None, '20'), (0, None, '0'), (8, None, '8'), (264, None, '264'), (512, None, '512'), (-64, None, '-64'),
    (64, 20, '20'), (64, 0, '0'), (576, 512, '576'),
])
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_head_sizes_a_page_cannot_hold(fmt, head_dim, v_head_dim, named):
    for attempt in (lambda: fmt.check_head_dims(head_dim, v_head_dim),
                    lambda: kvq.PagedCache.allocate(fmt, 2, 16, 2, head_dim, v_head_dim, device='cpu')):
        with pytest.raises(ValueError) as caught:
            attempt()
        message = str(caught.value)
        for words in (fmt.name, f'dim {named} ', 'multiples of 8', 'quant_policy'):
            assert words in message


@pytest.mark.parametrize('head_dim', [16, 32, 64, 72, 80, 96, 112, 128, 192, 256])
def test_head_sizes_of_real_models_are_accepted(head_dim):
    for fmt in kvq.FORMATS:
        assert fmt.check_head_dims(head_dim) is None
        assert fmt.check_head_dims(128, head_dim) is None


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_codecs_have_reference_arithmetic(fmt):
    for encoding in (fmt.key, fmt.value):
        values = grid(encoding.codec)
        assert encoding.codec.parts * encoding.codec.bits == 8
        assert values.min() == -encoding.codec.qmax and values.max() == encoding.codec.qmax
        codes = reference.encode_codes(values, encoding.codec)
        assert torch.equal(reference.decode_codes(codes, encoding.codec), values)
        assert frobenius(-values, values.flip(0)) == 0.0  # symmetric: the sign of a value costs nothing
