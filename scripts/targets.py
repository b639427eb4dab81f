"""The speed targets: what the decode benchmark measures for them, as presets, and whether rows meet them.

The contenders of most presets are LMDeploy's bf16 kernel and the formats of :data:`POLICIES`. A target finds its rows,
and for each the measured value and the bound.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from lmdeploy_kvq.formats import FORMATS, find_format

POLICIES = ('fp8_per_token_head', 'int8_per_token_head', 'fp8')
MAIN = ('32x8x128', '64x8x128', '28x4x128', '16x2x128')
SMALL, LARGE = ('9x3x64', '32x8x64'), ('16x4x256', )
LOADS = ('64x4096', '256x1024', '16x8192', '1x131072')
SPEED_LOAD, CLIFF_BYTES = '64x4096', 128e6
ONE = tuple(f'1x{4096 << i}' for i in range(9))  # one sequence, 4k to 1M tokens
CONSTANT = tuple(f'{(1 << 20) >> i}x{1 << i}' for i in range(12, 21, 2))  # 1M tokens, in ever longer sequences
LADDER = ('1x128', '1x512', '1x2048', '1x8192', '1x32768', '8x128', '8x512', '8x2048', '8x8192', '32x128', '32x512',
          '32x2048', '64x128', '64x512', '64x2048', '256x128', '256x512')
RAGGED = tuple(f'ragged:{batch}' for batch in (1, 4, 16, 64, 256))
QUERY_LENS = (1, 2, 4, 8)
PADDED = ('5x8192', '5x8192+3', '20x2048', '20x2048+12', '40x4096', '40x4096+24')  # and what CUDA graphs make of them
FORMAT_LOADS = ('1x131072', '8x512', '1x512', 'ragged:64')
FILL_STEPS = ('decode:64', 'decode:256')
FORMAT_LIMITS = {'int8_per_token_head': 0.60, 'k8v4_per_token_head': 0.60, 'int4_per_token_head': 0.50,
                 'k4v2_per_token_head': 0.50, 'int2_per_token_head': 0.45}
"""Time against LMDeploy's bf16 kernel that rotated formats may take, 32x8x128 at 64x4096, page 128."""
VERDICT = ('point', 'target', 'met', 'rows', 'missed', 'worst', 'limit', 'worst_row')  # columns


CONTENDERS = ('lmdeploy:0', *(f'kvq:{name}' for name in POLICIES))
ROTATED = tuple(f'kvq:{name}' for name in FORMAT_LIMITS if name not in POLICIES)
EVERY = ('lmdeploy:0', 'lmdeploy:16', 'lmdeploy:8', 'lmdeploy:4', *(f'kvq:{fmt.name}' for fmt in FORMATS))


@dataclasses.dataclass(frozen=True)
class Preset:
    """What to measure: every combination."""
    shapes: Sequence[str]
    loads: Sequence[str]
    pages: Sequence[int] = (64, )
    query_lens: Sequence[int] = (1, )
    contenders: Sequence[str] = CONTENDERS

    def holds(self, row: dict) -> bool:
        """Whether a row of decode.json is one of its measurements."""
        policy = find_format(row['policy']).name if row['contender'] == 'kvq' else row['policy']
        return all((row['shape'] in self.shapes, row['load'] in self.loads, row['page'] in self.pages,
                    row['query_len'] in self.query_lens, f'{row["contender"]}:{policy}' in self.contenders))


PRESETS = {
    'targets': Preset((*MAIN, *SMALL, *LARGE), LOADS, (64, 128)),
    'cliff': Preset(('32x8x128', '16x2x128'), (*LADDER, *RAGGED)),
    'flat': Preset(('32x8x128', ), (*ONE, *CONSTANT)),
    'query-len': Preset(('32x8x128', '28x4x128'), (SPEED_LOAD, ), (64, ), QUERY_LENS),
    'formats': Preset((MAIN[0], ), (SPEED_LOAD, *FORMAT_LOADS), (64, 128), contenders=EVERY),
    'rotated': Preset(('32x8x128', '16x2x128'), (*LADDER, *RAGGED), contenders=(CONTENDERS[0], *ROTATED)),
    'padded': Preset((MAIN[0], ), PADDED, contenders=(*CONTENDERS[:2], 'kvq:int4_per_token_head')),
}
OTHERS = {'peers': Preset((MAIN[0], MAIN[2]), LOADS, contenders=(*CONTENDERS, 'flashinfer:0', 'flashinfer:16'))}
"""What no target is about."""
KNOWN = {**PRESETS, **OTHERS}

Bound = tuple[float, float, dict]  # value, limit, row


def tokens_of(load: str) -> int | None:
    """Cached tokens of a load, None if its lengths differ."""
    if load.startswith('ragged'):
        return None
    batch, tokens = map(int, load.partition('+')[0].split('x'))
    return batch * tokens


def read_limit(shape: str, load: str) -> float:
    """The share of a pure read that decode has to reach."""
    if shape in SMALL:
        return 0.80
    if shape in LARGE or (shape == '16x2x128' and load in ('64x4096', '1x131072')):
        return 0.85
    return 0.90


def _bandwidth(rows: Sequence[dict]) -> Iterator[Bound]:
    return ((row['read_fraction'], read_limit(row['shape'], row['load']), row) for row in rows
            if PRESETS['targets'].holds(row))


def _speed(rows: Sequence[dict]) -> Iterator[Bound]:
    return ((row['vs_bf16'], 0.56, row) for row in rows
            if (row['load'], row['shape'], row['query_len'], row['format']) == (SPEED_LOAD, MAIN[0], 1, POLICIES[0])
            and row['vs_bf16'])


def _no_cliff(rows: Sequence[dict]) -> Iterator[Bound]:
    return ((row['vs_bf16'], 1.05, row) for row in rows if row['query_len'] == 1 and row['vs_bf16'])


def _large_payload(rows: Sequence[dict]) -> Iterator[Bound]:
    return ((row['vs_bf16'], 0.65, row) for row in rows
            if row['query_len'] == 1 and row['vs_bf16'] and row['payload_bytes'] > CLIFF_BYTES)


def _formats(rows: Sequence[dict]) -> Iterator[Bound]:
    return ((row['vs_bf16'], FORMAT_LIMITS[row['format']], row) for row in rows if row['format'] in FORMAT_LIMITS
            and (row['load'], row['shape'], row['page'], row['query_len']) == (SPEED_LOAD, MAIN[0], 128, 1)
            and row['vs_bf16'])


def _pages(rows: Sequence[dict]) -> Iterator[Bound]:
    rows = [row for row in rows if row['format'] in FORMAT_LIMITS
            and (row['load'], row['shape'], row['query_len']) == (SPEED_LOAD, MAIN[0], 1)]
    for _, group in _groups(rows, ('format', )):
        times = {row['page']: row['us'] for row in group}
        if len(times) == 2:
            yield times[64] / times[128], 1.10, group[0]


def _no_rotated_cliff(rows: Sequence[dict]) -> Iterator[Bound]:
    return _no_cliff([row for row in rows if row['format'] in FORMAT_LIMITS])


def _rotated(queries: bool) -> Callable[[Sequence[dict]], Iterator[Bound]]:
    """K and V rotated and written, steps and prompts; or steps with what LMDeploy's kernel does not do, the queries."""
    def bounds(rows: Sequence[dict]) -> Iterator[Bound]:
        return ((row['vs_bf16'], 1.3, row) for row in rows
                if row['format'] in FORMAT_LIMITS and row['queries'] == queries and row.get('vs_bf16'))
    return bounds


_rotated_fill, _rotated_queries = _rotated(False), _rotated(True)


def _flat(loads: Sequence[str]) -> Callable[[Sequence[dict]], Iterator[Bound]]:
    def bounds(rows: Sequence[dict]) -> Iterator[Bound]:
        rows = [row for row in rows if row['load'] in loads and row['query_len'] == 1]
        for _, group in _groups(rows, ('policy', 'shape', 'page')):
            costs = {row['load']: row['us'] / tokens_of(row['load']) for row in group}
            least = min(costs.values())
            yield from ((costs[row['load']] / least, 1.10, row) for row in group if len(group) > 1)
    return bounds


def _query_len(rows: Sequence[dict]) -> Iterator[Bound]:
    one = {_key(row): row['us'] for row in rows if row['query_len'] == 1}
    return ((row['us'] / one[_key(row)], 1.25, row) for row in rows
            if row['query_len'] == 4 and row['load'] == SPEED_LOAD and _key(row) in one)


def _simple(measure: str, limit: float, **where: object) -> Callable[[Sequence[dict]], Iterator[Bound]]:
    """Rows whose fields are as given (a set: one of them), each with the same bound."""
    def bounds(rows: Sequence[dict]) -> Iterator[Bound]:
        return ((row[measure], limit, row) for row in rows if row.get(measure) is not None
                and all(row[key] in want if isinstance(want, set) else row[key] == want for key, want in where.items()))
    return bounds


# per benchmark: point of the issue, name, at least (or at most), rows
TARGETS: dict[str, tuple[tuple[int, str, bool, Callable[[Sequence[dict]], Iterable[Bound]]], ...]] = {
    'decode': (
        (1, 'share of read', True, _bandwidth),
        (1, 'time against bf16, 64x4096', False, _speed),
        (2, 'no load slower than bf16', False, _no_cliff),
        (2, 'beyond 128 MB against bf16', False, _large_payload),
        (2, 'cost per token, one sequence', False, _flat(ONE)),
        (2, 'cost per token, 1M tokens', False, _flat(CONSTANT)),
        (3, 'query length 4 against 1', False, _query_len),
        (5, 'rotated formats against bf16', False, _formats),
        (5, 'rotated formats, page 64 against 128', False, _pages),
        (5, 'rotated formats, no load slower than bf16', False, _no_rotated_cliff),
    ),
    'fill': (
        (4, 'one decode step against bf16', False, _simple('vs_bf16', 1.1, load=set(FILL_STEPS))),
        (4, '8,192 prompt tokens, share of copy', True, _simple('copy_fraction', 0.6, load='prefill:8192')),
        (5, 'rotated formats, new tokens against bf16', False, _rotated_fill),
        (5, 'rotated formats, with the step\'s queries', False, _rotated_queries),
    ),
    'prefill': (
        (5, 'TTFT without history against bf16', False, _simple('vs_bf16', 1.02, case='whole')),
        (5, 'TTFT with history against bf16', False, _simple('vs_bf16', 1.10, case={'prefix', 'chunked'})),
    ),
    'engine': (
        (6, 'decode step against bf16', False, _simple('vs_bf16', 0.70, load='64x8192')),
        (6, 'time per output token against bf16', False, _simple('vs_bf16', 0.70, load='256x2048')),
    ),
}


_OF_ALL_FORMATS = (_formats, _pages, _no_rotated_cliff, _rotated_fill, _rotated_queries)


def _key(row: dict) -> tuple:
    return tuple(row[k] for k in ('contender', 'policy', 'shape', 'load', 'page'))


def _groups(rows: Sequence[dict], keys: Sequence[str]) -> Iterator[tuple[tuple, list[dict]]]:
    def of(row: dict) -> tuple:
        return tuple(row[k] for k in keys)
    return ((key, list(group)) for key, group in itertools.groupby(sorted(rows, key=of), of))


def _findings(benchmark: str, rows: Sequence[dict]) -> Iterator[tuple[int, str, bool, list[Bound]]]:
    """Point, name, whether it is a lower bound, and the rows of each target.

    Args:
        benchmark: whose rows they are, a key of :data:`TARGETS`. Of the rows, :data:`POLICIES` are held to the targets,
            and rotated formats to theirs.
    """
    every = [{**row, 'format': find_format(row['policy']).name} for row in rows if row['contender'] == 'kvq']
    ours = [row for row in every if row['format'] in POLICIES]
    for point, name, at_least, find in TARGETS[benchmark]:
        yield point, name, at_least, list(find(every if find in _OF_ALL_FORMATS else ours))


def _where(row: dict) -> str:
    return ', '.join(f'{key} {row[key]}' if key in ('page', 'tp') else row[key]
                     for key in ('format', 'shape', 'load', 'case', 'page', 'tp') if key in row)


def verdicts(benchmark: str, rows: Sequence[dict]) -> list[dict]:
    """One line per target: whether every row meets it, how many do not, and the row that is furthest off."""
    lines = []
    for point, name, at_least, bounds in _findings(benchmark, rows):
        sign = -1 if at_least else 1
        if not bounds:
            lines.append({'point': point, 'target': name, 'met': 'not measured'})
            continue
        value, limit, row = max(bounds, key=lambda b: sign * (b[0] - b[1]))
        missed = sum(sign * b[0] > sign * b[1] for b in bounds)
        lines.append({'point': point, 'target': name, 'met': 'no' if missed else 'yes', 'rows': len(bounds),
                      'missed': missed, 'worst': value, 'limit': f'{"at least" if at_least else "at most"} {limit}',
                      'worst_row': _where(row)})
    return lines


def misses(benchmark: str, rows: Sequence[dict]) -> list[dict]:
    """Every row that misses a target, those furthest off first."""
    lines = []
    for point, name, at_least, bounds in _findings(benchmark, rows):
        sign = -1 if at_least else 1
        missed = sorted((b for b in bounds if sign * b[0] > sign * b[1]), key=lambda b: -sign * (b[0] - b[1]))
        lines += [{'point': point, 'target': name, 'value': value, 'row': _where(row),
                   'limit': f'{"at least" if at_least else "at most"} {limit}'} for value, limit, row in missed]
    return lines
