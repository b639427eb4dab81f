#!/usr/bin/env python3
"""Draw benchmarks/*.svg from benchmarks/results/*.json, and from nothing else.

The same results give the same files: no date, fixed ids. A figure whose rows have not been measured is left out, with a
line that says what is missing; so are policies and loads inside a figure.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from labels import BF16, label
from targets import MAIN, SPEED_LOAD

from lmdeploy_kvq import FORMATS

matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

ROOT = Path(__file__).resolve().parent.parent / 'benchmarks'
SHAPE, PAGE = MAIN[0], 64
FILL_SHAPE = '8x128'
# Okabe and Ito's colours and three of Tol's, apart for colour-blind readers; markers tell lines apart as well.
OURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#882255', '#999933', '#332288')
THEIRS = ('#404040', '#8C8C8C', '#B5B5B5', '#D5D5D5', '#E5E5E5')
MARKERS = 'osD^vPXh*'
COLUMNS = 5  # of a legend
OWNER = 'lmdeploy_kvq'
OWNERS = {'LMDeploy': ('#404040', 's'), 'vLLM': ('#8C8C8C', 'o'), 'Lloyd-Max': ('#B5B5B5', 'D')}  # colour, marker
plt.rcParams.update({
    'svg.hashsalt': 'lmdeploy_kvq', 'svg.fonttype': 'path', 'font.size': 10, 'axes.titlesize': 10.5,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'axes.axisbelow': True,
    'grid.color': '#E6E6E6', 'grid.linewidth': 0.8, 'legend.frameon': False, 'figure.facecolor': 'white',
})

Series = dict[str, dict[object, float]]  # {label: {x: y}}


def style(name: str, labels: Iterable[str]) -> tuple[str, str]:
    """Colour and marker: a format keeps its own in all figures; other kernels are grey."""
    names = [fmt.name for fmt in FORMATS]
    if name in names:
        return OURS[names.index(name) % len(OURS)], MARKERS[names.index(name) % len(MARKERS)]
    others = [other for other in labels if other not in names]
    return THEIRS[others.index(name) % len(THEIRS)], MARKERS[-1 - others.index(name) % len(MARKERS)]


def ordered(labels: Iterable[str]) -> list[str]:
    """Other kernels first, bf16 before all, then ours as in the format table."""
    names = [fmt.name for fmt in FORMATS]
    return sorted(set(labels), key=lambda name: (name in names, name != BF16, names.index(name) if name in names else 0,
                                                 name))


class Results:
    """Rows of a result file, with a ``label``, or none; failed rows are left out."""

    def __init__(self, name: str, folder: Path):
        path = folder / f'{name}.json'
        data = json.loads(path.read_text()) if path.exists() else {'rows': [], 'environment': {}}
        self.name, self.environment = name, data['environment']
        self.rows = [{**row, 'label': label(row['contender'], row['policy']) if 'policy' in row else row['format']}
                     for row in data['rows'] if not row.get('error')]
        self.extra = {key: value for key, value in data.items() if key not in ('rows', 'environment')}

    @property
    def source(self) -> str:
        """The figure's foot line."""
        env = self.environment
        if not int(env['gpus']):
            return f'CPU, torch {env["torch"]}, transformers {env["transformers"]}, commit {env["commit"].split()[0]}'
        return f'{env["gpu"]}, LMDeploy {env["lmdeploy"]}, Triton {env["triton"]}, commit {env["commit"].split()[0]}'


def series(rows: Iterable[dict], x: str, y: str) -> Series:
    """Rows as {label: {row[x]: row[y]}}."""
    found: Series = {}
    for row in rows:
        if row.get(y) is not None:
            found.setdefault(row['label'], {}).setdefault(row[x], row[y])
    return found


def finish(figure, results: Results, title: str, labels: list[str], handles: list, path: Path) -> None:
    """Title, one legend, source, and the file."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.05 / height, title, ha='left', va='top', fontsize=12, fontweight='bold')
    figure.legend(handles, labels, loc='upper left', bbox_to_anchor=(0.0, 1 - 0.26 / height), ncols=COLUMNS,
                  columnspacing=1.4, handlelength=1.6, fontsize=9)
    figure.text(0.995, 0.006, results.source, ha='right', va='bottom', fontsize=7.5, color='#707070')
    legend_lines = -(-len(labels) // COLUMNS)
    figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - (0.36 + 0.2 * legend_lines) / height), w_pad=1.6)
    figure.savefig(path, metadata={'Date': None, 'Creator': None})
    plt.close(figure)


def lines(panels: dict[str, Series], results: Results, title: str, xlabel: str, path: Path) -> None:
    """One panel per entry: time against bf16 over a logarithmic x."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True, squeeze=False)
    labels = [name for name in ordered(name for data in panels.values() for name in data) if name != BF16]
    handles: dict[str, object] = {}
    for axis, (name, data) in zip(axes[0], panels.items()):
        axis.axhline(1, color='black', linewidth=1.2)
        ticks: set = set()
        for line in (line for line in labels if line in data):
            colour, marker = style(line, labels)
            points = sorted(data[line].items())
            ticks.update(x for x, _ in points)
            # two points far apart say nothing of what is between them
            handles[line] = axis.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=1.6,
                                      linestyle='-' if len(points) > 2 else '')[0]
        axis.set(title=name, xscale='log', xlabel=xlabel)
        shown = apart(sorted(ticks), 4 if len(panels) > 3 else 5)
        axis.set_xticks(shown, [short(x) for x in shown])
        axis.minorticks_off()
    axes[0][0].set_ylim(0, max(1.15, axes[0][0].get_ylim()[1]))
    axes[0][0].set_ylabel('time, bf16 = 1')
    axes[0][-1].annotate(BF16, (0.98, 1), xycoords=('axes fraction', 'data'), xytext=(0, 3), textcoords='offset points',
                        ha='right', fontsize=8)
    finish(figure, results, title, list(handles), list(handles.values()), path)


def bars(panels: dict[str, Series], results: Results, title: str, ylabel: str, path: Path,
         ceiling: Series | None = None, unit: float | None = None) -> None:
    """Groups of bars; ``ceiling`` draws a mark over each bar, ``unit`` a line across."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), squeeze=False)
    labels = ordered(name for data in panels.values() for name in data)
    handles: dict[str, object] = {}
    for axis, (name, data) in zip(axes[0], panels.items()):
        groups = list(dict.fromkeys(x for points in data.values() for x in points))
        present = [line for line in labels if line in data]
        width = 0.84 / len(present)
        for number, line in enumerate(present):
            colour, _ = style(line, labels)
            places = [groups.index(x) + (number - (len(present) - 1) / 2) * width for x in data[line]]
            handles[line] = axis.bar(places, list(data[line].values()), width * 0.94, color=colour)
            if ceiling:
                left, right = [p - width / 2 for p in places], [p + width / 2 for p in places]
                handles['pure read'] = axis.hlines(
                    [ceiling[line][x] for x in data[line]], left, right, color='black', linewidth=1.5)
        if unit is not None:
            axis.axhline(unit, color='black', linewidth=1.2)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(name)
        axis.grid(axis='x', visible=False)
    axes[0][0].set_ylabel(ylabel)
    names = sorted(handles, key=lambda h: h not in labels)
    finish(figure, results, title, names, [handles[n] for n in names], path)


def apart(ticks: list[int], count: int) -> list[int]:
    """Those of the ticks, about ``count``, that are far enough apart on a logarithmic axis."""
    factor = (ticks[-1] / ticks[0])**(1 / count)
    shown = ticks[:1]
    for tick in ticks[1:]:
        if tick >= shown[-1] * factor * 0.99:
            shown.append(tick)
    return shown


def short(number: int) -> str:
    """4096 as 4k."""
    for power, letter in ((20, 'M'), (10, 'k')):
        if number >= 1 << power and number % (1 << power) == 0:
            return f'{number >> power}{letter}'
    return str(number)


def decode_rows(results: Results) -> list[dict]:
    """The main shape at LMDeploy's page size and query length 1, with ``batch`` and ``tokens`` (None: ragged); batches
    that are padded are not among them."""
    rows = [row for row in results.rows if (row['shape'], row['page'], row['query_len']) == (SHAPE, PAGE, 1)
            and '+' not in row['load']]
    for row in rows:
        ragged, _, batch = row['load'].partition(':')
        row['batch'], row['tokens'] = (int(batch), None) if batch else map(int, ragged.split('x'))
    return rows


def largest(rows: list[dict], group: str, over: str, count: int) -> list:
    """The ``count`` values of ``group`` with the most different values of ``over``, three at least."""
    sizes = {key: len({row[over] for row in rows if row[group] == key}) for key in {row[group] for row in rows}}
    return sorted(sorted((key for key in sizes if sizes[key] >= 3), key=lambda key: (-sizes[key], key))[:count])


def by_context(folder: Path, out: Path) -> str | None:
    """decode_context.svg."""
    results = Results('decode', folder)
    rows = [row for row in decode_rows(results) if row['tokens']]
    panels = {f'{batch} sequence{"s" * (batch > 1)}':
              series((row for row in rows if row['batch'] == batch), 'tokens', 'vs_bf16')
              for batch in largest(rows, 'batch', 'tokens', 3)}
    if not panels:
        return f'decode.json has no batch size of {SHAPE}, page {PAGE}, with three context lengths'
    lines(panels, results, f'Decode attention by context length ({SHAPE}, pages of {PAGE})',
          'cached tokens per sequence', out)
    return None


def by_batch(folder: Path, out: Path) -> str | None:
    """decode_batch.svg."""
    results = Results('decode', folder)
    rows = decode_rows(results)
    even, ragged = [row for row in rows if row['tokens']], [row for row in rows if not row['tokens']]
    panels = {f'{short(tokens)} tokens each':
              series((row for row in even if row['tokens'] == tokens), 'batch', 'vs_bf16')
              for tokens in largest(even, 'tokens', 'batch', 3)}
    if len({row['batch'] for row in ragged}) >= 3:
        panels['16 to 32k tokens, mixed'] = series(ragged, 'batch', 'vs_bf16')
    if not panels:
        return f'decode.json has no context length of {SHAPE}, page {PAGE}, with three batch sizes'
    lines(panels, results, f'Decode attention by batch size ({SHAPE}, pages of {PAGE})', 'sequences', out)
    return None


def bandwidth(folder: Path, out: Path) -> str | None:
    """decode_bandwidth.svg."""
    results = Results('decode', folder)
    rows = [row for row in results.rows if (row['load'], row['page'], row['query_len']) == (SPEED_LOAD, PAGE, 1)]
    if not rows:
        return f'decode.json has no rows of {SPEED_LOAD}, page {PAGE}'
    for row in rows:
        row['achieved'], row['ceiling'] = (row['payload_bytes'] / row[time] / 1e6 for time in ('us', 'read_us'))
    bars({'query heads x KV heads x head size': series(rows, 'shape', 'achieved')}, results,
         f'Cache bytes read per second, {SPEED_LOAD.replace("x", " sequences of ")} tokens, pages of {PAGE}', 'TB/s',
         out, ceiling=series(rows, 'shape', 'ceiling'))
    return None


def fill(folder: Path, out: Path) -> str | None:
    """fill.svg."""
    results = Results('fill', folder)
    rows = [row for row in results.rows if (row['shape'], row['page'], row['queries']) == (FILL_SHAPE, PAGE, False)]
    if not rows:
        return f'fill.json has no rows of {FILL_SHAPE}, page {PAGE}'
    panels = {'new tokens, one per sequence': 'decode', 'one prompt, tokens': 'prefill'}
    for row in rows:
        row['kind'], row['size'] = row['load'].split(':')
    bars({title: series((row for row in rows if row['kind'] == kind), 'size', 'vs_bf16')
          for title, kind in panels.items() if any(row['kind'] == kind for row in rows)}, results,
         f'Writing new tokens into the cache ({FILL_SHAPE}, pages of {PAGE})', 'time, bf16 = 1', out, unit=1)
    return None


def engine(folder: Path, out: Path) -> str | None:
    """engine.svg."""
    results = Results('engine', folder)
    if not results.rows:
        return 'engine.json is not there, or has no row without an error'
    for row in results.rows:
        requests, tokens = row['load'].split('x')
        row['where'] = f'{requests} x {tokens}' + (f', tp={row["tp"]}' if row['tp'] > 1 else '')
    bars({'decode step, ms': series(results.rows, 'where', 'step_ms'),
          'output tokens per second': series(results.rows, 'where', 'decode_tokens_per_s')}, results,
         'Llama-3.1-8B\'s shape, end to end: requests x prompt tokens', '', out)
    return None


def accuracy(folder: Path, out: Path) -> str | None:
    """accuracy.svg: a labelled point per format, ours coloured (hollow: calibrated), other systems' grey."""
    results = Results('accuracy_cpu', folder)
    if not results.rows:
        return 'accuracy_cpu.json is not there'
    points: dict[tuple, list[dict]] = {}
    for row in results.rows:
        if row['mean_kl'] and row['transform'] != 'diagonal' and ',' not in row['format']:
            points.setdefault((row['owner'], row['format'], row['transform']), []).append(row)
    ours = [fmt.name for fmt in FORMATS]
    figure, axis = plt.subplots(figsize=(9, 5), dpi=72)  # what the svg renderer measures text in
    texts = []
    for (owner, name, transform), rows in points.items():
        size, kl = rows[0]['bytes_per_token'], sum(row['mean_kl'] for row in rows) / len(rows)
        own, calibrated = owner == OWNER, transform == 'balanced'
        colour, marker = style(name, ours) if own else OWNERS[owner]
        axis.plot(size, kl, marker, color=colour, markersize=7, markeredgewidth=1.6,
                  markerfacecolor='white' if calibrated else colour)
        text = name + ', calibrated' * calibrated if own else f'{owner} {name}'
        texts.append((size, kl, text, colour if own else '#404040'))
    largest_size = max(text[0] for text in texts)
    axis.set(yscale='log', xlabel='bytes per token', ylabel='mean KL divergence from the unquantized cache',
             xlim=(0.1 * largest_size, 1.22 * largest_size))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.9)  # about what finish() makes of it
    annotate(axis, texts)
    finish(figure, results, f'What a byte buys: error of {results.extra["model"]} by the size of its cache', [], [],
           out)
    return None


def annotate(axis, texts: list[tuple[float, float, str, str]]) -> None:
    """Labels (x, y, text, colour) beside their points, each on the first side where nothing else is."""
    spots = [axis.transData.transform(text[:2]) for text in texts]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in spots]
    for x, y, text, colour in texts:
        for shift, height, side in ((8, 0, 'left'), (-8, 0, 'right'), (8, 8, 'left'), (-8, 8, 'right'), (8, -8, 'left'),
                                    (-8, -8, 'right'), (8, 14, 'left'), (-8, 14, 'right')):
            note = axis.annotate(text, (x, y), xytext=(shift, height), textcoords='offset points', fontsize=8,
                                 color=colour, ha=side, va='center')
            box = note.get_window_extent().padded(-1)
            own = axis.transData.transform((x, y))
            free = not any(box.overlaps(other) and not other.contains(*own) for other in taken)
            if free and axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1:
                break
            note.remove()
        else:
            note = axis.annotate(text, (x, y), xytext=(8, 0), textcoords='offset points', fontsize=8, color=colour,
                                 va='center')
        taken.append(note.get_window_extent())


FIGURES = {'decode_context': by_context, 'decode_batch': by_batch, 'decode_bandwidth': bandwidth, 'fill': fill,
           'engine': engine, 'accuracy': accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=ROOT / 'results', help='folder of the JSON files')
    parser.add_argument('--out', type=Path, default=ROOT, help='folder of the figures')
    parser.add_argument('--format', default='svg', choices=('svg', 'png'))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = args.out / f'{name}.{args.format}'
        missing = draw(args.results, path)
        print(f'{name}: not drawn: {missing}' if missing else path)


if __name__ == '__main__':
    main()
