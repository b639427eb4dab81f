"""How measurements are shown: tables for a terminal, a picture, a JSON file."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import UserError, need, reason, replacing
from .rows import candidates

_SYMBOLS = ((1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def printer() -> Any:
    """A console of rich on standard output: no colours where that is no terminal, or ``NO_COLOR`` is set."""
    need('rich')
    from rich.console import Console
    return Console(highlight=False, soft_wrap=False)


def print_rows(console: Any, rows: Sequence[Mapping[str, Any]], measure: str | None, best: Mapping[str, Any] | None,
               budget: float) -> None:
    """The main table, 80 columns wide at most, and what its columns mean."""
    table = _table('cache', 'perpl.', 'KL', 'KL 99%', 'same', 'greedy', 'needle', 'bytes', 'fit')
    counted = any(row['tokens_that_fit'] is not None for row in rows)
    for row in rows:
        if row['error'] is not None:
            continue
        style = 'dim' if row['floor'] or not row['policy'] else 'bold green' if row is best else \
            '' if row['mean_kl'] <= budget else 'yellow'
        table.add_row(row['format'], f'{row["perplexity"]:.2f}', *(_kl(row[key]) for key in ('mean_kl', 'p99_kl')),
                      _percent(row['top1_agreement']), _cell(row.get('greedy_agreement'), '.1f'),
                      '-' if measure is None else _percent(row.get(f'needle_{measure}')),
                      _cell(row['bytes_per_token'], ',.0f'),
                      short(row['tokens_that_fit']) if counted else _cell(row['gain'], '.2f', 'x'), style=style)
    console.print(table)
    for row in rows:
        if row['error'] is not None:
            console.print(f'  {row["format"]}: not measured: {row["error"]}', style='red', markup=False)
    first = rows[0]
    lines = ["KL: mean divergence of predictions from the unquantized cache's, in nats",
             'KL 99%: its 99th percentile over the positions; perpl.: perplexity of the text',
             'same: share of positions at which the likeliest token is the same']
    if 'greedy_tokens' in first:
        lines.append(f'greedy: tokens until the continuation first differs, of {first["greedy_tokens"]}')
    if measure == 'exact':
        lines.append('needle: numbers found in long texts, by greedy answer')
    elif measure is not None:
        lines.append('needle: mean 1/rank of the digits of numbers hidden in long texts, by log-probability: with the '
                     'unquantized cache, too, this model answers fewer than half')
    if any(row['bytes_per_token'] is not None for row in rows):
        lines.append('bytes: of the cache per token and GPU; fit: tokens ' + (
            'that fit' if counted else 'in the same memory (--gpu-memory counts them)'))
    if any(row['floor'] for row in rows):
        lines.append('again: the unquantized cache once more: smaller differences mean nothing')
    _legend(console, lines)


def print_needles(console: Any, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    """Retrieval by depth and by length."""
    cells = rows[0]['needles']
    depths, lengths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ('depth', 'length'))
    table = _table('needle at depth, in length', *(f'{depth:.0%}' for depth in depths),
                   *(f'{length:,}' for length in lengths))
    for row in rows:
        if 'needles' in row:
            shares = [_share(row['needles'], measure, key, value) for key, values in (('depth', depths),
                                                                                      ('length', lengths))
                      for value in values]
            table.add_row(row['format'], *map(_percent, shares))
    console.print(table)


def print_layers(console: Any, layers: Sequence[Mapping[str, Any]], name: str, tokens: int) -> None:
    """The ranking of layers, the most sensitive first."""
    total = sum(layer['mean_kl'] for layer in layers)
    table = _table('rank', 'layer', 'KL', 'KL 99%', 'same', 'share of the sum')
    for place, layer in enumerate(layers, 1):
        table.add_row(str(place), str(layer['layer']), _kl(layer['mean_kl']), _kl(layer['p99_kl']),
                      _percent(layer['top1_agreement']), _percent(layer['mean_kl'] / total if total else 0.0))
    console.print(f'Layers by what they lose when they alone are stored as {name} ({tokens:,} tokens)', markup=False)
    console.print(table)


def print_tasks(console: Any, results: Mapping[str, Any]) -> None:
    """What lm-eval found: one line per task and metric."""
    table = _table('task', 'metric', 'value', '+-')
    for task, figures in results['tasks'].items():
        for key, value in figures.items():
            name, comma, kind = key.partition(',')
            if comma and not name.endswith('_stderr') and isinstance(value, (int, float)):
                table.add_row(task, f'{name} ({kind})' if kind != 'none' else name, f'{value:.4f}',
                              _cell(figures.get(f'{name}_stderr,{kind}'), '.4f'))
    console.print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style='bold')
    for number, name in enumerate(columns):
        table.add_column(name, justify='left' if number == 0 else 'right', no_wrap=True)
    return table


def _legend(console: Any, lines: Sequence[str]) -> None:
    from rich.padding import Padding
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2), expand=False), style='dim')


def _share(cells: Sequence[Mapping[str, Any]], measure: str, key: str, value: float) -> float:
    scores = [float(cell[measure]) for cell in cells if cell[key] == value]
    return sum(scores) / len(scores)


def _cell(value: float | str | None, form: str, unit: str = '') -> str:
    return '-' if value is None else value if isinstance(value, str) else format(value, form) + unit


def _kl(value: float) -> str:
    """Four digits after the point where these say something, else a power of ten; six characters."""
    return '0' if value == 0 else f'{value:.1e}'.replace('e-0', 'e-') if 0 < value < 9.5e-4 else f'{value:.4f}'


def _percent(share: float | None) -> str:
    """Whole percents only where nothing is lost: 99.96 % is not 100 %."""
    if share is None or share in (0, 1):
        return '-' if share is None else f'{share:.0%}'
    return f'{min(share, 0.999):.1%}'


def short(number: float | None) -> str:
    """A count in four characters or so: ``1.23M``."""
    for size, symbol in _SYMBOLS:
        if number is not None and number >= size:
            return f'{number / size:.3g}{symbol}'
    return '-' if number is None else str(int(number))


def draw(path: Path, rows: Sequence[dict[str, Any]], budget: float, title: str) -> None:
    """Accuracy against size: mean KL, on a logarithmic axis, over bytes per token; the suffix decides the file's kind.

    Raises:
        UserError: nothing to draw, or a suffix that matplotlib does not know.
    """
    points = [row for row in candidates(rows) if math.isfinite(row['mean_kl']) and row['mean_kl'] > 0]
    if not points:
        raise UserError(f'{path} is not drawn: no cache differs measurably and has a known size')
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    with rc_context({'svg.fonttype': 'none', 'font.size': 9}):
        figure = Figure(figsize=(8, 5), layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_yscale('log')
        for row in points:
            axes.plot(row['bytes_per_token'], row['mean_kl'], 's' if row['stock'] else 'o', markersize=7,
                      color='tab:gray' if row['stock'] else 'tab:blue')
        base = rows[0]['bytes_per_token']
        if base is not None:
            axes.axvline(base, color='black', linewidth=1)
            axes.text(base, 0.98, 'unquantized ', ha='right', va='top', transform=axes.get_xaxis_transform())
        levels = [(budget, 'tab:green', f' budget: {budget:g}')]
        levels += [(row['mean_kl'], 'tab:gray', ' a second unquantized run') for row in rows
                   if row['floor'] and row['error'] is None and row['mean_kl'] > 0]
        for level, color, text in levels:
            axes.axhline(level, color=color, linestyle='--', linewidth=1)
            axes.text(0, level, text, color=color, ha='left', va='bottom')
        axes.set_xlim(0, max([row['bytes_per_token'] for row in points] + [base or 0]) * 1.08)
        axes.margins(y=0.12)
        axes.set_xlabel('bytes per token and GPU')
        axes.set_ylabel('mean KL divergence from the unquantized cache, nats')
        axes.set_title(title, loc='left')
        axes.grid(True, which='major', alpha=0.3)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        _label(figure, axes, points)
        try:
            with replacing(path) as unfinished:
                figure.savefig(unfinished, dpi=150)
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is not drawn: {error}') from error


_SIDES = (((8, 0), 'left', 'center'), ((-8, 0), 'right', 'center'), ((0, 7), 'center', 'bottom'),
          ((0, -7), 'center', 'top'), ((8, -11), 'left', 'center'), ((8, 11), 'left', 'center'))


def _label(figure: Any, axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Names beside the points: each on the first side where it covers no point and no other name."""
    from matplotlib.transforms import Bbox
    figure.canvas.draw()  # the layout is known then, and where things are
    places = [axes.transData.transform((row['bytes_per_token'], row['mean_kl'])) for row in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    for row, here in zip(points, list(taken)):
        for offset, across, up in _SIDES:
            text = axes.annotate(row['format'], (row['bytes_per_token'], row['mean_kl']), offset, fontsize=8,
                                 textcoords='offset points', ha=across, va=up)
            box = text.get_window_extent(figure.canvas.get_renderer())
            free = not any(box.overlaps(other) for other in taken if other is not here)
            if (free and axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)) or offset == _SIDES[-1][0]:
                break
            text.remove()
        taken.append(box)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write everything that was measured, with where and when.

    Raises:
        UserError: the file cannot be written.
    """
    from ..environment import find_gpus, versions
    record = {'environment': {**versions(), 'gpus': find_gpus()[0],
                              'date': time.strftime('%Y-%m-%d', time.gmtime())}, **content}
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(_finite(record), indent=1) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'{path} is not written: {reason(error)}') from error


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
