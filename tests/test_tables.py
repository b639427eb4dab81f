"""Block tables of CUDA graphs: LMDeploy's graph runner with the hook, its buffers and its fill, on the CPU."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_cache_descs import cache_config, model_config

import lmdeploy_kvq as kvq
from lmdeploy_kvq.backends import tables
from lmdeploy_kvq.capacity import TABLE_BYTES
from lmdeploy_kvq.plan import Settings, plan, read_model

POLICIES = [0, *(fmt.policy for fmt in kvq.FORMATS)]


@pytest.fixture(scope='module', autouse=True)
def installed():
    kvq.install()


class Model(torch.nn.Module):
    """What LMDeploy's graph runner asks a model for; the graphs' buffers are LMDeploy's."""

    def __init__(self):
        super().__init__()
        from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
        self.buffers_of = CudaGraphMixin()
        self.ctx_mgr = SimpleNamespace(build_ctx=SimpleNamespace(
            strategy_factory=SimpleNamespace(build_cudagraph_strategy=lambda: None)))

    def support_cuda_graph(self, **inputs):
        return True


def runner(monkeypatch, policy: int, dp: int = 1, **cache):
    """LMDeploy's graph runner of a model whose cache has that policy."""
    from lmdeploy.pytorch.backends.cuda.graph_runner.runner import CUDAGraphRunner
    from lmdeploy.pytorch.config import BackendConfig, DistConfig
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    config = model_config()
    config.dist_config = DistConfig(dp=dp, tp=dp)
    return CUDAGraphRunner(Model(), config, cache_config(policy, **cache), BackendConfig(eager_mode=False),
                           torch.device('cpu'))


def step(policy: int, width: int) -> tuple[SimpleNamespace, dict]:
    """A decode step of one sequence with that many columns in its block table."""
    meta = SimpleNamespace(quant_policy=policy, block_offsets=torch.zeros(1, width, dtype=torch.int32))
    return SimpleNamespace(global_is_decoding=lambda: True), {'attn_metadata': meta}


def table(graphs, sequences: int) -> torch.Tensor:
    """The block table that LMDeploy allocates for a graph."""
    meta = SimpleNamespace(max_batchs=sequences, max_tokens=sequences, num_blocks=graphs.num_blocks, device='cpu',
                           decode_query_len=1, vocab_size=8, step_meta_plan=None, use_flash_mla=False,
                           use_fa3_decoding=False, use_mrope=False, is_ssm=False)
    none = torch.zeros(0)
    return graphs.model.buffers_of.make_buffers_cudagraph(meta, none, none, [], None)['block_offsets']


@pytest.mark.covers('memory.graph_tables')
@pytest.mark.parametrize('policy', POLICIES)
def test_tables_of_many_blocks_are_bounded(monkeypatch, policy):
    """A pool of half a million blocks and graphs for up to 1,024 sequences: 6 GB of tables with LMDeploy's own."""
    graphs = runner(monkeypatch, policy, num_gpu_blocks=500_000, max_batches=1024)
    sizes = graphs.get_capture_batch_sizes()
    total = 4 * graphs.num_blocks * sum(sizes)
    if policy == 0:
        assert graphs.num_blocks == 500_000 and total > 5e9
        return
    assert 0.99 * TABLE_BYTES < total <= TABLE_BYTES
    assert graphs.num_blocks * 64 > 500_000, 'tokens of one sequence'
    assert table(graphs, 8).nbytes == 4 * 8 * graphs.num_blocks


@pytest.mark.covers('memory.graph_tables')
@pytest.mark.parametrize('policy', POLICIES)
def test_small_pools_keep_their_whole_table(monkeypatch, policy):
    assert runner(monkeypatch, policy, num_gpu_blocks=3000, max_batches=64).num_blocks == 3000


@pytest.mark.covers('feature.kernel_block')
@pytest.mark.parametrize('policy', POLICIES[1:])
def test_tables_hold_the_kernel_blocks_of_the_whole_pool(monkeypatch, policy):
    """LMDeploy counts columns in blocks and fills in kernel blocks: a quarter of the pool would be all that fits."""
    graphs = runner(monkeypatch, policy, num_gpu_blocks=6, block_size=64, kernel_block_size=16)
    context, inputs = step(policy, 5 * 4)  # all blocks but the reserved one
    assert graphs._should_use_full_graph(context, inputs)
    assert table(graphs, 1).size(1) >= inputs['attn_metadata'].block_offsets.size(1)


@pytest.mark.covers('memory.graph_tables')
def test_wider_steps_run_without_a_graph_and_one_line_says_so(monkeypatch, caplog):
    policy = kvq.FORMATS[0].policy
    graphs = runner(monkeypatch, policy, num_gpu_blocks=500_000, max_batches=1024)
    for width, graph in ((graphs.num_blocks, True), (graphs.num_blocks + 1, False), (graphs.num_blocks + 2, False)):
        assert graphs._should_use_full_graph(*step(policy, width)) == graph
    assert caplog.text.count('decodes without CUDA graphs') == 1 and '--max-batch-size' in caplog.text
    assert graphs._should_use_full_graph(*step(0, graphs.num_blocks + 1)), "LMDeploy's own policies are its own affair"


def test_ranks_that_serve_different_requests_are_not_bounded(monkeypatch):
    """Under dp a rank alone cannot decide to run without a graph."""
    graphs = runner(monkeypatch, kvq.FORMATS[0].policy, dp=2, num_gpu_blocks=500_000, max_batches=1024)
    assert graphs.num_blocks == 500_000


def test_one_column_is_the_least():
    config = SimpleNamespace(num_gpu_blocks=9, block_size=64, kernel_block_size=64)
    assert tables.columns(config, [TABLE_BYTES]) == 1


def test_the_plan_counts_bounded_tables(tmp_path):
    (tmp_path / 'config.json').write_text('{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256, '
                                          '"num_key_value_heads": 1, "intermediate_size": 512, "vocab_size": 1000}')
    rows = plan(read_model(tmp_path), Settings(gpu_memory=140 * 10**9, max_batch_size=1024), 8192)
    assert rows[0]['table_bytes'] > TABLE_BYTES
    assert all(row['table_bytes'] == TABLE_BYTES for row in rows[1:])
