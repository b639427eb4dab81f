"""Matrices that rows are multiplied with before they are quantized, and what undoes them."""
import math

import pytest
import torch

from lmdeploy_kvq import transforms
from lmdeploy_kvq.transforms import (
    KINDS,
    MAX_CONDITION,
    Transform,
    TransformError,
    block_size,
    calibrated,
    digest_of,
    from_matrix,
    hadamard,
)

DIMS = (16, 32, 40, 64, 72, 80, 96, 128, 192, 256)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def well_conditioned(heads: int, dim: int, spread: float = 10.0, seed: int = 0) -> torch.Tensor:
    """fp64 matrices with singular values from 1 to ``spread``."""
    left, right = (torch.linalg.qr(normal(heads, dim, dim, seed=seed + i).double())[0] for i in (0, 1))
    return left * torch.logspace(0, math.log10(spread), dim, dtype=torch.float64) @ right


@pytest.mark.parametrize('dim', DIMS)
def test_hadamard_is_exact(dim):
    """Powers of two: the inverse undoes it without any rounding, and it is orthogonal up to one factor."""
    transform = hadamard(dim)
    forward, inverse = transform.forward_t[0].mT.double(), transform.inverse[0].double()
    assert torch.equal(forward @ inverse, torch.eye(dim, dtype=torch.float64))
    gram = forward @ forward.mT
    assert torch.equal(gram, gram[0, 0] * torch.eye(dim, dtype=torch.float64)) and gram[0, 0] in (1.0, 0.5)
    nonzero = forward[forward != 0].abs()
    assert (torch.frexp(nonzero)[0] == 0.5).all()
    assert transform.dim == dim and transform.stride_h == 0
    assert transform.forward_t.is_contiguous() and transform.inverse.is_contiguous()


@pytest.mark.parametrize('dim, block', [(40, 8), (72, 8), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256)])
def test_hadamard_is_block_diagonal_where_the_size_is_no_power_of_two(dim, block):
    assert block_size(dim) == block
    mixed = hadamard(dim).forward_t[0] != 0
    same = torch.arange(dim)[:, None] // block == torch.arange(dim) // block
    assert torch.equal(mixed, same)


def test_hadamard_spreads_an_outlier():
    row = torch.zeros(1, 1, 128)
    row[..., 17] = 100.0
    assert hadamard(128).store(row).abs().unique().numel() == 1


@pytest.mark.parametrize('dim', DIMS)
def test_store_and_restore(dim):
    rows = normal(7, 3, dim) * torch.logspace(-20, 4, 7)[:, None, None]
    transform = hadamard(dim)
    back = transform.restore(transform.store(rows))
    assert ((back - rows).norm(dim=-1) <= 1e-3 * rows.norm(dim=-1)).all()  # rows pass in fp16
    exact = torch.randint(-1000, 1001, (7, 3, dim), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(transform.restore(transform.store(exact)), exact)


@pytest.mark.parametrize('heads', [1, 2, 4])
@pytest.mark.parametrize('calibrated', [False, True])
def test_scores_are_unchanged(heads, calibrated):
    """Stored keys meet transformed queries as keys met queries; query heads follow their KV head."""
    dim, group = 64, 3
    transform = from_matrix(well_conditioned(heads, dim)) if calibrated else hadamard(dim)
    key, query = normal(50, heads, dim), normal(20, heads * group, dim, seed=1)
    scores = torch.einsum('qhd,khd->hqk', transform.query(query), transform.store(key).repeat_interleave(group, 1))
    expected = torch.einsum('qhd,khd->hqk', query, key.repeat_interleave(group, 1))
    assert (scores - expected).norm() / expected.norm() < 5e-3


def test_zeros_and_what_is_not_finite():
    transform = hadamard(64)
    assert not transform.store(torch.zeros(2, 1, 64)).any()
    rows = normal(3, 2, 64)
    rows[1, 0, 5] = math.nan
    stored = transform.store(rows)
    assert stored[1, 0].isnan().all()
    stored[1, 0] = 0
    assert stored.isfinite().all()


@pytest.mark.parametrize('heads', [1, 3])
def test_from_matrix_keeps_the_map(heads):
    matrix = well_conditioned(heads, 96)
    transform = from_matrix(matrix * 1e-3)
    assert transform.forward_t.shape == transform.inverse.shape == (heads, 96, 96)
    assert transform.forward_t.dtype == transform.inverse.dtype == torch.float16
    forward = transform.forward_t.mT.double()
    ratio = (forward.flatten(1) * matrix.flatten(1)).sum(1) / matrix.flatten(1).square().sum(1)
    torch.testing.assert_close(forward, matrix * ratio[:, None, None], rtol=0, atol=2e-3)
    assert transform.stride_h == (0 if heads == 1 else 96 * 96)
    for head in range(heads):
        one = transform.head(head)
        assert torch.equal(one.inverse[0], transform.inverse[head]) and one.inverse.size(0) == 1


def singular():
    matrix = well_conditioned(2, 16)
    matrix[1, 3] = 0
    return matrix


def with_value(value):
    matrix = well_conditioned(2, 16)
    matrix[0, 1, 2] = value
    return matrix


@pytest.mark.parametrize('matrix, words', [
    (torch.eye(16), 'kv_heads, head_dim, head_dim'),
    (torch.zeros(2, 16, 8), 'kv_heads, head_dim, head_dim'),
    (with_value(math.nan), 'not finite'),
    (with_value(-math.inf), 'not finite'),
    (singular(), 'KV head 1 has condition number'),
    (well_conditioned(1, 16, 10 * MAX_CONDITION), 'condition number'),
    (well_conditioned(1, 64, 0.9 * MAX_CONDITION), 'off the identity'),
], ids=['two axes', 'not square', 'nan', 'inf', 'singular', 'condition', 'fp16 inverse'])
def test_matrices_that_cannot_be_used(matrix, words):
    with pytest.raises(TransformError, match=words) as caught:
        from_matrix(matrix, 'layer 3: k_transform')
    assert 'layer 3: k_transform' in str(caught.value)


def test_digest_tells_transforms_apart():
    matrix = well_conditioned(2, 16)
    first = from_matrix(matrix)
    assert first.digest() == from_matrix(matrix.clone()).digest() == from_matrix(2 * matrix).digest()
    assert first.digest() != from_matrix(matrix.flip(0)).digest() != hadamard(16).digest()


def test_matrices_are_made_once_per_device():
    assert hadamard(64, 'cpu') is hadamard(64, 'cpu')
    assert isinstance(hadamard(64).to('cpu'), Transform)
    assert transforms.MAX_DEFECT < 0.1


def statistics(dim: int, seed: int = 0):
    """Rows of keys with outlying elements and a mean, and queries that dislike them: samples, moments and mean."""
    mix = well_conditioned(2, dim, 3.0, seed)
    sizes = torch.logspace(1.0, -1.0, dim, dtype=torch.float64)
    key = normal(4000, 2, dim, seed=seed + 5).double() * sizes + 5 * (torch.arange(dim) == 7)
    query = torch.einsum('thi,hij->thj', normal(4000, 2, dim, seed=seed + 6).double() * sizes.flip(0), mix)
    moments = [torch.einsum('thi,thj->hij', x, x) / len(x) for x in (key, query)]
    return key, query, (*moments, key.mean(0))


@pytest.mark.parametrize('dim', [16, 64, 80, 96])
def test_balanced_gives_keys_and_queries_the_same_moment(dim):
    """A A^T is the geometric mean: A^T Sk A = A^-1 Sq A^-T. And the elements of stored keys are alike."""
    sk, sq, mean = statistics(dim)[2]
    a = calibrated('balanced', sk, sq, mean)
    inverse = torch.linalg.inv(a)
    keys, queries = a.mT @ sk @ a, inverse @ sq @ inverse.mT
    assert ((keys - queries).norm(dim=(1, 2)) <= 0.1 * keys.norm(dim=(1, 2))).all()  # but for the ridges
    spread = (keys - a.mT @ (mean[:, :, None] * mean[:, None]) @ a).diagonal(dim1=1, dim2=2)
    assert (spread.amax(1) <= (1.05 if block_size(dim) == dim else 3) * spread.amin(1)).all()
    from_matrix(a)


@pytest.mark.parametrize('dim', [64, 96])
def test_diagonal_is_one_factor_per_element_and_hadamard(dim):
    sk, sq, mean = statistics(dim)[2]
    a = calibrated('diagonal', sk, sq, mean)
    mix = hadamard(dim).forward_t[0].mT.double()
    scaled = a @ torch.linalg.inv(mix / mix[0].norm())
    diagonal = torch.diag_embed(scaled.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(scaled, diagonal, rtol=0, atol=1e-9)
    squares = [m.diagonal(dim1=1, dim2=2) for m in (sq, sk)]
    squares = [m + 1e-3 * m.mean(-1, keepdim=True) for m in squares]  # the ridge
    expected = (squares[0] / squares[1]) ** 0.25
    torch.testing.assert_close(diagonal.diagonal(dim1=1, dim2=2), expected, rtol=1e-9, atol=0)
    from_matrix(a)


def test_calibration_keeps_scores():
    """What it is for: less error of scores after int4 and int2 than Hadamard alone, on other samples of the same."""
    import lmdeploy_kvq as kvq
    from lmdeploy_kvq import reference
    moments = statistics(64)[2]
    key, query, _ = statistics(64)
    key, query = key[2000:2400], query[2400:2600]
    exact = torch.einsum('qhd,khd->hqk', query, key)
    for fmt in kvq.FORMATS:
        if not fmt.takes_transform:
            continue
        errors = {}
        for kind in ('hadamard', *KINDS):
            transform = hadamard(64) if kind == 'hadamard' else from_matrix(calibrated(kind, *moments))
            codes, scale = reference.encode(key, fmt.key, None, transform)
            decoded = reference.decode(codes, fmt.key, scale, transform).double()
            errors[kind] = float((torch.einsum('qhd,khd->hqk', query, decoded) - exact).norm() / exact.norm())
        assert errors['balanced'] < 0.7 * errors['hadamard'] and errors['diagonal'] < 0.8 * errors['hadamard'], errors


@pytest.mark.parametrize('kind', KINDS)
def test_heads_are_independent_and_rarely_seen_directions_are_bounded(kind):
    sk, sq, mean = statistics(32)[2]
    both = calibrated(kind, sk, sq, mean)
    one = calibrated(kind, sk[1:], sq[1:], mean[1:])
    from_matrix(both)
    assert torch.equal(from_matrix(one).forward_t[0], from_matrix(both).forward_t[1])
    few = torch.zeros(1, 32, 32)
    few[0, 3, 3] = 4.0  # one direction is all that was seen
    from_matrix(calibrated(kind, few, few, torch.zeros(1, 32)))


def test_statistics_without_a_transform():
    sk, sq, mean = statistics(16)[2]
    for broken in (torch.zeros_like(sk), sk * math.nan, -sk):
        with pytest.raises(TransformError, match='moments of keys'):
            calibrated('balanced', broken, sq, mean)
        with pytest.raises(TransformError, match='moments of queries'):
            calibrated('diagonal', sk, broken, mean)
    with pytest.raises(TransformError, match='unknown kind'):
        calibrated('upright', sk, sq, mean)


def test_digest_of_a_model_knows_layers_and_values():
    a, b = well_conditioned(2, 16).float(), well_conditioned(2, 16, seed=3).float()
    assert digest_of({0: a, 1: b}) == digest_of({1: b, 0: a.clone()})
    assert len({digest_of({0: a, 1: b}), digest_of({0: b, 1: a}), digest_of({0: a}), digest_of({0: a, 1: a})}) == 4
