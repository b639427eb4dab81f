"""Faults without a GPU: damaged scale files and model folders, processes killed while they write."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import python
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_cache_descs import model_config

import lmdeploy_kvq as kvq
from lmdeploy_kvq import cli
from lmdeploy_kvq.backends.config import run_with_backend
from lmdeploy_kvq.backends.loading import check_file
from lmdeploy_kvq.console import UserError, replacing
from lmdeploy_kvq.evaluation.report import write_json
from lmdeploy_kvq.scales import ScaleError, read_file, write_file
from lmdeploy_kvq.transforms import digest_of, hadamard

pytest.importorskip('transformers', minversion='5')
from test_calibrate import folder as small_model  # noqa: F401  a fixture: a small Llama with a tokenizer
from test_calibrate import llama

STATIC = next(fmt for fmt in kvq.FORMATS if fmt.needs_scales)
ROTATED = next(fmt for fmt in kvq.FORMATS if fmt.takes_transform)
LAYERS, HEADS, DIM = 3, 4, 16


def scales_of(seed: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """K and V scales of a small model's layers, one per KV head."""
    generator = torch.Generator().manual_seed(seed)
    return {n: tuple(torch.rand(2, HEADS, generator=generator) + 0.01) for n in range(LAYERS)}


def write_scales(path: Path, extra: int = 0) -> Path:
    """A file as calibration writes it: scales, transforms, and ``extra`` values of statistics per layer."""
    matrix = hadamard(DIM).forward_t[0].float().mT.expand(HEADS, DIM, DIM).contiguous()
    kept = {n: {'k_transform': matrix, 'k_mean': torch.zeros(extra)} for n in range(LAYERS)}
    write_file(path, scales_of(0), {'format': STATIC.name, 'method': 'absmax',
                                    'transform_digest': digest_of(dict.fromkeys(range(LAYERS), matrix))}, kept)
    return path


@pytest.fixture(scope='module')
def scale_file(tmp_path_factory) -> Path:
    return write_scales(tmp_path_factory.mktemp('scales') / 'kv_scales.safetensors')


def engine_checks(path: Path) -> None:
    """What an engine does with a scale file before it loads a model; for static scales, then for transforms."""
    config = model_config(HEADS, DIM)
    config.hf_config = SimpleNamespace(name_or_path='', architectures=['LlamaForCausalLM'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LMDEPLOY_KVQ_SCALES', str(path))
        for fmt in (STATIC, ROTATED):
            check_file(config, fmt.policy)


def sentence(path: Path) -> str | None:
    """The refusal of a damaged file, one line that names it; None if it is used. Other errors are not caught."""
    try:
        engine_checks(path)
    except ScaleError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return str(error)
    return None


@pytest.mark.covers('fault.scale_file')
def test_a_file_cut_short_anywhere_is_refused(scale_file, tmp_path):
    """Every length: inside the header's length, the header, between header and data, inside the data."""
    whole = scale_file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    assert sentence(scale_file) is None and 8 < header < len(whole)
    path = tmp_path / 'cut.safetensors'
    lengths = [*range(9), *range(9, header, 7), *range(header - 1, header + 2), *range(header + 2, len(whole), 127),
               *range(len(whole) - 16, len(whole))]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert sentence(path), f'{length} of {len(whole)} bytes are accepted'
    path.write_bytes(whole + b'\0')
    assert sentence(path)


@pytest.mark.covers('fault.scale_file')
@pytest.mark.parametrize('key', ['scale_digest', 'transform_digest'])
def test_a_digest_that_cannot_be_printed_is(scale_file, tmp_path, key):
    """A changed byte can make it a form feed, which ends a line of a terminal."""
    with safe_open(scale_file, framework='pt') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), key: 'abc\x0c\n123'}
    path = tmp_path / 'unprintable.safetensors'
    save_file(tensors, path, metadata=metadata)
    assert repr('abc\x0c\n123') in sentence(path)


@pytest.mark.covers('fault.scale_file')
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_changed_byte_is_refused_or_changes_no_scale(scale_file, data):
    """The digests see what safetensors does not."""
    content = bytearray(scale_file.read_bytes())
    header = 8 + int.from_bytes(content[:8], 'little')
    position = data.draw(st.one_of(st.integers(0, header), st.integers(header, len(content) - 1)))
    content[position] ^= data.draw(st.integers(1, 255))
    path = scale_file.with_name('changed.safetensors')
    path.write_bytes(content)
    if sentence(path) is None and b'_digest' in content:
        found, before = read_file(path), read_file(scale_file)
        if {'scale_digest', 'transform_digest'} <= found.metadata.keys():
            assert found.layers.keys() == before.layers.keys()
            for n, scales in before.layers.items():
                assert torch.equal(found.layers[n].k, scales.k) and torch.equal(found.layers[n].v, scales.v)
                assert torch.equal(found.transforms[n], before.transforms[n])


@pytest.mark.covers('fault.scale_file')
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6))
def test_garbage_in_a_file_is_never_a_traceback(scale_file, pieces):
    content = bytearray(scale_file.read_bytes())
    for position, piece in pieces:
        start = position % len(content)
        content[start:start + len(piece)] = piece
    path = scale_file.with_name('garbage.safetensors')
    path.write_bytes(content)
    sentence(path)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(['0', '1', 'kv_cache', 'scaling_factor', 'dtype', 'x']), inner, max_size=3),
                      max_leaves=12)
TABLES = st.fixed_dictionaries({'kv_cache': st.fixed_dictionaries({'scaling_factor': VALUES})})


@pytest.mark.covers('fault.scale_file')
@settings(max_examples=60, deadline=None)
@given(st.one_of(VALUES, TABLES))
def test_any_json_is_scales_or_a_sentence(scale_file, content):
    path = scale_file.with_name('scales.json')
    path.write_text(json.dumps(content))
    sentence(path)


@pytest.fixture
def damaged(scale_file, tmp_path) -> dict[str, Path]:
    """Scale files that are none."""
    found = {name: tmp_path / name for name in ('cut.safetensors', 'deep.json', 'folder.safetensors', 'none.json')}
    found['cut.safetensors'].write_bytes(scale_file.read_bytes()[:-7])
    found['deep.json'].write_bytes(b'[' * 10**6)
    found['folder.safetensors'].mkdir()
    return found


@pytest.mark.covers('fault.scale_file')
@pytest.mark.parametrize('name', ['cut.safetensors', 'deep.json', 'folder.safetensors', 'none.json'])
@pytest.mark.parametrize('fmt', [STATIC, ROTATED], ids=lambda fmt: fmt.name)
def test_commands_end_before_a_worker_is_started(damaged, monkeypatch, name, fmt):
    monkeypatch.setenv('LMDEPLOY_KVQ_SCALES', '')  # the command sets it for its workers
    args = SimpleNamespace(quant_policy=fmt.policy, backend='pytorch', kv_scales=str(damaged[name]), model_path='M')
    with pytest.raises(SystemExit) as stop:
        run_with_backend(lambda args: pytest.fail('the server was started'), args)
    assert stop.value.code.startswith('lmdeploy: error: scale file ') and name in stop.value.code
    assert len(stop.value.code.splitlines()) == 1


@pytest.mark.covers('fault.scale_file')
def test_the_server_ends_in_a_sentence(damaged, tmp_path):
    """``lmdeploy serve api_server``, unedited: exit code 1 and one line. A file beside the model is found by itself."""
    tmp_path.joinpath('config.json').write_text('{}')
    shutil.copy(damaged['cut.safetensors'], tmp_path / 'kv_scales.safetensors')
    run = 'from lmdeploy.cli.entrypoint import run\nrun()'
    done = python(run, 'serve', 'api_server', str(tmp_path), '--quant-policy', STATIC.name, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and done.stdout == ''
    assert done.stderr.count('lmdeploy: error: scale file') == 1 and 'kv_scales.safetensors' in done.stderr


# ---- files that are being written


def _write_forever(path: str) -> None:
    torch.set_num_threads(1)  # a forked process has none of the threads that OpenMP would wait for
    n = 0
    while True:
        write_file(path, scales_of(n % 2), {'format': STATIC.name, 'n': str(n % 2)},
                   {layer: {'k_mean': torch.full((400_000, ), float(n))} for layer in range(LAYERS)})
        n += 1


def _write_json_forever(path: str) -> None:
    while True:
        write_json(Path(path), {'rows': list(range(200_000))})


@pytest.mark.parametrize('write', [_write_forever, _write_json_forever])
def test_a_killed_writer_leaves_the_old_file_whole(tmp_path, write):
    """SIGKILL while files of megabytes are written over and over: what is there can be read, each time."""
    path, unfinished = tmp_path / ('x.safetensors' if write is _write_forever else 'x.json'), 0
    for kill in range(6):
        writer = multiprocessing.get_context('fork').Process(target=write, args=(str(path), ))
        writer.start()
        deadline = time.monotonic() + 20
        while not (path.exists() and list(tmp_path.glob('.*.part*'))) and time.monotonic() < deadline:
            pass
        time.sleep(0.001 * kill)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
        if path.suffix == '.json':
            assert json.loads(path.read_text())['rows'][-1] == 199_999
        else:
            found = read_file(path)
            assert {n: [x.tolist() for x in pair] for n, pair in scales_of(int(found.metadata['n'])).items()} == \
                {n: [layer.k.tolist(), layer.v.tolist()] for n, layer in found.layers.items()}
        left = [file for file in tmp_path.iterdir() if file != path]
        unfinished += len(left)
        for file in left:
            file.unlink()
    assert unfinished, 'no writer was killed in the middle of a file: the test shows nothing'


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    """The old file stays, with its mode; a link stays a link; what is no file is written to directly."""
    path = tmp_path / 'file.json'
    path.write_text('old')
    path.chmod(0o640)
    link = tmp_path / 'link.json'
    link.symlink_to(path)
    with pytest.raises(RuntimeError), replacing(path) as unfinished:
        unfinished.write_text('new')
        raise RuntimeError('disk full')
    assert sorted(tmp_path.iterdir()) == [path, link] and path.read_text() == 'old'
    with replacing(link) as unfinished:
        assert unfinished.suffix == '.json' and unfinished.parent == tmp_path
        unfinished.write_text('new')
    assert path.read_text() == 'new' and path.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    with replacing(tmp_path / 'fresh') as unfinished:
        unfinished.write_text('x')
    assert (tmp_path / 'fresh').stat().st_mode == tmp_path.joinpath('fresh').stat().st_mode
    with replacing(Path('/dev/null')) as unfinished:
        assert unfinished == Path('/dev/null')
    assert not list(tmp_path.glob('.*'))


def test_a_folder_that_takes_no_files(tmp_path):
    with pytest.raises(UserError, match='is not written'):
        write_json(tmp_path / 'nowhere' / 'x.json', {})


# ---- model folders


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _second_shard(folder: Path) -> Path:
    return sorted(folder.glob('model-*.safetensors'))[1]


ALL = {'plan', 'doctor', 'calibrate', 'eval'}
DAMAGE = {  # name: what is done to a folder with ten shards, and the commands that read what is missing
    'no config': (lambda f: (f / 'config.json').unlink(), ALL),
    'config cut short': (lambda f: _cut(f / 'config.json', 20), ALL),
    'config of bytes': (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\0{'), ALL),
    'config a list': (lambda f: (f / 'config.json').write_text('[]'), ALL),
    'config empty': (lambda f: (f / 'config.json').write_text('{}'), ALL),
    'no tokenizer': (lambda f: [p.unlink() for p in f.glob('tok*')], {'calibrate', 'eval'}),
    'tokenizer cut short': (lambda f: _cut(f / 'tokenizer.json', 500), {'calibrate', 'eval'}),
    'no weights': (lambda f: [p.unlink() for p in f.glob('model*')], {'doctor', 'calibrate', 'eval'}),
    'a shard missing': (lambda f: _second_shard(f).unlink(), ALL),
    'a shard cut short': (lambda f: _cut(_second_shard(f), 900), {'doctor', 'calibrate', 'eval'}),
    'a shard empty': (lambda f: _cut(_second_shard(f), 0), {'doctor', 'calibrate', 'eval'}),
    'no index': (lambda f: (f / 'model.safetensors.index.json').unlink(), {'doctor', 'calibrate', 'eval'}),
}
SMALL = ('--engine', 'transformers', '--tokens', '64', '--length', '32', '--new-tokens', '2')


@pytest.fixture(scope='module')
def sharded(small_model, tmp_path_factory) -> Path:  # noqa: F811
    """A small model in ten shards."""
    path = tmp_path_factory.mktemp('sharded') / 'model'
    llama(architectures=['LlamaForCausalLM']).save_pretrained(path, max_shard_size='60KB')
    for file in small_model.glob('tok*'):
        shutil.copy(file, path)
    return path


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    return {'plan': ['plan', str(folder), '--gpu-memory', '80G'],
            'doctor': ['doctor', '--model', str(folder), '--quant-policy', STATIC.name],
            'calibrate': ['calibrate', str(folder), '-o', str(out / 'x.safetensors'), *SMALL],
            'eval': ['eval', str(folder), '--needles', '0', '--json', str(out / 'x.json'), *SMALL]}


@pytest.mark.covers('fault.model_folder')
@pytest.mark.parametrize('damage', [None, *DAMAGE], ids=lambda name: name or 'whole')
def test_model_folders_with_files_missing(sharded, tmp_path, capsys, damage):
    """Each command that needs the file says which folder or file it is, in one sentence, and writes nothing."""
    broken, out = tmp_path / 'broken', tmp_path / 'out'
    shutil.copytree(sharded, broken)
    do, affected = DAMAGE.get(damage, (lambda f: None, set()))
    do(broken)
    for name, argv in commands(broken, out).items():
        out.mkdir()
        code = cli.main(argv)
        printed, errors = capsys.readouterr()
        if name not in affected:
            assert code == 0 or name == 'doctor' and 'use 1.0' in printed, f'{name}: {code}\n{errors}'
        elif name == 'doctor' and code == 1:  # a problem of its report, wrapped
            assert 'missing or damaged' in ' '.join(printed.split()) and str(broken) in ''.join(printed.split())
        else:
            message = errors[errors.index('lmdeploy-kvq: error: '):]
            assert code == 2 and str(broken) in message and len(message.strip().splitlines()) == 1, errors
        assert not list(out.iterdir()) or name not in affected
        shutil.rmtree(out)
