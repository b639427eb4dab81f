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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from .console import UserError
from .environment import reason
from .formats import FORMATS, KVFormat, get_format

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
    parser.add_argument('--format', default=STATIC[0].name, choices=[fmt.name for fmt in CALIBRATED],
                        help='format the file is for (default: %(default)s)')
    parser.add_argument('--transform', choices=('none', 'balanced', 'diagonal'),
                        help='matrices for the keys of int4 and narrower formats: the best ones, or one factor per '
                        'element (default: balanced where the format takes them, else none)')
    parser.add_argument('--granularity', default='tensor', choices=('tensor', 'head'),
                        help='one scale per layer, or one per KV head (default: %(default)s)')
    parser.add_argument('--method', default='absmax', choices=('absmax', 'percentile', 'mse'),
                        help='largest value seen, a percentile of them, or least squared error (default: %(default)s)')
    parser.add_argument('--percentile', type=_percentile, default=99.99, metavar='P', help='default: %(default)s')
    parser.add_argument('--tokens', type=_positive, default=16384, metavar='N',
                        help='prompt tokens to run at most (default: %(default)s)')
    parser.add_argument('--length', type=_positive, default=512, metavar='N',
                        help='tokens of a prompt (default: %(default)s)')
    parser.add_argument('--new-tokens', type=_positive, default=32, metavar='N',
                        help='tokens to generate after each prompt (default: %(default)s)')
    parser.add_argument('--engine', default='auto', choices=('auto', 'lmdeploy', 'transformers'),
                        help='what runs the model (default: lmdeploy where there is a GPU)')


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
    return int(text)


def _percentile(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f'{text} is not above 0 and up to 100')
    return value


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq calibrate``: returns 0, or 130 if interrupted; a partial file may have been written then."""
    if not args.out.absolute().parent.is_dir():
        raise UserError(f'{args.out} cannot be written: {args.out.absolute().parent} is no folder')
    text, source = read_data(args.data)
    folder = model_folder(args.model)
    pieces = cut(tokenize(folder, text), args.length, args.tokens)
    if not pieces:
        raise UserError(f'{source} holds no text to run')
    from .kvstats import ModelStatistics
    statistics, partial, engine = ModelStatistics(), False, _engine(args.engine)
    with ExitStack() as closing:  # the engine is closed when the file is written
        with _progress(sum(map(len, pieces))) as advance:
            try:
                _observe(engine, args, folder, pieces, statistics, advance, closing)
            except KeyboardInterrupt:
                partial = True
        if partial and not statistics.complete:
            print('lmdeploy-kvq: interrupted before anything was seen; nothing is written', file=sys.stderr)
            return 130
        write(args, folder, statistics, {'data': source, 'engine': engine, 'partial': str(partial).lower()})
    return 130 if partial else 0


def _engine(asked: str) -> str:
    import torch
    if asked == 'lmdeploy' and not torch.cuda.is_available():
        raise UserError('--engine lmdeploy needs a GPU; --engine transformers runs anywhere')
    return asked if asked != 'auto' else 'lmdeploy' if torch.cuda.is_available() else 'transformers'


def _observe(engine: str, args: argparse.Namespace, folder: str, pieces: list[list[int]], statistics: ModelStatistics,
             done: Callable[[int], None], closing: ExitStack) -> None:
    """Run the pieces."""
    if engine == 'lmdeploy':
        attach()
        from .backends import observer
        observer.observe(folder, pieces, args.length, args.new_tokens, statistics, done, closing)
    else:
        from . import hf_observer
        hf_observer.observe(hf_observer.load(folder), pieces, args.new_tokens, statistics, done)


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


def read_data(data: str | None) -> tuple[str, str]:
    """Text to run and what to call it.

    Args:
        data: a file's path, ``-`` for standard input, None for the built-in texts.

    Raises:
        UserError: a file that cannot be read as text.
    """
    if data is None:
        texts = sorted((path for path in files(__package__).joinpath('data').iterdir() if path.name.endswith('.txt')),
                       key=lambda path: path.name)
        return '\n'.join(path.read_text(encoding='utf-8') for path in texts), 'built-in'
    try:
        if data == '-':
            return sys.stdin.read(), 'stdin'
        return Path(data).read_text(encoding='utf-8'), Path(data).name
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{data} cannot be read as text: {error}') from error


def model_folder(model: str) -> str:
    """Folder of a model: the one given, or the hub's copy.

    Raises:
        UserError: neither exists.
    """
    if (Path(model).expanduser() / 'config.json').is_file():
        return str(Path(model).expanduser())
    try:
        if Path(model).expanduser().exists() or model.startswith(('/', '.', '~')):
            raise FileNotFoundError('no folder with a config.json')
        from huggingface_hub import snapshot_download
        return snapshot_download(model)
    except Exception as error:  # the hub has its own for names, networks and permissions: the first line says which
        raise UserError(f'{model} is no model: {reason(error)}') from error


def tokenize(folder: str, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    from transformers import AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()  # "sequence is longer than ...": it is cut below
    try:
        return list(AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False))
    except (OSError, ValueError) as error:
        raise UserError(f'{folder} has no tokenizer that transformers can load: {error}') from error


def cut(ids: list[int], length: int, tokens: int) -> list[list[int]]:
    """Pieces of ``length`` tokens, at most ``tokens`` in all, spread evenly over ``ids``."""
    pieces = [ids[i:i + length] for i in range(0, len(ids), length)]
    count = max(tokens // length, 1)
    if len(pieces) > count:
        pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    return [piece[:tokens] for piece in pieces]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what is to be called with the tokens done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise UserError('rich is not installed; run `pip install "lmdeploy-kvq[tools]"`') from error
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('tokens'),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task('calibrating', total=total)

        yield lambda tokens: bar.advance(task, tokens)


def write(args: argparse.Namespace, folder: str, statistics: ModelStatistics, about: dict[str, str]) -> None:
    """Choose scales and transforms, write the file, and say so.

    Raises:
        UserError: scales or matrices that no cache can use: the model computes NaN.
    """
    from .scales import ScaleError, fingerprint, write_file
    from .transforms import TransformError, digest_of
    fmt: KVFormat = get_format(args.format)
    kind = args.transform or ('balanced' if fmt.takes_transform else 'none')
    if kind == 'none' and not fmt.needs_scales:
        raise UserError(f'{fmt.name} needs no scales, and --transform none leaves nothing to write')
    how_scaled = {'method': args.method, 'granularity': args.granularity} if fmt.needs_scales else {}
    metadata = {'format': fmt.name, **how_scaled,
                'model': Path(folder).name, 'fingerprint': fingerprint(folder), 'tokens': str(statistics.tokens),
                'date': time.strftime('%Y-%m-%d', time.gmtime()), **about}
    if fmt.needs_scales and args.method == 'percentile':
        metadata['percentile'] = str(args.percentile)
    kept = {n: layer.tensors() for n, layer in statistics.layers.items()}
    scales = statistics.scales(fmt, args.method, args.granularity, args.percentile) if fmt.needs_scales else {}
    try:
        if kind != 'none':
            transforms = statistics.transforms(kind)
            metadata |= {'transform': kind, 'transform_digest': digest_of(transforms)}
            for layer, matrix in transforms.items():
                kept[layer]['k_transform'] = matrix
        write_file(args.out, scales, metadata, kept)
    except (ScaleError, TransformError, OSError) as error:
        raise UserError(f'{args.out} is not written: {error}') from error
    how = 'interrupted: ' if about['partial'] == 'true' else ''
    what = ' and '.join([f'{fmt.name} scales'] * bool(scales) + [f'{kind} transforms'] * (kind != 'none'))
    print(f'{args.out}: {how}{what} of {len(kept)} layers from {statistics.tokens} tokens{_largest(scales)}.\n'
          f'Use it with --kv-scales {args.out}, or as {FILE} beside the model.')


def _largest(scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> str:
    if not scales:
        return ''
    k, v = (max(float(pair[i].max()) for pair in scales.values()) for i in (0, 1))
    return f'; the largest are {k:.4g} for K and {v:.4g} for V'
