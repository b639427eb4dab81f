"""Several GPUs: scripts/parallel_check.py and dp_check.py through the real engine, their limits decide."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_features_gpu import SCRIPTS, program

pytestmark = pytest.mark.gpu


def gpus(count: int) -> pytest.MarkDecorator:
    """Skipped with fewer GPUs."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f'needs {count} GPUs')


@pytest.mark.xdist_group('parallel')
@gpus(2)
@pytest.mark.covers('parallel.scales', 'parallel.tp2_mp', 'parallel.tp2_ray', 'feature.calibrate')
def test_two_gpus_with_scales_and_transforms_of_their_heads(tmp_path):
    """And the scales that they find while serving are those of one GPU."""
    code, data, text = program('parallel', tmp_path, '--tp', '2', '--kv-heads', '8', '--ways', 'mp,ray')
    assert code == 0, text
    assert {row['way'] for row in data['rows']} == {'tp=1', 'mp', 'ray', 'control'}


@pytest.mark.xdist_group('parallel')
@gpus(4)
@pytest.mark.covers('parallel.tp4', 'parallel.replicated', 'parallel.scales')
def test_four_gpus_with_eight_and_with_two_kv_heads(tmp_path):
    """Two KV heads: each is on two GPUs, with its scale and transform."""
    code, data, text = program('parallel', tmp_path, '--tp', '4', '--kv-heads', '8,2', '--ways', 'mp')
    assert code == 0, text
    assert {(row['kv_heads'], row['way']) for row in data['rows']} >= {(8, 'mp'), (2, 'mp')}


@pytest.mark.xdist_group('dp')
@gpus(2)
@pytest.mark.covers('parallel.dp')
def test_two_data_parallel_ranks(tmp_path):
    """Where LMDeploy's own bf16 cache runs with dp=2, ours does."""
    done = subprocess.run([sys.executable, SCRIPTS / 'dp_check.py', '--out', tmp_path], text=True, capture_output=True,
                          timeout=500)
    text = (done.stdout + done.stderr)[-6000:]
    if done.returncode == 3:
        pytest.skip(text)
    assert done.returncode == 0, text
