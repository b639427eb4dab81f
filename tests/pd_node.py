"""One end of prefill/decode separation in a process of its own: LMDeploy's connection and cache engine, on the CPU.

Reads cases from its standard input, one JSON object a line: ``policy``, and ``transforms`` or ``scale``. For each it
writes what it would send to the other end (LMDeploy's DistServeInitResponse, and the key of a block of tokens in a
Mooncake store), reads what the other end sent, connects, and writes ``connected`` or the error. The argument is
``with`` or ``without`` this package.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch


class Transport:
    """Stands in for RDMA, which is not here: keeps what it is told."""

    def __init__(self):
        self.links = {'other': SimpleNamespace(remote_engine_config=SimpleNamespace(num_gpu_blocks=6))}
        self.connected = []

    def p2p_initialize(self, request):
        pass

    def register_memory_region(self, request):
        pass

    def endpoint_info(self, remote, protocol):
        return {}

    def p2p_connect(self, remote, info):
        self.connected.append(remote)


def make_model(transforms: str = '', scale: float | None = None) -> torch.nn.Module:
    """A module that carries what settling scales and transforms leaves with a model."""
    from lmdeploy_kvq.backends.loading import model_scales
    from lmdeploy_kvq.scales import LayerScales
    module = torch.nn.Identity()
    model_scales(module).transforms = transforms
    if scale is not None:
        model_scales(module).layers = {'model.layers.0': LayerScales(k=torch.tensor(scale), v=torch.tensor(1.0))}
    return module


def make_config(policy: int):
    """LMDeploy's configuration of a cache of six blocks."""
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch.config import CacheConfig
    return CacheConfig(max_batches=8, block_size=64, kernel_block_size=64, num_cpu_blocks=0, num_gpu_blocks=6,
                       quant_policy=QuantPolicy(policy))


def configured(case: dict, extension: bool):
    """A configuration as LMDeploy's agent hands it to its cache."""
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
    config = make_config(case.pop('policy'))
    if extension:  # the patched method, up to what it calls in LMDeploy, which needs a GPU
        agent = SimpleNamespace(cache_config=config, patched_model=make_model(**case), all_context=_stop)
        with contextlib.suppress(_Stopped):
            BaseModelAgent.build_cache_engine(agent)
    return config


def make_engine(config):
    """LMDeploy's cache engine with pages on the CPU: its constructor wants CUDA streams."""
    from lmdeploy.pytorch.config import ModelConfig
    from lmdeploy.pytorch.engine.cache_engine.engine import CacheEngine
    from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan
    model = ModelConfig(hidden_size=1024, num_layers=3, num_attention_heads=16, num_key_value_heads=4, bos_token_id=1,
                        eos_token_id=[2], head_dim=64, dtype=torch.bfloat16,
                        hf_config=SimpleNamespace(architectures=['LlamaForCausalLM']))
    made = object.__new__(CacheEngine)
    made.cache_config, made.rank, made.tp_rank = config, 0, 0
    made.migration_backend_impl, made._pd_cache_pool_infos, made._remote_pd_cache_pool_infos = Transport(), None, {}
    made.gpu_allocation = build_block_cache_plan(model, config, 1).allocate(6, 'cpu')
    return made


class _Stopped(Exception):
    """Where LMDeploy's own method begins."""


def _stop():
    raise _Stopped


class Executor:
    """As LMDeploy's executors do: requests and answers are pickled on their way to the worker and back."""

    def __init__(self, cache_engine):
        self.cache_engine = cache_engine

    def p2p_initialize(self, request):
        return [pickle.loads(pickle.dumps(self.cache_engine.p2p_initialize(pickle.loads(pickle.dumps(request)))))]

    def p2p_connect(self, remote_engine_id, conn_request):
        self.cache_engine.p2p_connect(remote_engine_id, pickle.loads(pickle.dumps(conn_request)))


def store_key(config) -> str:
    """The key of a block's tokens in LMDeploy's Mooncake store."""
    from lmdeploy.pytorch.kv_connector.mooncake.store.data import build_store_key
    from lmdeploy.pytorch.kv_connector.mooncake.store.worker import MooncakeStoreWorker
    MooncakeStoreWorker._setup_store = lambda self, store, host: None  # there is no such server here
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        Path(file.name).write_text(json.dumps({'metadata_server': 'x:1', 'master_server_address': 'x:2',
                                               'protocol': 'tcp'}))
        config.kv_transfer_config = SimpleNamespace(kv_role='kv_both', kv_connector_extra_config={
            'mooncake_config_path': file.name, 'model_name': 'm', 'cache_prefix': ''})
        worker = MooncakeStoreWorker(pickle.loads(pickle.dumps(config)), store_factory=lambda: None)
        return build_store_key(worker.key_metadata, 0, b'0' * 32)


async def main(extension: bool) -> None:
    """Answer the lines of standard input."""
    import lmdeploy.pytorch.engine  # noqa: F401  first: LMDeploy's modules import each other
    from lmdeploy.pytorch.disagg.config import DistServeEngineConfig
    from lmdeploy.pytorch.disagg.conn.engine_conn import EngineP2PConnection
    from lmdeploy.pytorch.disagg.conn.protocol import (
        DistServeConnectionRequest,
        DistServeInitRequest,
        DistServeInitResponse,
        MigrationProtocol,
    )
    if extension:
        import lmdeploy_kvq
        lmdeploy_kvq.install()

    def say(**fields) -> None:
        print('NODE ' + json.dumps(fields), flush=True)

    say(ready=True)
    for line in sys.stdin:
        cache_engine = make_engine(configured(json.loads(line), extension))
        node = EngineP2PConnection(SimpleNamespace(executor=Executor(cache_engine)))
        config = DistServeEngineConfig(tp_size=1, ep_size=1, dp_size=1, pp_size=1, dp_rank=0, block_size=64,
                                       num_cpu_blocks=0, num_gpu_blocks=6)
        sent = node.p2p_initialize(DistServeInitRequest(
            local_engine_id='tcp://127.0.0.1:1', local_engine_config=config, remote_engine_id='other',
            remote_engine_config=config, protocol=MigrationProtocol.RDMA))
        say(sent=json.loads(sent.model_dump_json()), key=store_key(cache_engine.cache_config))
        other = DistServeInitResponse.model_validate(json.loads(sys.stdin.readline()))
        request = DistServeConnectionRequest(
            protocol=MigrationProtocol.RDMA, remote_engine_id='other',
            remote_engine_endpoint_info=other.engine_endpoint_info,
            remote_kvtransfer_endpoint_info=other.kvtransfer_endpoint_info)
        try:
            node.p2p_connect(request)
            await asyncio.sleep(0)
            say(connected=cache_engine.migration_backend_impl.connected)
        except RuntimeError as error:
            say(error=str(error))


if __name__ == '__main__':
    asyncio.run(main(sys.argv[1] == 'with'))
