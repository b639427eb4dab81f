"""Measure what every cache format does to a model, against its unquantized cache, and which is the smallest safe one.

On a GPU LMDeploy's engine runs the model, a fresh one per format; elsewhere transformers does, in fp32, with the same
codes. Exit code 0: a format is within --budget; 1: none is, or one could not be measured.

examples:
  lmdeploy-kvq eval MODEL
  lmdeploy-kvq eval MODEL --formats int8_per_token_head,fp8 --text mine.txt --json out.json --plot out.png
  lmdeploy-kvq eval MODEL --formats all,int4,lmdeploy:fp8      LMDeploy's own policies too; on a GPU
  lmdeploy-kvq eval MODEL --per-layer                          which layers lose most
  lmdeploy-kvq eval --server http://localhost:23333 --task gsm8k,ifeval    through lm-eval, against a running server
"""
from __future__ import annotations

# torch, transformers and LMDeploy are imported late: --help is fast.
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibrate import FILE, STATIC, attach, engine_for
from .console import UserError, need, progress, reason, wrapped, writable
from .plan import quantity, tokens
from .texts import load_tokenizer, model_folder

if TYPE_CHECKING:
    from .evaluation.material import Contender, Material

ALL = 'all'
DEFAULTS = {'transformers': (2048, 512, (512, )), 'lmdeploy': (16384, 1024, (1024, 4096))}
"""Per engine: tokens to score, tokens of a passage, tokens of haystacks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lmdeploy-kvq eval``."""
    parser.add_argument('model', metavar='MODEL', nargs='?', help='folder, or name on the Hugging Face hub')
    parser.add_argument('--formats', type=_names, default=(ALL, ), metavar='a,b,...',
                        help=f'names, "{ALL}" for every format of this package (default), or LMDeploy\'s own policies')
    parser.add_argument('--text', metavar='FILE|-', help='text to score, "-": standard input (default: built-in texts)')
    parser.add_argument('--tokens', type=tokens, metavar='N', help=f'tokens to score (default: {_default(0)})')
    parser.add_argument('--length', type=tokens, metavar='N', help=f'tokens of a passage (default: {_default(1)})')
    parser.add_argument('--new-tokens', type=_count, default=32, metavar='N',
                        help='tokens of greedy continuations, 0 for none (default: %(default)s)')
    parser.add_argument('--needles', type=_lengths, metavar='N,...',
                        help=f'tokens of haystacks, 0 for none (default: {_default(2)})')
    parser.add_argument('--budget', type=_positive, default=0.01, metavar='KL',
                        help='mean KL divergence in nats that is safe (default: %(default)s)')
    parser.add_argument('--kv-scales', metavar='PATH',
                        help=f'scales and transforms (default: MODEL/{FILE}, else 1.0 and Hadamard)')
    parser.add_argument('--gpu-memory', type=quantity, metavar='SIZE',
                        help="memory of one GPU for the tokens that fit, e.g. 80G (default: this machine's)")
    parser.add_argument('--per-layer', nargs='?', const='', metavar='FORMAT',
                        help='quantize one layer at a time and rank them; default: the smallest of --formats')
    parser.add_argument('--engine', default='auto', choices=('auto', 'lmdeploy', 'transformers'),
                        help='what runs the model (default: lmdeploy where there is a GPU)')
    parser.add_argument('--tp', type=quantity, default=1, metavar='N', help='GPUs of tensor parallelism (default: 1)')
    parser.add_argument('--jobs', type=quantity, default=1, metavar='N',
                        help='engines at once on the GPU, for small models (default: 1)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything, with the environment')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw accuracy against size: .png, .svg or .pdf')
    server = parser.add_argument_group('standard tasks (pip install "lmdeploy-kvq[eval]")')
    server.add_argument('--server', metavar='URL',
                        help='a running OpenAI-compatible server; MODEL, if given, is its name there')
    server.add_argument('--task', type=_names, default=(), metavar='NAME,...', help="tasks of lm-eval, e.g. gsm8k")
    server.add_argument('--limit', type=quantity, metavar='N', help='questions per task (default: all)')
    server.add_argument('--few-shot', type=_count, metavar='N', help="worked examples (default: the task's own)")
    server.add_argument('--chat', action='store_true', help='ask through the chat template')
    server.add_argument('--task-folder', metavar='FOLDER', help='further task definitions, as YAML files')


def _default(which: int) -> str:
    """A default of both engines, as ``--help`` says it."""
    texts = [','.join(map(str, value)) if isinstance(value, tuple) else str(value)
             for value in (DEFAULTS[engine][which] for engine in ('transformers', 'lmdeploy'))]
    return f'{texts[0]}; {texts[1]} through LMDeploy'


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(',') if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError('names, separated by commas')
    return names


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is no number')
    return int(text)


def _lengths(text: str) -> tuple[int, ...]:
    return () if text.strip() == '0' else tuple(tokens(part) for part in text.split(','))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
    return value


@dataclass(frozen=True)
class Settings:
    """What to measure; None leaves it to the engine's :data:`DEFAULTS`. The names are the command's options."""
    formats: Sequence[str] = (ALL, )
    text: str | None = None
    tokens: int | None = None
    length: int | None = None
    new_tokens: int = 32
    needles: Sequence[int] | None = None
    kv_scales: str | None = None
    gpu_memory: int | None = None
    per_layer: str | None = None
    engine: str = 'auto'
    tp: int = 1
    jobs: int = 1


@dataclass
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        model: its folder. engine: what ran it. settings: what was measured, by name.
        rows: one per cache, see :func:`lmdeploy_kvq.evaluation.rows.make_rows`; the first is unquantized.
        needle_measure: the key, behind ``needle_``, of the needles' score.
        layers: with ``per_layer``, the layers, the most sensitive first: ``layer`` and the figures of
            :func:`lmdeploy_kvq.accuracy.summary`; layer_format: the format they were stored in.
        notes: what a reader of the figures has to know, in sentences.
    """
    model: str
    engine: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    needle_measure: str | None
    layers: list[dict[str, Any]] = field(default_factory=list)
    layer_format: str | None = None
    notes: list[str] = field(default_factory=list)


def evaluate(model: str, settings: Settings | None = None) -> Evaluation:
    """Measure caches against the unquantized one; progress bars go to stderr.

    Args:
        model: folder, or name on the hub.
        settings: None: the command's defaults.

    Raises:
        UserError: a mistake of the user, in a sentence.
    """
    settings = settings or Settings()
    need('rich')
    engine = engine_for(settings.engine)
    folder = model_folder(model)
    if engine == 'lmdeploy':
        attach()  # says what is wrong with an LMDeploy that this package does not know
    from .evaluation.contenders import find_contenders, layer_contender
    chosen = find_contenders(settings.formats, settings.kv_scales, folder, engine)
    layered = None if settings.per_layer is None else \
        layer_contender(settings.per_layer, chosen, settings.kv_scales, folder)
    tokenizer = load_tokenizer(folder)
    from .evaluation import material, rows
    found = _material(tokenizer, folder, settings, engine)
    notes, layers, loaded = [], [], None
    if engine == 'transformers':
        loaded = _load(folder)
        from .evaluation import through_transformers
        with progress('measuring', through_transformers.steps(found, chosen), 'steps') as done:
            runs = through_transformers.run(loaded, tokenizer, found, chosen, done)
    else:
        from .evaluation import through_engine
        with progress('measuring', len(chosen), 'engines') as done:
            runs = through_engine.run(folder, found, chosen, done, settings.tp, settings.jobs)
    sizes = rows.Sizes(folder, settings.gpu_memory or _memory(), settings.tp)
    if sizes.problem:
        notes.append(f'No sizes: {sizes.problem}')
    if layered is not None:
        # beside an engine, the model is loaded once more, and only now: there may be no room for both
        layers = _layers(loaded or _load(folder), found, layered)
        if engine != 'transformers':
            notes.append('Layers were ranked through transformers, in fp32: LMDeploy stores all layers alike.')
    for contender in chosen:
        if contender.format in STATIC and contender.scales is None and not contender.stock:
            notes.append(f'{contender.name}: static scales of 1.0' +
                         (', or those of the checkpoint.' if engine == 'lmdeploy' else '; see lmdeploy-kvq calibrate.'))
    table = rows.make_rows(chosen, runs, found, sizes)
    about = {**vars(settings), 'tokens': table[0].get('tokens'), 'length': max(len(p.ids) for p in found.passages),
             'needles': sorted({needle.length for needle in found.needles}), 'depths': list(material.DEPTHS)}
    return Evaluation(folder, engine, about, table, rows.needle_measure(table), layers,
                      layered.name if layered else None, notes)


def _material(tokenizer: Any, folder: str, settings: Settings, engine: str) -> Material:
    """Texts, cut as the settings or the engine's defaults say, within what the model can read."""
    from .evaluation.material import gather
    most, length, needles = DEFAULTS[engine]
    limit = _positions(folder)
    needles = tuple(n for n in needles if n <= limit) if settings.needles is None else tuple(settings.needles)
    length = settings.length or min(length, limit)
    for what, number in (('--length', length), *(('--needles', n) for n in needles)):
        if number > limit:
            raise UserError(f'{what} {number:,}: this model reads {limit:,} tokens at most')
    return gather(tokenizer, settings.text, settings.tokens or most, length, settings.new_tokens, needles)


def _positions(folder: str) -> int:
    """Tokens that a model can read, from its configuration; a large number where it sets no limit."""
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except Exception as error:  # json's, transformers' and the model's own
        raise UserError(f'transformers cannot read {folder}/config.json: {reason(error)}') from error
    return getattr(config, 'max_position_embeddings', None) or 1 << 30


def _load(folder: str) -> Any:
    try:
        from .evaluation import through_transformers
    except ImportError as error:
        raise UserError(f'{error}; run `pip install "transformers>=5"`') from error
    return through_transformers.prepare(folder)


def _layers(model: Any, material: Material, contender: Contender) -> list[dict[str, Any]]:
    """Rank the layers on one passage of each text."""
    from .accuracy import summary
    from .evaluation.through_transformers import rank_layers
    passages = list({passage.domain: passage for passage in reversed(material.passages)}.values())
    count = model.config.get_text_config().num_hidden_layers
    with progress('ranking layers', count * len(passages), 'steps') as done:
        scores = rank_layers(model, passages, contender, done)
    return sorted(({'layer': layer, **summary(found)} for layer, found in scores),
                  key=lambda row: row['mean_kl'], reverse=True)


def _memory() -> int | None:
    import torch
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def run(args: argparse.Namespace) -> int:
    """``lmdeploy-kvq eval``: 0 if a format is within the budget and all were measured (or the tasks ran), else 1."""
    for path in (args.json, args.plot):
        if path is not None:
            writable(path)
    need('rich')
    if args.server or args.task:
        return _run_tasks(args)
    if args.model is None:
        raise UserError('give a MODEL to measure, or --server URL --task NAME')
    if args.plot is not None:
        need('matplotlib')
        if args.plot.suffix not in ('.png', '.svg', '.pdf'):
            raise UserError(f'--plot {args.plot}: a file that ends in .png, .svg or .pdf')
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    found = evaluate(args.model, settings)
    _show(found, args.budget)
    from .evaluation import report, rows
    advice = rows.advice(found.rows, args.budget, found.engine)
    if args.json is not None:
        report.write_json(args.json, {**vars(found), 'budget': args.budget, 'advice': advice})
    problem: UserError | None = None
    if args.plot is not None:
        try:
            report.draw(args.plot, found.rows, args.budget, f'{_name(found.model)}: accuracy against size')
        except UserError as error:  # said when everything else is out
            problem = error
    print(wrapped(advice), flush=True)
    if problem is not None:
        raise problem
    failed = any(row['error'] is not None for row in found.rows)
    return 1 if failed or rows.pick(found.rows, args.budget) is None else 0


def _show(found: Evaluation, budget: float) -> None:
    from .evaluation import report, rows
    console = report.printer()
    through = "LMDeploy's engine" if found.engine == 'lmdeploy' else 'transformers, fp32'
    console.print(f'{_name(found.model)} through {through}: {found.settings["tokens"]:,} tokens in '
                  f'passages of {found.settings["length"]:,}', markup=False)
    report.print_rows(console, found.rows, found.needle_measure, rows.pick(found.rows, budget), budget)
    if found.needle_measure is not None:
        console.print()
        report.print_needles(console, found.rows, found.needle_measure)
    if found.layers:
        console.print()
        report.print_layers(console, found.layers, found.layer_format or '', found.layers[0]['tokens'])
    for note in found.notes:
        print(wrapped(note, '  '))
    print()


def _name(folder: str) -> str:
    """What to call a model: its name on the hub where the folder is the hub's copy, else the folder's."""
    parts = Path(folder).resolve().parts
    hub = next((part for part in parts if part.startswith('models--')), None)
    return hub.removeprefix('models--').replace('--', '/') if hub and 'snapshots' in parts else parts[-1]


def _run_tasks(args: argparse.Namespace) -> int:
    if not args.server:
        raise UserError('--task runs against a server: start one with `lmdeploy serve api_server MODEL`, and give '
                        '--server http://localhost:23333')
    if not args.task:
        raise UserError('--server needs --task NAME, e.g. --task gsm8k')
    if args.plot is not None:
        raise UserError('--plot draws formats; tasks of a server have one value each')
    if args.task_folder is not None and not Path(args.task_folder).is_dir():
        raise UserError(f'--task-folder {args.task_folder}: there is no such folder')
    from .evaluation import report, tasks
    found = tasks.run_tasks(args.server, args.task, args.model, args.limit, args.few_shot, args.chat,
                            args.task_folder)
    report.print_tasks(report.printer(), found)
    if args.json is not None:
        report.write_json(args.json, {'server': args.server, **found})
    return 0
