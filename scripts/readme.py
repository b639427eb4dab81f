#!/usr/bin/env python3
"""Write the generated parts of README.md and docs/: the format table, measured figures, plots, and the hook table.

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. With --check, nothing is written and the exit
code says whether the files are current.
"""
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial

from compatibility import evidence, origin, tables
from decode_clocks import STAGES
from labels import label
from load_tables import rare, under_load
from markdown_tables import NOT_MEASURED, RESULTS, ROOT, measured, number, results, table
from targets import KNOWN, PRESETS, TARGETS, misses, verdicts

from lmdeploy_kvq import FORMATS, KVFormat, get_format
from lmdeploy_kvq.hook import PATCHES

SHAPE, LOAD, PAGE = '32x8x128', '64x4096', 64  # LMDeploy's default page
ALT = {'decode_context': 'Decode attention against bf16 by context length',
       'decode_bandwidth': 'Cache bytes read per second by shape',
       'decode_batch': 'Decode attention against bf16 by batch size', 'fill': 'Time to write new tokens against bf16',
       'engine': 'Decode step and tokens per second of an 8B model',
       'accuracy': 'Error of a model against the bytes of its cache, beside LMDeploy and vLLM'}


def formats() -> str:
    """One line per format: size from the table, accuracy and speed from the committed results."""
    accuracy, decode = results('accuracy_engine'), results('decode')

    def kl(policy: int, name: str) -> str:
        found = {r['domain']: r['mean_kl'] for r in accuracy if r['policy'] == policy and r['format'] == name}
        return f'{found["prose"]:.4f} / {found["technical"]:.4f}' if len(found) == 2 else 'not measured'

    def speed(contender: str, policy: int) -> str:
        row = next((r for r in decode if (r['contender'], r['policy'], r['shape'], r['load'], r['page'],
                                          r['query_len']) == (contender, policy, SHAPE, LOAD, PAGE, 1)), None)
        return 'not measured' if row is None else f'{row["vs_bf16"]:.2f}x'

    rows = [[_cache(fmt.name), str(fmt.policy),
             f'{fmt.bits_per_element(128):g}', f'{16 / fmt.bits_per_element(128):.2f}x',
             kl(fmt.policy, fmt.name), speed('kvq', fmt.policy)]
            for fmt in FORMATS]
    rows += [[f'*{name} (LMDeploy)*', str(policy), bits, f'{16 / float(bits):.2f}x', kl(policy, f'{name} (LMDeploy)'),
              speed('lmdeploy', policy)] for name, policy, bits in (('fp8', 16, '8'), ('int8', 8, '8.25'),
                                                                    ('int4', 4, '4.25'))]
    return table(['format', 'policy', 'bits per element', 'tokens per byte', 'KL prose / technical', 'decode time'],
                 rows) + measured('accuracy_engine', 'decode')


def _cache(name: str) -> str:
    """What accuracy results call a cache, as tables say it."""
    if name == 'none again':
        return 'bf16, once more'
    if 'LMDeploy' in name:
        return f'*{name}*'
    return f'`{name}`' + ' (experimental)' * bool(get_format(name).experimental)


def accuracy_engine() -> str:
    """What formats lose through the engine, and bf16 to itself: the floor."""
    found: dict[str, dict[str, dict]] = {}
    for row in results('accuracy_engine'):
        if row['format'] != 'none':
            found.setdefault(row['format'], {})[row['domain']] = row
    lines = [[_cache(name), *(
        f'{of[domain][key]:{form}}' for key, form in (('mean_kl', '.4f'), ('top1_agreement', '.1%'))
        for domain in ('technical', 'prose')), f'{of["technical"]["needle_exact"]:.0%}']
             for name, of in sorted(found.items(), key=lambda item: item[1]['technical']['mean_kl'])]
    return table(['cache', 'KL technical', 'KL prose', 'top 1 technical', 'top 1 prose', 'needles found'], lines) \
        + measured('accuracy_engine') if lines else NOT_MEASURED


def transform_gain() -> str:
    """What calibrated transforms gain through the engine, on passages they were not calibrated on."""
    lines = [[_cache(row['format']), row['transform'], f'{row["mean_kl"]:.4f}', f'{row["top1_agreement"]:.1%}']
             for row in results('transform_gain_engine') if row['format'] != 'none']
    return table(['cache', 'K transform', 'KL', 'top 1'], lines) + measured('transform_gain_engine') \
        if lines else NOT_MEASURED


def format_facts() -> str:
    """One line per format: what it is, and what it is called."""
    def scales(fmt: KVFormat) -> str:
        return '[static](scales.md)' if fmt.needs_scales else 'computed as tokens are written'

    keys = {None: 'none', 'hadamard': 'Hadamard', 'calibrated': 'Hadamard, or calibrated'}
    return table(['format', 'also called', 'what it is', 'scales', 'transform of keys'],
                 [[f'`{fmt.name}`', ', '.join(f'`{alias}`' for alias in (*fmt.aliases, fmt.policy)), fmt.label,
                   scales(fmt), keys[fmt.key.rotation]] for fmt in FORMATS])


def tensor_parallel() -> str:
    """Greedy tokens of two GPUs against one, as far as committed."""
    rows = [[f'`{row["policy"]}`', row['way'], f'{row["equal_sequences"]} of {row["sequences"]}']
            for row in results('tp') if row['way'] != 'tp=1']
    return table(['policy', 'GPUs', 'same sequences'], rows) if rows else NOT_MEASURED


def tensor_parallel_scales() -> str:
    """Scales per KV head on two GPUs against one, as far as committed."""
    rows = [[row['run'], f'{row["mean_kl"]:.2g}', f'{row["equal_sequences"]} of {row["sequences"]}']
            for row in results('tp_scales')]
    return table(['run', 'mean KL', 'same sequences'], rows) if rows else NOT_MEASURED


def compatibility() -> str:
    """What works, section by section, with the tests that show it."""
    tests = evidence()
    header = ['what', 'state', 'tests passed']
    parts = [f'## {title}\n\n{table(header, lines)}' for title, lines in tables(tests).items()]
    return '\n\n'.join([*parts, origin(tests)])


def hooks() -> str:
    """One line per patched target."""
    return table(['target', 'why'], [[f'`{patch.name}`', patch.why] for patch in PATCHES])


def decode(preset: str = 'targets', name: str = 'decode') -> str:
    """The committed decode measurements of a preset, whichever preset measured them; a column per policy."""
    rows = [row for row in results(name) if KNOWN[preset].holds(row)]
    if not rows:
        return NOT_MEASURED
    keys = {'shape': 'shape', 'load': 'load', 'page': 'page'}
    if any(row['query_len'] != 1 for row in rows):
        keys['query'] = 'query_len'
    return by_policy(rows, keys, lambda row: f'{row["us"]:.1f} us, {row["read_fraction"]:.0%}') + measured(name)


def by_policy(rows: list[dict], keys: dict[str, str], cell: Callable[[dict], str]) -> str:
    """A column per policy behind those of ``keys`` {header: field}: what ``cell`` says, and time against bf16's."""
    columns = list(dict.fromkeys((row['contender'], row['policy']) for row in rows))
    lines: dict[tuple, dict] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys.values()), {})[row['contender'], row['policy']] = row

    def text(row: dict | None) -> str:
        if row is None:
            return ''
        return cell(row) + ('' if (row['contender'], row['policy']) == ('lmdeploy', 0) else
                            f', {number(row, "vs_bf16", ".2f")}x')

    return table([*keys, *(label(*column) for column in columns)],
                 [[*map(str, line), *(text(found.get(column)) for column in columns)]
                  for line, found in lines.items()])


def layer() -> str:
    """The committed times of a layer's two launches."""
    rows = results('layer')
    return by_policy(rows, {'shape': 'shape', 'load': 'load'}, lambda row: f'{row["us"]:.1f} us') + measured('layer') \
        if rows else NOT_MEASURED


def targets() -> str:
    """Which targets the committed rows meet."""
    lines = [line for name in TARGETS for line in verdicts(name, results(name))]
    return table(['target', 'met', 'rows', 'missed', 'furthest off', 'bound', 'where'],
                 [[line['target'], line['met'], str(line.get('rows', '')), str(line.get('missed', '')),
                   number(line, 'worst', '.3f'), line.get('limit', ''), line.get('worst_row', '')] for line in lines]) \
        + measured(*TARGETS)


def decode_clocks() -> str:
    """Cycles of each stage of the programs that combine."""
    rows = results('decode_clocks')
    if not rows:
        return NOT_MEASURED
    return table(['shape', 'load', 'format', *STAGES],
                 [[row['shape'], row['load'], label(row['contender'], row['policy']),
                   *(f'{row[stage]:,.0f}' for stage in STAGES)] for row in rows]) + measured('decode_clocks')


def last_bit() -> str:
    """How far answers are from likely, by what gave them and who judges them."""
    said = {'as it is': 'the model as it is', 'with noise': 'the model with noise', 'control': 'to another prompt'}
    rows = [['exact' if row['format'] == 'none' else row['format'],
             f'{row["count"]}, {said.get(row["answers"], row["answers"])}', f'{row["median_worst_gap"]:.2f}',
             f'{row["worst_gap"]:.2f}', f'{row["likeliest"]:.1%}']
            for name in ('last_bit', 'dp_72') for row in results(name)]
    header = ['cache', 'answers', 'their worst token, median, nats', 'worst of all', 'tokens that are the likeliest']
    return table(header, rows) + measured('last_bit', 'dp_72') if rows else NOT_MEASURED


def acceptance() -> str:
    """Share of draft tokens that targets accept, by model and cache; of one model also what transformers foresees."""
    def share(row: dict, exact: dict, key: str) -> str:
        against = '' if row is exact or key not in row else f', {100 * (row[key] - exact[key]):+.1f} points'
        return number(row, key, '.1%') + against

    lines = []
    for name, model in (('acceptance_trained', 'SmolLM2'), ('acceptance', 'random weights')):
        rows = results(name)
        lines += [[model, label('kvq', row['policy']), f'{row["drafted"]:,}', share(row, rows[0], 'accepted'),
                   share(row, rows[0], 'accepted_by_transformers')] for row in rows]  # the bf16 cache is the first
    header = ['model', 'cache', 'tokens drafted', 'accepted by the engine', 'by transformers in fp32']
    return table(header, lines) + measured('acceptance_trained', 'acceptance') if lines else NOT_MEASURED


def batch_texts() -> str:
    """Of how many texts every token is that of the eager engine at batch 64, and what an engine says of the others."""
    rows = {(row['format'], row['way'], row['round']): row for row in results('engine_matrix')}
    names = list(dict.fromkeys(name for name, *_ in rows))

    def share(name: str, way: str, number: int) -> str:
        return f'{rows[name, way, number]["equal_sequences"]:.0%}'

    def said(name: str, key: str, form: str) -> str:
        found = [rows[name, way, number] for way, number in (('cache eager', 0), ('cache eager', 1),
                                                             ('cache prefix', 1), ('cache chunked', 0))]
        return ' / '.join(format(row[key], form) for row in found)

    lines = [['bf16' if name == 'none' else _cache(name), share(name, 'graph', 1), share(name, 'cache prefix', 1),
              share(name, 'cache chunked', 0), said(name, 'likeliest', '.1%'), said(name, 'worst_gap', '.2f')]
             for name in names]
    header = ['cache', 'the same at batch 7', 'with a prefix cache', 'in chunks',
              'tokens that are the likeliest: 64 / 7 / prefix / chunks', 'farthest from likely, nats']
    return table(header, lines) + measured('engine_matrix') if lines else NOT_MEASURED


def missed_targets() -> str:
    """Every committed row that misses its target."""
    lines = [line for name in TARGETS for line in misses(name, results(name))]
    return table(['target', 'measured', 'bound', 'where'], [
        [line['target'], number(line, 'value', '.3f'), line['limit'], line['row']] for line in lines]) \
        + measured(*TARGETS)


def engine(name: str = 'engine') -> str:
    """The committed end-to-end measurements."""
    rows = [[row['load'], str(row['tp']), label(row['contender'], row['policy']), number(row, 'step_ms', '.2f'),
             f'{number(row, "vs_bf16", ".2f")}x' if row.get('vs_bf16') else row.get('error', ''),
             *(number(row, key, form) for key, form in (('decode_tokens_per_s', '.0f'), ('ttft_s', '.2f'),
                                                        ('num_gpu_blocks', 'd')))] for row in results(name)]
    return table(['requests x tokens', 'GPUs', 'cache', 'decode step, ms', 'against bf16', 'tokens/s', 'median TTFT, s',
                  'pages that fit'], rows) + measured(name) if rows else NOT_MEASURED


def prefill() -> str:
    """The committed times to first token."""
    rows = [[row['case'], str(row['tokens']), str(row.get('cached_tokens', '')), label(row['contender'], row['policy']),
             number(row, 'ttft_s', '.3f'), number(row, 'spread', '.1%'),
             f'{number(row, "vs_bf16", ".3f")}x' if row.get('vs_bf16') else row.get('error', ''),
             number(row, 'peak_extra_gib', '.2f')] for row in results('prefill')]
    return table(['case', 'tokens', 'from the cache', 'cache', 'TTFT, s', 'spread', 'against bf16', 'peak memory, GiB'],
                 rows) + measured('prefill') if rows else NOT_MEASURED


def plots(*names: str, folder: str = 'benchmarks') -> str:
    """The figures that have been drawn; all of them if none is named."""
    drawn = {path.stem: path for path in sorted((ROOT / 'benchmarks').glob('*.svg'))}
    return '\n'.join(f'![{ALT.get(name, name)}]({folder}/{name}.svg)' for name in names or drawn if name in drawn) \
        or NOT_MEASURED


def fill() -> str:
    """The committed fill measurements."""
    rows = [[row['shape'], row['load'], label(row['contender'], row['policy']) + ', queries too' * row['queries'],
             f'{row["us"]:.1f}', f'{row["copy_fraction"]:.0%}', f'{row["vs_bf16"]:.2f}x'] for row in results('fill')]
    return table(['KV heads x size', 'load', 'kernel', 'us', '% of copy', 'against bf16'], rows) + measured('fill')


def profile() -> str:
    """The GPU's counters, one line per launch."""
    stalls = ('long_scoreboard', 'barrier', 'wait')
    rows = [[row['format'], row['shape'], row['load'], f'{row["us"]:.1f}', f'{row["bytes_read"] / 1e6:.1f}',
             f'{row["memory_percent"]:.0f}%', f'{row["issue_percent"]:.0f}%',
             *(f'{row[f"stall_{name}"]:.1f}' for name in stalls)]
            for row in results('profile') if 'error' not in row]
    return table(['format', 'shape', 'load', 'us', 'MB read', 'of bandwidth', 'of issue slots', 'waits for memory',
                  'a barrier', 'a fixed latency'], rows) + measured('profile') if rows else NOT_MEASURED


def calibration() -> str:
    """What calibrated scales gain, as measured on a CPU."""
    rows = [[row['model'], ' '.join([row['scales'], *(row[key] for key in ('method', 'granularity') if key in row)]),
             f'{row["mean_kl"]:.4f}', f'{row["against_original_at_1"]:.2f}x', f'{row["top1_agreement"]:.1%}']
            for row in results('calibration_gain')]
    return table(['model', 'scales', 'mean KL', 'against the original at 1.0', 'same top token'], rows)


def accuracy() -> str:
    """Every format and transform on a CPU, beside other systems', from the same run."""
    found: dict[tuple, dict] = {}
    for row in results('accuracy_cpu'):
        found.setdefault((row['owner'], row['format'], row['transform']), {})[row['domain']] = row
    lines = []
    for (owner, name, transform), rows in found.items():
        first = next(iter(rows.values()))
        ours = owner == 'lmdeploy_kvq'
        cell = _cache(name) if ours else f'*{owner} {name}*'
        lines.append([cell, transform if ours else '', f'{first["bytes_per_token"]:,.0f}',
                      *(f'{row["mean_kl"]:.2g} ± {row["kl_standard_error"]:.1g}' for row in rows.values()),
                      *(f'{row["perplexity"]:.2f}' for row in rows.values()),
                      *(f'{row["top1_agreement"]:.1%}' for row in rows.values())])
    domains = list(dict.fromkeys(row['domain'] for row in results('accuracy_cpu')))
    header = ['format', 'K transform', 'bytes per token', *(f'{what}, {domain}' for what in
                                                            ('KL', 'perplexity', 'same top token')
                                                            for domain in domains)]
    return table(header, lines) + measured('accuracy_cpu') if lines else NOT_MEASURED


def accuracy_targets() -> str:
    """KL against another system's, per domain."""
    path = RESULTS / 'accuracy_cpu.json'
    rows = json.loads(path.read_text())['targets'] if path.exists() else []
    return table(['format', 'K transform', 'against', 'target', 'technical', 'prose', 'verdict'],
                 [[f'`{row["format"]}`', row['transform'], row['against'], f'{row["limit"]:.2f}x',
                   f'{row["technical"]:.2f}x', f'{row["prose"]:.2f}x', row['verdict']] for row in rows]) \
        if rows else NOT_MEASURED


PARTS = {'accuracy': accuracy, 'accuracy-targets': accuracy_targets,
         'formats': formats, 'hooks': hooks, 'fill': fill, 'profile': profile, 'calibration': calibration,
         'targets': targets, 'missed-targets': missed_targets,
         'engine': engine, 'layer': layer, 'engine-tp2': partial(engine, 'engine_tp2'), 'prefill': prefill,
         'last-bit': last_bit, 'rare': rare, 'under-load': under_load, 'batch-texts': batch_texts,
         'acceptance': acceptance, 'decode-clocks': decode_clocks,
         'accuracy-engine': accuracy_engine, 'transform-gain': transform_gain,
         'tp': tensor_parallel, 'tp-scales': tensor_parallel_scales, 'format-facts': format_facts,
         'compatibility': compatibility, 'plots': partial(plots, 'decode_context', 'engine', 'accuracy'),
         'accuracy-plot': partial(plots, 'accuracy', folder='../benchmarks'),
         'all-plots': partial(plots, folder='../benchmarks'),
         'decode': decode, 'decode-peers': partial(decode, 'peers', 'decode_peers'),
         **{f'decode-{name}': partial(decode, name) for name in PRESETS if name != 'targets'}}


def main() -> int:
    stale = []
    for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))):
        text = path.read_text(encoding='utf-8')
        new = text
        for name, make in PARTS.items():
            if f'<!-- {name} -->' in text:
                part = make()
                new = re.sub(f'<!-- {name} -->.*?<!-- /{name} -->',
                             lambda _, name=name, part=part: f'<!-- {name} -->\n{part}\n<!-- /{name} -->', new,
                             flags=re.S)
        if new != text:
            stale.append(path.name)
            if '--check' not in sys.argv:
                path.write_text(new, encoding='utf-8')
    print('written:' if '--check' not in sys.argv else 'stale:', ', '.join(stale) or 'nothing')
    return int(bool(stale) and '--check' in sys.argv)


if __name__ == '__main__':
    sys.exit(main())
