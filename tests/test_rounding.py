"""scripts/rounding.py: copies of a model that differ by what they round."""
from __future__ import annotations

import pytest
import rounding
import torch
from rounding import Rounding
from soak_checks import GAP_LIMIT
from soak_load import Prompt
from test_calibrate import folder as small_model  # noqa: F401  a fixture: a small Llama with a tokenizer

from lmdeploy_kvq.hf_cache import QuantizedCache

IDS, TEXT = list(range(20, 60)), [7, 99, 13]
TOKENS = list(range(250))


def expected(model: torch.nn.Module, ids: list[int], cache: object = None) -> torch.Tensor:
    """Gaps of TOKENS behind ``ids``, read at once."""
    with torch.inference_mode():
        predictions = model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].log_softmax(-1)
    return predictions.max() - predictions[TOKENS]


@pytest.fixture(scope='module')
def exact(small_model) -> Rounding:  # noqa: F811
    return Rounding(str(small_model), noise=0.0)


def test_without_noise_it_is_the_model(exact):
    """Of bf16's cache; of a format whose prompts see the cache; and of a first token, before which nothing is read."""
    for fmt, text, prefill, cache in (('none', TEXT, 'raw', None), ('int4_per_token_head', [], 'raw', None),
                                      ('int4_per_token_head', TEXT, 'cache', QuantizedCache('int4_per_token_head'))):
        found = exact.gaps(fmt, IDS, text, TOKENS, copies=3, prefill=prefill)
        assert found.shape == (3, len(TOKENS))
        for row in found:
            torch.testing.assert_close(row, expected(exact.model, IDS + text, cache), atol=2e-4, rtol=1e-4)
            if cache is not None:
                cache.reset()
    raw, cached = (exact.gaps('int4_per_token_head', IDS, TEXT, TOKENS, 1, prefill) for prefill in ('raw', 'cache'))
    assert (raw - cached).abs().max() > 1e-3  # a prompt that sees its own tokens as they are is another one


def test_hits_of_the_prefix_cache_are_read_as_stored(exact):
    """Whole blocks, never the last token; no difference where the cache is exact, or prompts see it anyhow."""
    ids = list(range(20, 220))  # three blocks, and eight tokens
    plain, = exact.gaps('none', ids, TEXT, TOKENS, 1)
    hits = exact.gaps('none', ids, TEXT, TOKENS, 16)
    torch.testing.assert_close(hits, plain.expand(16, -1), atol=2e-4, rtol=1e-4)
    seen = exact.gaps('int4_per_token_head', ids, TEXT, TOKENS, 16, 'cache')
    torch.testing.assert_close(seen, seen[:1].expand(16, -1), atol=2e-4, rtol=1e-4)
    raw = exact.gaps('int4_per_token_head', ids, TEXT, TOKENS, 16)
    kinds = raw.unflatten(0, (rounding.HITS, 2))
    torch.testing.assert_close(kinds[:, 0], kinds[:, 1], atol=2e-4, rtol=1e-4)  # the two of a batch
    for a, b in ((0, 1), (1, 2)):  # nothing found, and all; the text token by token, and at once
        assert (kinds[a] - kinds[b]).abs().max() > 1e-3
    short = exact.gaps('int4_per_token_head', ids[:64], TEXT, TOKENS, 16)  # a block that ends with the prompt: no hits
    taken = [exact.gaps('int4_per_token_head', ids[:64] + TEXT[:n], TEXT[n:], TOKENS, 1)[0] for n in range(4)]
    ways = [next(n for n, other in enumerate(taken) if torch.allclose(row, other, atol=2e-4)) for row in short[::2]]
    assert ways[:3] == [0, 0, 3] and (taken[0] - taken[3]).abs().max() > 1e-3  # as it was asked, and taken up again


def test_copies_differ_and_follow_from_the_seed(small_model, monkeypatch):  # noqa: F811
    noisy = Rounding(str(small_model))
    first, again = (noisy.gaps('int4_per_token_head', IDS, TEXT, TOKENS, 4, seed=3) for _ in range(2))
    assert torch.equal(first, again) and len({tuple(row.tolist()) for row in first}) == 4
    assert not torch.equal(first, noisy.gaps('int4_per_token_head', IDS, TEXT, TOKENS, 4, seed=4))
    exact = noisy.gaps('none', IDS, TEXT, TOKENS, 4)
    assert 0 < (exact - exact.mean(0)).abs().max() < 1  # nats: last bits, no more
    monkeypatch.setattr(rounding, 'AT_ONCE', (80, 80))  # two copies at a time
    assert noisy.gaps('none', IDS, TEXT, TOKENS, 5).shape == (5, len(TOKENS))
    monkeypatch.setattr(rounding, 'MOST_TOKENS', 130)
    assert noisy.gaps('none', IDS, TEXT, TOKENS, 5).shape == (3, len(TOKENS))


def test_rows(small_model):  # noqa: F811
    noisy = Rounding(str(small_model))
    gaps = noisy.gaps('fp8_per_token_head', IDS, TEXT, TOKENS, 8)
    order = gaps.median(0).values.argsort().tolist()
    likely, least = order[0], order[-1]
    for token, alone in ((least, likely), (likely, least)):
        row = noisy.explain('fp8_per_token_head', IDS, TEXT, token, [token, alone], 8)
        copies = 8 if token == least else 1  # enough: the first that finds it likely
        own, other = gaps[:copies, token], gaps[:copies, alone]
        assert row == {'copies': copies, 'smallest_gap': float(own.min()), 'median_gap': float(own.median()),
                       'others': 1, 'likeliest': float((own == 0).float().mean()), 'nearest_other': float(other.min())}
        assert (row['smallest_gap'] <= GAP_LIMIT) == (row['nearest_other'] > GAP_LIMIT) == (token == likely)
    assert noisy.explain('fp8_per_token_head', IDS, TEXT, least, [], 8)['nearest_other'] is None


def test_texts_are_taken_up_anywhere(exact, monkeypatch):
    """Requests that were given up: their answer so far is read with the prompt, the rest token by token."""
    read, original = [], Rounding._read

    def spy(self, fmt, ids, text, *args):
        read.append((len(ids), len(text)))
        return original(self, fmt, ids, text, *args)

    monkeypatch.setattr(Rounding, '_read', spy)
    found = exact.gaps('none', IDS, TEXT, TOKENS, 400)
    torch.testing.assert_close(found, expected(exact.model, IDS + TEXT).expand(400, -1), atol=2e-4, rtol=1e-4)
    assert len(read) == 8
    monkeypatch.setattr(rounding, 'AT_ONCE', (40, 40))  # a copy at a time
    exact.gaps('none', IDS, TEXT, TOKENS, 60)
    assert all(sum(pair) == len(IDS) + len(TEXT) for pair in read)
    taken = [prompt - len(IDS) for prompt, _ in read[8:]]
    assert taken[2] == len(TEXT) and set(taken) >= {0, 1, 2} and sum(map(bool, taken)) < 15  # 7.5 of 60


def test_how_much_copies_differ(exact, small_model):  # noqa: F811
    """Nothing without noise; with it, what one pass over prompt and text says of the text's tokens."""
    assert exact.change(IDS, TEXT, 3).shape == (2, len(TEXT)) and exact.change(IDS, TEXT, 3).max() == 0
    assert rounding.copies_for(7) == rounding.COPIES and rounding.copies_for(263) == 263 * rounding.PER_VISIT
    row, = rounding.floor(str(small_model), [Prompt(tuple(IDS), 4), Prompt(tuple(IDS) * 20, 4), Prompt((5, ), 2)])
    assert (row['prompts'], row['tokens']) == (2, 6) and 0 < row['change'] <= row['largest_change'] < 1
