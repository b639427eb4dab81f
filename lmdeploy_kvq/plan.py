"""How many tokens and requests fit, per cache format, before anything is loaded: from a model's config.json alone.

Follows LMDeploy's own sizing: what is left of a GPU's memory after the weights, the runtime's buffers and what CUDA and
LMDeploy hold anyway, times --cache-max-entry-count, in whole blocks.

examples:
  lmdeploy-kvq plan MODEL --gpu-memory 141G
  lmdeploy-kvq plan MODEL --gpu-memory 80G --tp 2 --context 32k --concurrency 64 --bandwidth 3.3T
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .capacity import TABLE_BYTES, CacheShape, block_bytes, bytes_per_token, gain
from .console import UserError, table, wrapped
from .formats import FORMATS, KVFormat

OVERHEAD = 3 * 2**30
"""Bytes of a GPU that CUDA, PyTorch and LMDeploy hold beside weights and buffers when the cache is sized.

Chosen so that the block counts of benchmarks/results/engine.json and engine_tp2.json (one H200 and two) come out; the
tests compare them.
"""

WEIGHT_BYTES = 2  # where a model has no weight files to look at: bf16
_UNITS = {'': 1, 'k': 10**3, 'm': 10**6, 'g': 10**9, 't': 10**12, 'ki': 2**10, 'mi': 2**20, 'gi': 2**30, 'ti': 2**40}


def quantity(text: str) -> int:
    """A number with a unit: ``141G`` is 141e9, ``80Gi`` is 80 x 2**30, ``32k`` (tokens) is 32,768.

    Raises:
        argparse.ArgumentTypeError: anything else, or nothing above 0.
    """
    match = re.fullmatch(r'([\d.]+)\s*([kmgt]i?)?b?', text.strip().lower())
    try:
        value = int(float(match[1]) * _UNITS[match[2] or '']) if match else 0
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no quantity above 0, e.g. 141G, 80Gi or 32k')
    return value


def tokens(text: str) -> int:
    """Like :func:`quantity`, but ``k`` is 1,024: 32k tokens are 32,768."""
    return quantity(re.sub(r'(?i)k$', 'ki', text.strip()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lmdeploy-kvq plan``."""
    parser.add_argument('model', metavar='MODEL', type=Path, help='folder of a model, or its config.json')
    parser.add_argument('--gpu-memory', type=quantity, metavar='SIZE',
                        help="memory of one GPU, e.g. 141G or 80Gi (default: this machine's first GPU)")
    parser.add_argument('--tp', type=quantity, default=1, metavar='N', help='GPUs of tensor parallelism (default: 1)')
    parser.add_argument('--context', type=tokens, default=8192, metavar='N',
                        help='tokens of a request, prompt and answer (default: 8k)')
    parser.add_argument('--concurrency', type=quantity, metavar='N', help='requests that are to fit at once')
    parser.add_argument('--bandwidth', type=quantity, metavar='BYTES',
                        help='memory bandwidth of one GPU per second, e.g. 3.3T: adds the least time of a decode step')
    parser.add_argument('--cache-max-entry-count', type=float, default=0.8, metavar='X',
                        help="LMDeploy's; default: 0.8")
    parser.add_argument('--max-batch-size', type=quantity, default=256, metavar='N', help="LMDeploy's; default: 256")
    parser.add_argument('--max-prefill-token-num', type=quantity, default=8192, metavar='N',
                        help="LMDeploy's; default: 8192")
    parser.add_argument('--cache-block-seq-len', type=quantity, default=64, metavar='N', help="LMDeploy's; default: 64")
    parser.add_argument('--json', action='store_true', help='print the plan as JSON')


@dataclass(frozen=True)
class Model:
    """What of a model decides its memory.

    Attributes:
        name: its architecture. layers: those that keep a KV cache; all_layers: with those that keep a state instead.
        heads, kv_heads: of the whole model. head_dim, v_head_dim: elements of a K row and of a V row.
        vocab_size: rows of the output layer. weight_bytes: of all weights; estimated: from the configuration alone.
    """
    name: str
    layers: int
    all_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    vocab_size: int
    weight_bytes: int
    estimated: bool


def read_model(path: Path) -> Model:
    """Read a model's folder or its config.json.

    Raises:
        UserError: nothing there, or a configuration without what is needed.
    """
    file = path / 'config.json' if path.is_dir() else path
    try:
        whole = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'there is no {file}; give the folder of a downloaded model, or its config.json') from None
    except (OSError, ValueError) as error:
        raise UserError(f'{file} cannot be read: {error}') from None
    if not isinstance(whole, Mapping):
        raise UserError(f'{file} is no configuration of a model: a JSON object is needed')
    config = next((whole[key] for key in ('text_config', 'llm_config') if isinstance(whole.get(key), Mapping)), whole)
    try:
        name = (whole.get('architectures') or [whole.get('model_type', 'unknown')])[0]
        heads, layers = config['num_attention_heads'], config['num_hidden_layers']
        head_dim = config.get('head_dim') or config['hidden_size'] // heads
        # published Qwen3-Next has the interval alone; LMDeploy counts by it
        every = config.get('full_attention_interval') or 1
        kinds = config.get('layer_types') or ['linear_attention' if (i + 1) % every else 'full_attention'
                                              for i in range(layers)]
        if config.get('kv_lora_rank'):
            raise UserError(f'{name} keeps a latent (MLA) KV cache, which the formats of this package cannot store')
        weights = _weight_files(file.parent)
        return Model(name, sum('attention' in kind and 'linear' not in kind for kind in kinds), layers, heads,
                     config.get('num_key_value_heads') or heads, head_dim, config.get('v_head_dim') or head_dim,
                     config['vocab_size'], weights or _estimate(config, head_dim), not weights)
    except KeyError as error:
        raise UserError(f'{file} has no {error}, which the plan needs') from None
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:  # text or 0 where a number belongs
        raise UserError(f'{file} is no configuration of a model: {error}') from None


def _weight_files(folder: Path) -> int:
    """Bytes of a folder's weights, 0 where there are none.

    Raises:
        UserError: some of the files that the index names are there and some are not.
    """
    try:
        index = json.loads((folder / 'model.safetensors.index.json').read_text(encoding='utf-8'))
        named = {str(name) for name in index['weight_map'].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        named = set()  # most models have none; a damaged one is for whoever loads the weights
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing and len(missing) < len(named):
        raise UserError(f'{folder} lacks {len(missing)} of the {len(named)} files of its weights, the first is '
                        f'{missing[0]}; download it again, or plan from config.json alone')
    return max(sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in ('*.safetensors', '*.bin'))


def _estimate(config: Mapping[str, Any], head_dim: int) -> int:
    """Bytes of a Llama-like model's weights in bf16: attention, gated MLPs or experts, embeddings."""
    hidden, layers, heads = config['hidden_size'], config['num_hidden_layers'], config['num_attention_heads']
    kv_heads = config.get('num_key_value_heads') or heads
    experts = config.get('num_experts') or config.get('num_local_experts') or 0
    width = (config.get('moe_intermediate_size') if experts else None) or config['intermediate_size']
    layer = hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * width * max(experts, 1) + hidden * experts
    embeddings = config['vocab_size'] * hidden * (1 if config.get('tie_word_embeddings') else 2)
    return WEIGHT_BYTES * (layers * layer + embeddings)


@dataclass(frozen=True)
class Settings:
    """The engine's settings that decide the size of its cache; the names are LMDeploy's."""
    gpu_memory: int
    tp: int = 1
    cache_max_entry_count: float = 0.8
    max_batch_size: int = 256
    max_prefill_token_num: int = 8192
    block_size: int = 64


def cache_shape(model: Model, settings: Settings) -> CacheShape:
    """One GPU's part of the cache. Fewer KV heads than GPUs are replicated.

    Raises:
        UserError: KV heads that do not split.
    """
    if max(model.kv_heads, settings.tp) % min(model.kv_heads, settings.tp) or model.heads % settings.tp:
        raise UserError(f'{model.heads} query and {model.kv_heads} KV heads do not split over {settings.tp} GPUs')
    return CacheShape(model.layers, max(model.kv_heads // settings.tp, 1), model.head_dim, model.v_head_dim,
                      block_size=settings.block_size)


def num_gpu_blocks(fmt: KVFormat | None, model: Model, settings: Settings) -> int:
    """Blocks LMDeploy will allocate; None as format is the bf16 cache. 0 or less: the model does not fit."""
    # LMDeploy 0.18, executor/base.py: the logits of a prefill step and of two decode steps, in 16 bits.
    runtime = (settings.max_prefill_token_num + 2 * settings.max_batch_size) * model.vocab_size * 2
    free = settings.gpu_memory - OVERHEAD - model.weight_bytes // settings.tp - runtime
    return int(free * settings.cache_max_entry_count) // block_bytes(fmt, cache_shape(model, settings))


def plan(model: Model, settings: Settings, context: int, concurrency: int | None = None,
         bandwidth: int | None = None) -> list[dict[str, Any]]:
    """One row per format that can store the model, bf16 first.

    Args:
        context: tokens of a request. concurrency: requests at once, as many as fit if None.
        bandwidth: bytes per second of one GPU, for ``step_ms``.

    Returns:
        Rows with ``format``, ``policy``, ``bytes_per_token`` (of one GPU), ``num_gpu_blocks``, ``tokens``, ``requests``
        (of ``context`` tokens at once), ``gain`` (against bf16), ``table_bytes`` (block tables of CUDA graphs, which
        LMDeploy does not count), and ``step_ms``: the least time of a decode step of ``concurrency`` requests, or of
        as many of them as fit.
    """
    shape, rows = cache_shape(model, settings), []
    for fmt in (None, *FORMATS):
        try:
            size = bytes_per_token(fmt, shape)
        except ValueError:  # head sizes that this format cannot store
            continue
        blocks = max(num_gpu_blocks(fmt, model, settings), 0)
        room = blocks * settings.block_size
        # A request's last block is rarely full; one table row per request of every captured batch size.
        requests = min(blocks // -(-context // settings.block_size), settings.max_batch_size)
        batches = [1 << i for i in range(settings.max_batch_size.bit_length())]
        tables = min(sum(batches) * blocks * 4, sys.maxsize if fmt is None else TABLE_BYTES)
        row = {'format': 'bf16' if fmt is None else fmt.name, 'policy': 0 if fmt is None else fmt.policy,
               'bytes_per_token': size, 'num_gpu_blocks': blocks, 'tokens': room, 'requests': requests,
               'gain': 1.0 if fmt is None else gain(fmt, shape), 'table_bytes': tables}
        if bandwidth:
            moved = model.weight_bytes / settings.tp + min(requests, concurrency or requests) * context * size
            row['step_ms'] = moved / bandwidth * 1e3
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq plan``: print the table; returns 0, or 1 if --concurrency requests fit in no format."""
    model = read_model(args.model)
    if not 0 < args.cache_max_entry_count <= 1:
        raise UserError(f'--cache-max-entry-count {args.cache_max_entry_count}: a share of memory, above 0 and up to 1')
    settings = Settings(args.gpu_memory or _this_gpu(), args.tp, args.cache_max_entry_count, args.max_batch_size,
                        args.max_prefill_token_num, args.cache_block_seq_len)
    wanted = args.concurrency
    rows = plan(model, settings, args.context, wanted, args.bandwidth)
    fitting = [row for row in rows if row['requests'] >= (wanted or 1)]
    if args.json:
        print(json.dumps({'model': vars(model), 'settings': vars(settings), 'context': args.context, 'rows': rows},
                         indent=1))
    else:
        print(_render(model, settings, rows, args.context, wanted))
        if wanted:
            names = ', '.join(row['format'] for row in fitting) or 'no format'
            print('\n' + wrapped(f'{wanted} requests of {args.context:,} tokens at once: {names}.'))
    return 0 if fitting else 1


def _render(model: Model, settings: Settings, rows: list[dict[str, Any]], context: int, wanted: int | None) -> str:
    per_gpu = f' on each of {settings.tp} GPUs' if settings.tp > 1 else ''
    weights = f'{model.weight_bytes / settings.tp / 1e9:.1f} GB of weights{per_gpu}'
    estimated = ' (estimated: no weight files)' if model.estimated else ''
    lines = [wrapped(f'{model.name}: {model.layers} of {model.all_layers} layers with a KV cache, {model.kv_heads} KV '
                     f'heads of {model.head_dim}, {weights}{estimated}; {settings.gpu_memory / 1e9:.1f} GB of memory.'),
             '']
    header = ['--quant-policy', 'bytes/token', 'blocks', 'tokens', 'gain', f'x {context:,}']
    step = 'step_ms' in rows[0]
    lines.append(table([[row['format'], f'{row["bytes_per_token"]:,.0f}', f'{row["num_gpu_blocks"]:,}',
                         f'{row["tokens"]:,}', f'{row["gain"]:.2f}x', f'{row["requests"]:,}',
                         *([f'{row["step_ms"]:.1f}'] if step else [])] for row in rows],
                       [*header, *(['ms/step'] if step else [])], right=','.join([*header[1:5], 'ms/step'])))
    lines += ['', wrapped(f'x {context:,}: requests of that many tokens that fit at once, up to --max-batch-size.',
                          '  ')]
    if step:
        these = f'{wanted} such requests (or as many as fit)' if wanted else 'those requests'
        lines.append(wrapped(f'ms/step: reading the weights and the caches of {these} once; a step takes longer.',
                             '  '))
    lines += [wrapped(f'{fmt.name} is EXPERIMENTAL: {fmt.experimental}.', '  ') for fmt in FORMATS
              if fmt.experimental and any(row['format'] == fmt.name for row in rows)]
    worst = max(row['table_bytes'] for row in rows)
    if worst > settings.gpu_memory / 100:
        lines.append(wrapped(f'CUDA graphs keep block tables of up to {worst / 1e9:.1f} GB that LMDeploy does not '
                             'count: lower --max-batch-size or --cache-max-entry-count.', '  '))
    return '\n'.join(lines)


def _this_gpu() -> int:
    import torch
    if not torch.cuda.is_available():
        raise UserError('there is no CUDA GPU here; give --gpu-memory, e.g. --gpu-memory 80G')
    return torch.cuda.get_device_properties(0).total_memory
