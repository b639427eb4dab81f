"""Transforms of K from a scale file to LMDeploy's attention layers, through its own models and on the command line."""
import dataclasses
import math

import pytest
import torch
from test_loading import load, write_model

from lmdeploy_kvq import FORMATS, modelcheck
from lmdeploy_kvq._autoload import CALIBRATE
from lmdeploy_kvq.backends import audit
from lmdeploy_kvq.backends.attention import TRANSFORM
from lmdeploy_kvq.backends.loading import (
    PENDING,
    SCALES,
    attention_layers,
    check_file,
    kv_heads,
    model_scales,
    settle,
)
from lmdeploy_kvq.calibrate import CALIBRATED
from lmdeploy_kvq.console import UserError
from lmdeploy_kvq.scales import FILE_NAME, ScaleError, read_file, shard, validate_transforms, write_file
from lmdeploy_kvq.transforms import digest_of, from_matrix, hadamard

TAKING = [fmt for fmt in FORMATS if fmt.takes_transform]
HEADS, DIM = 2, 16


def matrices(seed: int = 0, heads: int = HEADS, dim: int = DIM) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


def write(path, transforms, scales=None, **metadata):
    write_file(path, scales or {}, {'format': TAKING[0].name, **metadata},
               {n: {'k_transform': matrix} for n, matrix in transforms.items()})
    return path


BOTH = {n: matrices(n) for n in range(2)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(SCALES, '')
    write_model(tmp_path, 'Llama')
    return tmp_path


def test_a_file_keeps_matrices_beside_or_without_scales(tmp_path):
    path = write(tmp_path / 'x.safetensors', BOTH, {n: (torch.ones(()), torch.ones(())) for n in range(2)})
    file = read_file(path)
    assert sorted(file.layers) == sorted(file.transforms) == [0, 1]
    assert all(torch.equal(file.transforms[n], BOTH[n]) for n in BOTH)
    assert read_file(write(tmp_path / 'y.safetensors', BOTH)).layers == {}
    validate_transforms(file, range(2), HEADS, DIM)


def broken(change):
    matrix = matrices(1)
    change(matrix)
    return {0: matrices(0), 1: matrix}


@pytest.mark.parametrize('transforms, words', [
    ({0: matrices(0)}, 'no transform for layer 1'),
    ({n: matrices(n) for n in range(3)}, 'transforms for unknown layer 2'),
    ({0: matrices(0), 1: matrices(1, heads=1)}, r'layer 1: k_transform has shape \(1, 16, 16\); .* \(2, 16, 16\)'),
    ({0: matrices(0, dim=8), 1: matrices(1)}, 'layer 0: k_transform has shape'),
    (broken(lambda m: m[0, 0].fill_(math.nan)), 'layer 1: k_transform has values that are not finite'),
    (broken(lambda m: m[1, 3].fill_(0.0)), 'layer 1: k_transform: the matrix of KV head 1 has condition number'),
], ids=['missing', 'extra', 'heads', 'size', 'nan', 'singular'])
def test_files_are_refused_before_loading(folder, transforms, words):
    config = audit.build_empty(str(folder))[1]
    write(folder / FILE_NAME, transforms)
    for fmt in TAKING:
        with pytest.raises(ScaleError, match=words):
            check_file(config, fmt.policy)
    for fmt in FORMATS:
        if fmt.per_token_head and not fmt.takes_transform:
            check_file(config, fmt.policy)  # takes nothing from the file


def test_matrices_that_changed_since_calibration_are_refused(folder):
    path = write(folder / FILE_NAME, BOTH, transform='balanced', transform_digest=digest_of({0: BOTH[1], 1: BOTH[0]}))
    with pytest.raises(ScaleError, match='are not those that calibration wrote'):
        validate_transforms(read_file(path), range(2), HEADS, DIM)


@pytest.mark.parametrize('fmt', TAKING, ids=lambda fmt: fmt.name)
def test_layers_get_their_matrices(folder, fmt):
    model = load(folder)
    layers = list(attention_layers(model).values())
    rows = settle(model, fmt.policy, str(folder), HEADS)
    assert [row[1:] for row in rows] == [('hadamard', 'hadamard', 'default')] * 2
    assert all(getattr(layer.impl, TRANSFORM, None) is None for layer in layers)
    assert model_scales(model).transforms == 'hadamard'
    write(folder / FILE_NAME, BOTH, transform='diagonal', transform_digest=digest_of(BOTH))
    rows = settle(model, fmt.policy, str(folder), HEADS)
    assert [row[1:] for row in rows] == [('diagonal', 'hadamard', 'calibrated')] * 2
    for n, layer in enumerate(layers):
        expected = from_matrix(BOTH[n])
        for name in ('forward_t', 'inverse'):
            assert torch.equal(getattr(getattr(layer.impl, TRANSFORM), name), getattr(expected, name))
    assert model_scales(model).transforms == digest_of(BOTH)
    (folder / FILE_NAME).unlink()
    settle(model, fmt.policy, str(folder), HEADS)
    assert not any(hasattr(layer.impl, TRANSFORM) for layer in layers), 'a rebuilt model starts afresh'


def test_the_layers_transform_is_what_the_pages_use(folder):
    """From the file to the cache that the attention call builds."""
    from lmdeploy_kvq.backends.attention import page_views
    from lmdeploy_kvq.paged import PagedCache
    write(folder / FILE_NAME, BOTH)
    model, fmt = load(folder), TAKING[0]
    settle(model, fmt.policy, str(folder), HEADS)
    impl = next(iter(attention_layers(model).values())).impl
    pages = PagedCache.allocate(fmt, 2, 16, HEADS, DIM, device='cpu')
    views = page_views(fmt, pages.k_codes, pages.v_codes, DIM, DIM, pages.k_scales, pages.v_scales,
                       getattr(impl, TRANSFORM))
    assert torch.equal(views.k_transform.inverse, from_matrix(BOTH[0]).inverse)
    assert views.v_transform is hadamard(DIM, views.v_codes.device)


@pytest.mark.parametrize('heads, rank, world, expected', [
    (4, 0, 2, [0, 1]), (4, 1, 2, [2, 3]), (4, 3, 4, [3]), (2, 0, 4, [0]), (2, 1, 4, [0]), (2, 3, 4, [1]),
])
def test_ranks_get_their_heads(heads, rank, world, expected):
    all_heads = matrices(heads=heads)
    assert torch.equal(shard(all_heads, heads, rank, world), all_heads[expected])


def test_more_ranks_than_heads(folder):
    """LMDeploy then counts every rank's copy of a head; the file has the model's own."""
    config = dataclasses.replace(audit.build_empty(str(folder))[1], num_key_value_heads=4,
                                 num_replicate_key_value_heads=2)
    write(folder / FILE_NAME, BOTH, {n: (torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0])) for n in range(2)})
    for fmt in CALIBRATED:
        check_file(config, fmt.policy)
    assert kv_heads(config) == HEADS
    for rank in range(4):
        model = load(folder)
        settle(model, TAKING[0].policy, str(folder), kv_heads(config), rank, 4)
        impl = next(iter(attention_layers(model).values())).impl
        assert torch.equal(getattr(impl, TRANSFORM).inverse, from_matrix(BOTH[0][rank // 2:rank // 2 + 1]).inverse)


def test_every_rank_knows_the_same_identity(folder):
    write(folder / FILE_NAME, BOTH)
    found = []
    for rank in range(2):
        model = load(folder)
        settle(model, TAKING[0].policy, str(folder), HEADS, rank, 2)
        layer = next(iter(attention_layers(model).values()))
        assert torch.equal(getattr(layer.impl, TRANSFORM).inverse, from_matrix(BOTH[0][rank:rank + 1]).inverse)
        found.append(model_scales(model).transforms)
    assert found[0] == found[1] == digest_of(BOTH)


def test_which_file_is_meant(folder, monkeypatch):
    """A file beside the model that is for other formats is left alone; one that the user named has to fit."""
    model = load(folder)
    fp8 = next(fmt for fmt in FORMATS if fmt.needs_scales)
    write_file(folder / FILE_NAME, {n: (torch.ones(()), torch.ones(())) for n in range(2)}, {})
    assert settle(model, TAKING[0].policy, str(folder), HEADS)[0][3] == 'default'
    monkeypatch.setenv(SCALES, str(folder / FILE_NAME))
    with pytest.raises(ScaleError, match=r'has no transforms .* --transform balanced'):
        settle(model, TAKING[0].policy, str(folder), HEADS)
    write(folder / FILE_NAME, BOTH)
    with pytest.raises(ScaleError, match=f'has no scales, which {fp8.name} would'):
        settle(model, fp8.policy, str(folder), HEADS)
    monkeypatch.setenv(SCALES, '')
    assert settle(model, fp8.policy, str(folder), HEADS)[0][3] == 'default'
    monkeypatch.setenv(SCALES, 'strict')
    assert settle(model, TAKING[0].policy, str(folder), HEADS)[0][3] == 'file'
    (folder / FILE_NAME).unlink()
    with pytest.raises(ScaleError, match='strict: no transforms'):
        settle(model, TAKING[0].policy, str(folder), HEADS)
    for fmt in FORMATS:
        if fmt.per_token_head and not fmt.takes_transform:
            assert settle(model, fmt.policy, str(folder), HEADS) == []


def test_calibration_while_serving_replaces_no_transforms(folder, monkeypatch):
    """A file of transforms beside the model has no scales, and is not overwritten with some."""
    fp8, model = next(fmt for fmt in FORMATS if fmt.needs_scales), load(folder)
    write(folder / FILE_NAME, BOTH)
    monkeypatch.setenv(CALIBRATE, '64')
    for check in (lambda: check_file(audit.build_empty(str(folder))[1], fp8.policy),
                  lambda: settle(model, fp8.policy, str(folder), HEADS)):
        with pytest.raises(ScaleError, match='would be replaced; name another file to write with --kv-scales PATH'):
            check()
    monkeypatch.setenv(SCALES, str(folder / 'other.safetensors'))
    assert settle(model, fp8.policy, str(folder), HEADS)[0][3] == PENDING


def test_doctor_says_where_transforms_come_from(folder):
    write(folder / FILE_NAME, BOTH, transform='balanced')
    for fmt in TAKING:
        report = modelcheck.check_model(str(folder), fmt.name)
        assert report['problems'] == []
        assert [row['k_transform'] for row in report['layers']] == ['balanced'] * 2
        text = modelcheck.render_model(report)
        assert 'k_transform' in text and 'calibrated' in text and text.endswith('OK')
    for fmt in FORMATS:
        if fmt not in CALIBRATED:
            with pytest.raises(UserError, match='computes its scales as tokens are written'):
                modelcheck.audit(str(folder), fmt.name)
