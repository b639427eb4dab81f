#!/usr/bin/env python3
"""Write the generated parts of README.md and docs/: the format table with measured figures, and the hook table.

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. With --check, nothing is written and the exit
code says whether the files are current.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from lmdeploy_kvq import FORMATS
from lmdeploy_kvq.hook import PATCHES

ROOT = Path(__file__).resolve().parent.parent
SHAPE, LOAD, PAGE = '32x8x128', '64x4096', 64  # LMDeploy's default page


def results(name: str) -> list[dict]:
    """Rows of a result file."""
    return json.loads((ROOT / 'benchmarks' / 'results' / f'{name}.json').read_text())['rows']


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (header, ['---'] * len(header), *rows))


def formats() -> str:
    """One line per format: size from the table, accuracy and speed from the committed results."""
    accuracy, decode = results('accuracy_engine'), results('decode')

    def kl(policy: int, name: str) -> str:
        found = {r['domain']: r['mean_kl'] for r in accuracy if r['policy'] == policy and r['format'] == name}
        return f'{found["prose"]:.4f} / {found["technical"]:.4f}'

    def speed(contender: str, policy: int) -> str:
        row = next((r for r in decode if (r['contender'], r['policy'], r['shape'], r['load'], r['page'],
                                          r['query_len']) == (contender, policy, SHAPE, LOAD, PAGE, 1)), None)
        return 'not measured' if row is None else f'{row["vs_bf16"]:.2f}x'

    rows = [[f'`{fmt.name}`', str(fmt.policy), f'{fmt.bits_per_element(128):g}',
             f'{16 / fmt.bits_per_element(128):.2f}x', kl(fmt.policy, fmt.name), speed('kvq', fmt.policy)]
            for fmt in FORMATS]
    rows += [[f'*{name} (LMDeploy)*', str(policy), bits, f'{16 / float(bits):.2f}x', kl(policy, f'{name} (LMDeploy)'),
              speed('lmdeploy', policy)] for name, policy, bits in (('fp8', 16, '8'), ('int8', 8, '8.25'),
                                                                    ('int4', 4, '4.25'))]
    return table(['format', 'policy', 'bits per element', 'tokens per byte', 'KL prose / technical', 'decode time'],
                 rows)


def hooks() -> str:
    """One line per patched target."""
    return table(['target', 'why'], [[f'`{patch.name}`', patch.why] for patch in PATCHES])


def decode() -> str:
    """The committed decode measurements."""
    rows = [[row['shape'], row['load'], str(row['page']), f'{row["contender"]} {row["policy"]}', f'{row["us"]:.1f}',
             f'{row["read_fraction"]:.0%}', f'{row["vs_bf16"]:.2f}x' if row['vs_bf16'] else '']
            for row in results('decode')]
    return table(['shape', 'load', 'page', 'kernel and policy', 'us', '% of read', 'against bf16'], rows)


def fill() -> str:
    """The committed fill measurements."""
    rows = [[row['shape'], row['load'], f'{row["contender"]} {row["policy"]}', f'{row["us"]:.1f}',
             f'{row["copy_fraction"]:.0%}', f'{row["vs_bf16"]:.2f}x'] for row in results('fill')]
    return table(['KV heads x size', 'load', 'kernel and policy', 'us', '% of copy', 'against bf16'], rows)


def calibration() -> str:
    """What calibrated scales gain, as measured on a CPU."""
    rows = [[row['model'], ' '.join([row['scales'], *(row[key] for key in ('method', 'granularity') if key in row)]),
             f'{row["mean_kl"]:.4f}', f'{row["against_original_at_1"]:.2f}x', f'{row["top1_agreement"]:.1%}']
            for row in results('calibration_gain')]
    return table(['model', 'scales', 'mean KL', 'against the original at 1.0', 'same top token'], rows)


PARTS = {'formats': formats, 'hooks': hooks, 'decode': decode, 'fill': fill, 'calibration': calibration}


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
