"""Models, texts and tokens that commands run: a user's folder or hub name, a file, standard input, built-in texts.

transformers and the model hub's client are imported late: ``--help`` is fast, and works where they are missing.
"""
from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from .console import UserError, reason


def built_in() -> dict[str, str]:
    """The built-in English texts by name, e.g. ``prose``."""
    found = (path for path in files(__package__).joinpath('data').iterdir() if path.name.endswith('.txt'))
    return {path.name.removesuffix('.txt'): path.read_text(encoding='utf-8')
            for path in sorted(found, key=lambda path: path.name)}


def read_data(data: str | None) -> tuple[str, str]:
    """Text to run and what to call it.

    Args:
        data: a file's path, ``-`` for standard input, None for the built-in texts.

    Raises:
        UserError: a file that cannot be read as text.
    """
    if data is None:
        return '\n'.join(built_in().values()), 'built-in'
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


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model, which says nothing of texts longer than the model takes.

    Raises:
        UserError: none that transformers can load.
    """
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f'{reason(error)}; run `pip install transformers`') from error
    logging.set_verbosity_error()  # "sequence is longer than ...": it is cut
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # files missing or damaged: json's, tokenizers', the hub's
        raise UserError(f'{folder} has no tokenizer that transformers can load: {reason(error)}') from error


def tokenize(folder: str, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(load_tokenizer(folder).encode(text, add_special_tokens=False))


def begin(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, e.g. Gemma's ``<bos>``; empty where it puts none."""
    return [i for i in tokenizer.encode('')[:1] if i == tokenizer.bos_token_id]


def cut(ids: list[int], length: int, tokens: int) -> list[list[int]]:
    """Pieces of ``length`` tokens, at most ``tokens`` in all, spread evenly over ``ids``."""
    pieces = [ids[i:i + length] for i in range(0, len(ids), length)]
    count = max(tokens // length, 1)
    if len(pieces) > count:
        pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    return [piece[:tokens] for piece in pieces]
