"""Find the static scales of a model's KV cache, or transforms of its keys, by running it on text.

Prompts and the tokens generated after them are counted. On a GPU LMDeploy's engine runs the model with a bf16 cache,
elsewhere transformers does. They are written into a scale file, with second moments of Q and K. Ctrl-C writes what has
been seen so far.

examples:
  lmdeploy-kvq calibrate MODEL -o MODEL/kv_scales.safetensors      found there by itself
  lmdeploy-kvq calibrate MODEL --format int4_per_token_head        transforms of keys instead of scales
  cat texts/*.txt | lmdeploy-kvq calibrate MODEL --data -
"""
from __future__ import annotations

# torch and LMDeploy are imported late: --help is fast.
import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .console import UserError, progress, writable
from .formats import FORMATS, get_format
from .texts import cut, model_folder, read_data, tokenize

if TYPE_CHECKING:
    import torch

    from .kvstats import ModelStatistics

FILE = 'kv_scales.safetensors'  # scales.FILE_NAME, without importing torch
STATIC = tuple(fmt for fmt in FORMATS if fmt.needs_scales)
"""The formats that need scales."""

CALIBRATED = tuple(fmt for fmt in FORMATS if fmt.needs_scales or fmt.takes_transform)
"""The formats that a scale file can do something for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lmdeploy-kvq calibrate``."""
    parser.add_argument('model', metavar='MODEL', help='folder, or name on the Hugging Face hub')
    parser.add_argument('--data', metavar='FILE|-', help='text to run, "-": standard input (default: built-in texts)')
    parser.add_argument('-o', '--out', type=Path, default=Path(FILE), metavar='FILE', help='default: %(default)s')
    parser.add_argument('--format', default=Settings.format, choices=[fmt.name for fmt in CALIBRATED],
                        help='format the file is for (default: %(default)s)')
    parser.add_argument('--transform', choices=('none', 'balanced', 'diagonal'), default=Settings.transform,
                        help='matrices for the keys of int4 and narrower formats: the best ones, or one factor per '
                        'element (default: balanced where the format takes them, else none)')
    parser.add_argument('--granularity', default=Settings.granularity, choices=('tensor', 'head'),
                        help='one scale per layer, or one per KV head (default: %(default)s)')
    parser.add_argument('--method', default=Settings.method, choices=('absmax', 'percentile', 'mse'),
                        help='largest value seen, a percentile of them, or least squared error (default: %(default)s)')
    parser.add_argument('--percentile', type=_percentile, default=Settings.percentile, metavar='P',
                        help='default: %(default)s')
    parser.add_argument('--tokens', type=_positive, default=Settings.tokens, metavar='N',
                        help='prompt tokens to run at most (default: %(default)s)')
    parser.add_argument('--length', type=_positive, default=Settings.length, metavar='N',
                        help='tokens of a prompt (default: %(default)s)')
    parser.add_argument('--new-tokens', type=_positive, default=Settings.new_tokens, metavar='N',
                        help='tokens to generate after each prompt (default: %(default)s)')
    parser.add_argument('--engine', default=Settings.engine, choices=('auto', 'lmdeploy', 'transformers'),
                        help='what runs the model (default: lmdeploy where there is a GPU)')


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
    return int(text)


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f'{text!r} is not above 0 and up to 100')
    return value


@dataclass(frozen=True)
class Settings:
    """How to calibrate; the names and defaults are the command's options."""
    format: str = STATIC[0].name
    transform: str | None = None
    granularity: str = 'tensor'
    method: str = 'absmax'
    percentile: float = 99.99
    tokens: int = 16384
    length: int = 512
    new_tokens: int = 32
    engine: str = 'auto'


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found and wrote.

    Attributes:
        path: the scale file. format: the format it is for.
        scales: layer index to (K scale, V scale), each fp32 [] or [kv_heads]; empty for formats without static scales.
        transform: the kind of K's transforms, ``none`` without. layers: how many were seen.
        tokens: how many were counted. partial: an interrupt came before all of the text was.
    """
    path: Path
    format: str
    scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    transform: str
    layers: int
    tokens: int
    partial: bool


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq calibrate``: returns 0, or 130 if interrupted; a partial file may have been written then."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    try:
        found = calibrate(args.model, args.out, args.data, settings)
    except KeyboardInterrupt:
        print('lmdeploy-kvq: interrupted before anything was seen; nothing is written', file=sys.stderr)
        return 130
    how = 'interrupted: ' if found.partial else ''
    what = ' and '.join([f'{found.format} scales'] * bool(found.scales) +
                        [f'{found.transform} transforms'] * (found.transform != 'none'))
    print(f'{found.path}: {how}{what} of {found.layers} layers from {found.tokens} tokens{_largest(found.scales)}.\n'
          f'Use it with --kv-scales {found.path}, or as {FILE} beside the model.')
    return 130 if found.partial else 0


def _largest(scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> str:
    if not scales:
        return ''
    k, v = (max(float(pair[i].max()) for pair in scales.values()) for i in (0, 1))
    return f'; the largest are {k:.4g} for K and {v:.4g} for V'


def calibrate(model: str, out: Path, data: str | None = None, settings: Settings | None = None) -> Calibration:
    """Run a model on text and write its scale file; a progress bar goes to stderr.

    Args:
        model: folder, or name on the hub.
        out: the file to write; what is there is replaced.
        data: a text file, ``-`` for standard input, None for the built-in texts.
        settings: None: the command's defaults.

    Raises:
        UserError: a mistake of the user, in a sentence.
        KeyboardInterrupt: interrupted before every layer had seen a token; nothing is written.
    """
    settings = settings or Settings()
    kind = transform_kind(settings)
    writable(out)
    text, source = read_data(data)
    folder = model_folder(model)
    pieces = cut(tokenize(folder, text), settings.length, settings.tokens)
    if not pieces:
        raise UserError(f'{source} holds no text to run')
    from .kvstats import ModelStatistics
    statistics, partial, engine = ModelStatistics(), False, engine_for(settings.engine)
    with ExitStack() as closing:  # the engine is closed when the file is written
        with progress('calibrating', sum(map(len, pieces)), 'tokens') as advance:
            try:
                _observe(engine, settings, folder, pieces, statistics, advance, closing)
            except KeyboardInterrupt:
                if not statistics.complete:
                    raise
                partial = True
        about = {'data': source, 'engine': engine, 'partial': str(partial).lower()}
        scales = write(out, settings, folder, statistics, about)
    return Calibration(out, settings.format, scales, kind, len(statistics.layers), statistics.tokens, partial)


def transform_kind(settings: Settings) -> str:
    """The kind of transforms asked for, or what the format takes; ``none`` for none.

    Raises:
        UserError: neither scales nor transforms are left to write.
    """
    fmt = get_format(settings.format)
    kind = settings.transform or ('balanced' if fmt.takes_transform else 'none')
    if kind == 'none' and not fmt.needs_scales:
        raise UserError(f'{fmt.name} needs no scales, and --transform none leaves nothing to write')
    return kind


def engine_for(asked: str) -> str:
    """``lmdeploy`` or ``transformers``: the one asked for, or for ``auto`` what this machine runs.

    Raises:
        UserError: LMDeploy is asked for where there is no GPU.
    """
    import torch
    if asked == 'lmdeploy' and not torch.cuda.is_available():
        raise UserError('--engine lmdeploy needs a GPU; --engine transformers runs anywhere')
    return asked if asked != 'auto' else 'lmdeploy' if torch.cuda.is_available() else 'transformers'


def _observe(engine: str, settings: Settings, folder: str, pieces: list[list[int]], statistics: ModelStatistics,
             done: Callable[[int], None], closing: ExitStack) -> None:
    """Run the pieces."""
    if engine == 'lmdeploy':
        attach()
        from .backends import observer
        observer.observe(folder, pieces, settings.length, settings.new_tokens, statistics, done, closing)
    else:
        from . import hf_observer
        hf_observer.observe(hf_observer.load(folder), pieces, settings.new_tokens, statistics, done)


def attach() -> None:
    """Attach to LMDeploy in this process, also where ``LMDEPLOY_KVQ=0`` keeps servers as they are.

    Raises:
        UserError: an LMDeploy that this package does not know.
    """
    from .hook import install
    try:
        install()
    except RuntimeError as error:
        raise UserError(str(error)) from error


def write(out: Path, settings: Settings, folder: str, statistics: ModelStatistics,
          about: dict[str, str]) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
    """Choose scales and transforms, and write the file.

    Args:
        about: further metadata.

    Returns:
        Layer index to (K scale, V scale); empty for formats without static scales.

    Raises:
        UserError: nothing to write; scales or matrices that no cache can use: the model computes NaN; or a disk that
            is full.
    """
    from .scales import ScaleError, provenance, write_file
    from .transforms import TransformError, digest_of
    fmt = get_format(settings.format)
    kind = transform_kind(settings)
    metadata = dict(about)
    scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if fmt.needs_scales:
        metadata |= {'method': settings.method, 'granularity': settings.granularity}
        if settings.method == 'percentile':
            metadata['percentile'] = str(settings.percentile)
        scales = statistics.scales(fmt, settings.method, settings.granularity, settings.percentile)
    metadata = provenance(folder, fmt, statistics.tokens, **metadata)
    kept = {n: layer.tensors() for n, layer in statistics.layers.items()}
    try:
        if kind != 'none':
            transforms = statistics.transforms(kind)
            metadata |= {'transform': kind, 'transform_digest': digest_of(transforms)}
            for layer, matrix in transforms.items():
                kept[layer]['k_transform'] = matrix
        write_file(out, scales, metadata, kept)
    except (ScaleError, TransformError, OSError) as error:
        raise UserError(f'{out} is not written: {error}') from error
    return scales
