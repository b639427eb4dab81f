"""Merging attention over disjoint keys: equal to attention over all of them, and never NaN."""
import math

import pytest
import torch
from helpers import finite

from lmdeploy_kvq.kernels.merge import merge

INF = math.inf
TOLERANCE = 3e-6
"""fp32 weights from a GPU's approximate exp and division, a few ulp each, times values up to 5."""


def parts(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0):
    """Random outputs and log-sum-exps of two parts, lse spread over 40 orders of magnitude of weights."""
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(tokens, heads, dim, generator=generator).to(dtype).to(device) for _ in range(2)]
    lses = [(torch.randn(heads, tokens, generator=generator) * 10).to(device) for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


def expected(a, lse_a, b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, in fp64."""
    lse_a, lse_b = lse_a.double(), lse_b.double()
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).T[..., None] for x in (lse_a, lse_b))
    return a.double() * weight_a + b.double() * weight_b, lse


@pytest.mark.parametrize('tokens, heads, dim', [(1, 1, 64), (33, 3, 80), (70, 2, 128)])
@pytest.mark.parametrize('dtype, out_dtype', [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                              (torch.float16, torch.float16)], ids=str)
def test_merge(tokens, heads, dim, dtype, out_dtype, device):
    a, lse_a, b, lse_b = parts(tokens, heads, dim, dtype, device)
    oracle, lse = expected(a, lse_a, b, lse_b)
    out = torch.full((tokens, heads, dim), math.nan, dtype=out_dtype, device=device)
    before = a.clone()
    merge(a, lse_a, b, lse_b, out)
    tolerance = 1e-3 if out_dtype == torch.float16 else TOLERANCE
    torch.testing.assert_close(out.double(), oracle, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse_a.double(), lse, rtol=1e-6, atol=1e-5)
    assert torch.equal(a, before)


def test_in_place(device):
    a, lse_a, b, lse_b = parts(40, 2, 64, torch.float32, device)
    oracle, _ = expected(a, lse_a, b, lse_b)
    merge(a, lse_a, b, lse_b, a)
    torch.testing.assert_close(a.double(), oracle, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize('in_place', [True, False])
@pytest.mark.parametrize('empty', [-INF, INF])
def test_rows_without_keys(empty, in_place, device):
    """Either infinity means no key: no weight, whatever the output holds there, and no NaN where both are empty."""
    a, lse_a, b, lse_b = parts(40, 2, 64, torch.float32, device)
    oracle, lse = expected(a, lse_a, b, lse_b)
    only_a, only_b, neither = slice(0, 5), slice(5, 9), slice(30, 40)
    for out, out_lse, rows in ((b, lse_b, only_a), (a, lse_a, only_b), (a, lse_a, neither), (b, lse_b, neither)):
        out_lse[:, rows], out[rows] = empty, math.nan
    oracle[only_a], lse[:, only_a] = a[only_a].double(), lse_a[:, only_a].double()
    oracle[only_b], lse[:, only_b] = b[only_b].double(), lse_b[:, only_b].double()
    oracle[neither], lse[:, neither] = 0, -INF
    a[neither] = 0  # what FlashAttention writes for rows without keys
    out = a if in_place else torch.full_like(a, math.nan)
    merge(a, lse_a, b, lse_b, out)
    assert finite(out)
    torch.testing.assert_close(out.double(), oracle, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(lse_a.double(), lse, rtol=1e-6, atol=1e-5)


def test_extreme_statistics(device):
    """Far apart, far from zero: the larger one takes all, and exp never overflows."""
    a, lse_a, b, lse_b = parts(4, 1, 64, torch.float32, device)
    lse_a[0] = torch.tensor([1e38, -1e38, 1e4, -1e4])
    lse_b[0] = torch.tensor([-1e38, 1e38, 1e4, -1e4])
    out = torch.empty_like(a)
    merge(a, lse_a, b, lse_b, out)
    assert torch.equal(out[0], a[0]) and torch.equal(out[1], b[1])
    torch.testing.assert_close(out[2:], (a[2:] + b[2:]) / 2)


def test_nan_is_not_hidden(device):
    a, lse_a, b, lse_b = parts(2, 1, 64, torch.float32, device)
    lse_b[0, 0] = math.nan
    merge(a, lse_a, b, lse_b, a)
    assert a[0].isnan().all() and finite(a[1])


def test_strides(device):
    """Outputs inside wider tensors, log-sum-exps with padded rows."""
    a, lse_a, b, lse_b = parts(20, 3, 64, torch.float32, device)
    oracle, _ = expected(a, lse_a, b, lse_b)
    wide = [torch.full((20, 5, 96), 7.0, device=device) for _ in range(2)]
    wide[0][:, 1:4, :64] = a
    padded = torch.full((3, 32), math.nan, device=device)
    padded[:, :20] = lse_a
    merge(wide[0][:, 1:4, :64], padded[:, :20], b, lse_b, wide[1][:, 1:4, :64])
    torch.testing.assert_close(wide[1][:, 1:4, :64].double(), oracle, rtol=TOLERANCE, atol=TOLERANCE)
    wide[1][:, 1:4, :64] = 7.0
    assert (wide[1] == 7.0).all() and padded[:, 20:].isnan().all()


def test_many_merges_round_once(device):
    """fp32 in between: sixteen parts of bf16 come out as close as their own rounding allows."""
    generator = torch.Generator().manual_seed(1)
    outs = torch.randn(16, 64, 2, 64, generator=generator).to(torch.bfloat16).to(device)
    lses = torch.randn(16, 2, 64, generator=generator).to(device)
    weights = lses.double().softmax(0).transpose(1, 2)[..., None]
    running, running_lse = torch.empty(64, 2, 64, device=device), lses[0].clone()
    merge(outs[0], running_lse, outs[1], lses[1], running)
    for out, lse in zip(outs[2:], lses[2:], strict=True):
        merge(running, running_lse, out, lse, running)
    torch.testing.assert_close(running.double(), (outs.double() * weights).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running_lse.double(), lses.double().logsumexp(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('what, change', [
    ('part', lambda t: t.__setitem__(2, t[2][:3])), ('out', lambda t: t.__setitem__(4, t[4][..., ::2])),
    ('running_lse', lambda t: t.__setitem__(1, t[1].T)), ('part_lse', lambda t: t.__setitem__(3, t[3].double())),
])
def test_what_does_not_fit_is_refused(what, change, device):
    tensors = [*parts(4, 2, 64, torch.float32, device), torch.empty(4, 2, 64, device=device)]
    change(tensors)
    with pytest.raises(ValueError, match=f'^{what} must be'):
        merge(*tensors)
