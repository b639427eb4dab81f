"""Tables of the server under load, for readme.py: what soak.py measured, and what rounding.py was asked about."""
from __future__ import annotations

from compatibility import SOAKS
from markdown_tables import NOT_MEASURED, RESULTS, measured, number, results, table


def runs() -> list[str]:
    """Names of the last run of every seed."""
    return [path.stem for names in SOAKS for path in sorted(RESULTS.glob(names))]


def under_load() -> str:
    """Answers, throughput, and latencies as median and 99th percentile, of every cache in every run that was judged."""
    def both(row: dict, name: str) -> str:
        return f'{number(row, f"{name}_p50", ".0f")}, {number(row, f"{name}_p99", ".0f")}'

    lines = [[f'{name}.json', 'bf16' if row['format'] == 'none' else row['format'], f'{row["seconds"] / 60:.1f}',
              f'{row["compared"]:,}', f'{row["errors"]}, {row["wrong_answers"]}', f'{row["aborted"]:,}',
              f'{row["requests_per_s"]:.0f}', f'{row["tokens_per_s"]:.0f}', both(row, 'first_token_ms'),
              both(row, 'between_tokens_ms'), both(row, 'answer_ms'),
              number(row, 'blocks_in_use', ''), number(row, 'memory_growth_mib', '.0f')]
             for name in runs() for row in results(name) if 'compared' in row]
    header = ['run', 'cache', 'minutes', 'answers compared', 'errors, wrong answers', 'hung up on', 'requests/s',
              'tokens/s', 'first token, ms', 'between tokens, ms', 'whole answer, ms', 'blocks left in use',
              'memory grew by, MiB']
    return table(header, lines) + measured(*runs()) if lines else NOT_MEASURED


def rare() -> str:
    """Answers under load that left their references where those are sure, and what copies of the model say of them."""
    rows = [{**one, 'file': f'{name}.json', 'format': row['format']}
            for name in runs() for row in results(name) for one in row.get('rare', ())]
    lines = [[row['file'], row['format'], f'{row["prompt"]}, {row["at"]}', f'{row["reference_gap"]:.1f}',
              f'{row["answers"]} of {row["visits"]}', str(row['copies']), number(row, 'smallest_gap', '.2f'),
              number(row, 'median_gap', '.1f'), number(row, 'nearest_other', '.1f')]
             for row in [*rows, *results('rounding')]]
    header = ['run', 'cache', 'prompt, token', 'gap in the reference, nats', 'answers that have it', 'copies',
              'smallest gap', 'median', 'smallest of another token']
    return table(header, lines) + measured(*runs(), 'rounding') if lines else NOT_MEASURED
