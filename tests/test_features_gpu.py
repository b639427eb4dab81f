"""Features of the real engine on a GPU: the programs in scripts/ ask it, and their limits decide.

Each program starts its engines side by side; the programs too (``-n N --dist loadgroup``).
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MODEL

pytestmark = pytest.mark.gpu
SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'


def program(name: str, out: Path, *arguments: str, limit: float = 420) -> tuple[int, dict, str]:
    """Exit code, results and output of a program of scripts/."""
    done = subprocess.run([sys.executable, SCRIPTS / f'{name}_check.py', '--out', out, *arguments], text=True,
                          capture_output=True, timeout=limit)
    text = (done.stdout + done.stderr)[-6000:]
    results = sorted(out.glob('*.json'))
    assert results, text
    return done.returncode, json.loads(results[0].read_text()), text


@pytest.fixture(scope='module')
def features(tmp_path_factory) -> tuple[dict[str, list[dict]], list[str], str]:
    """Rows of scripts/features_check.py by case, what failed, and its output."""
    _, data, text = program('features', tmp_path_factory.mktemp('features'))
    rows: dict[str, list[dict]] = {}
    for row in data['rows']:
        rows.setdefault(row['case'], []).append(row)
    return rows, data['failed'], text


def passed(features, *cases: str) -> None:
    """The cases were run with every cache that was asked for, and nothing of them failed."""
    rows, failed, text = features
    for case in cases:
        assert len(rows[case]) >= 2, text
        assert not [line for line in failed if line.startswith(f'{case}, ')], text


GROUP = pytest.mark.xdist_group('features')


@GROUP
@pytest.mark.covers('feature.block_sizes')
@pytest.mark.parametrize('size', [16, 32, 64, 128, 256])
def test_block_sizes(features, size):
    passed(features, 'plain' if size == 64 else f'blocks of {size}')


@GROUP
@pytest.mark.covers('feature.kernel_block')
@pytest.mark.parametrize('case', ['blocks of 64 in kernel blocks of 16', 'blocks of 256 in kernel blocks of 64'])
def test_kernel_blocks_smaller_than_blocks(features, case):
    passed(features, case)


@GROUP
@pytest.mark.covers('feature.prefix', 'feature.eviction')
def test_prefixes_in_a_pool_that_does_not_hold_them(features):
    """Hits and evictions in one run; every answer is confirmed, whatever pages it was given."""
    passed(features, 'small pool')
    for row in features[0]['small pool']:
        assert row['cached_tokens'] > 5000 and row['evicted'] > 50


@GROUP
@pytest.mark.covers('feature.abort')
def test_requests_cut_short_give_their_blocks_back(features):
    """Aborted by session, cancelled by the client's task, all at once: no block is missing, later answers are right."""
    passed(features, 'small pool')
    for row in features[0]['small pool']:
        assert row['ended'] == row['asked'] == 24 and len(row['free']) == 4 and len(set(row['free'])) == 1


@GROUP
@pytest.mark.covers('feature.mp', 'feature.chunks')
def test_chunks_in_an_engine_of_another_process(features):
    passed(features, 'mp engine, chunks')


@GROUP
@pytest.mark.covers('feature.prefill_graphs')
def test_piecewise_graphs_of_prefill(features):
    """Replayed, with and without history, and as right as without them."""
    passed(features, 'qwen3, prefill graphs')
    for row in features[0]['qwen3, prefill graphs']:
        assert row['replays'] > 0 and row['cached_tokens'] > 5000


@pytest.mark.xdist_group('long')
@pytest.mark.covers('feature.long', 'feature.chunks')
def test_128k_tokens(tmp_path):
    code, data, text = program('long', tmp_path)
    assert code == 0 and data['tokens'] == 131_072, text


@pytest.mark.xdist_group('memory')
@pytest.mark.covers('memory.blocks', 'memory.graph_tables')
def test_blocks_take_the_bytes_there_are(tmp_path):
    """Every format: 99 % of what LMDeploy found, capacity.py's bytes, issue 5's ratios, and bounded block tables."""
    from lmdeploy_kvq import FORMATS
    code, data, text = program('memory', tmp_path)
    assert code == 0 and len(data['rows']) == len(FORMATS) + 1, text
    tables = {row['format']: row['table_bytes'] for row in data['rows']}
    assert tables['int2_per_token_head'] > 100e6, 'without a bound it would be 233 MB'


@pytest.mark.xdist_group('alone')
@pytest.mark.covers('memory.plan')
def test_alone_the_plan_is_what_the_engine_allocates(tmp_path):
    """Within 3 %, for three shapes."""
    code, data, text = program('plan', tmp_path)
    assert code == 0 and len({row['shape'] for row in data['rows']}) == 3, text


@pytest.mark.xdist_group('update')
@pytest.mark.covers('feature.update', 'feature.sleep')
def test_live_updates_and_both_levels_of_sleep(tmp_path):
    code, data, text = program('update', tmp_path, '--model', MODEL)
    assert code == 0 and len(data['rows']) == 8, text


@pytest.mark.xdist_group('growth')
@pytest.mark.covers('memory.growth')
def test_ten_thousand_requests_leave_nothing_behind(tmp_path):
    code, data, text = program('growth', tmp_path)
    assert code == 0 and data['requests'] >= 10_000, text
