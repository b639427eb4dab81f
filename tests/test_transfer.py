"""Pages that leave the process: LMDeploy's own comparison of cache pools, and the keys of its Mooncake store."""
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmdeploy.pytorch.disagg.conn.protocol import DistServeInitRequest, MigrationProtocol
from lmdeploy.pytorch.kv_connector.mooncake.store import worker as workers
from lmdeploy.pytorch.kv_connector.mooncake.store.data import build_store_key
from pd_node import make_config, make_engine, make_model

import lmdeploy_kvq as kvq
from lmdeploy_kvq.backends import transfer

INT4, INT8 = (next(fmt for fmt in kvq.FORMATS if fmt.name == name)
              for name in ('int4_per_token_head', 'int8_per_token_head'))
FP8 = next(fmt for fmt in kvq.FORMATS if fmt.needs_scales)


@pytest.fixture(scope='module', autouse=True)
def installed():
    kvq.install()


def engine(policy: int, identity: str | None):
    """LMDeploy's cache engine with pages on the CPU, whose configuration names what they hold."""
    config = make_config(policy)
    if identity is not None:
        setattr(config, transfer._KEY, identity)
    return make_engine(config)


def handshake(one, other) -> None:
    """What PD disaggregation does on both ends."""
    request = DistServeInitRequest.model_construct(protocol=MigrationProtocol.RDMA, remote_engine_id='other')
    infos = [json.loads(end.p2p_initialize(request).model_dump_json()) for end in (one, other)]  # through the network
    kind = type(one.p2p_initialize(request))
    one.p2p_connect('other', [kind.model_validate(infos[1])])
    other.p2p_connect('other', [kind.model_validate(infos[0])])


@pytest.mark.covers('parallel.transfer')
def test_equal_ends_connect():
    for fmt in kvq.FORMATS:
        ends = [engine(fmt.policy, transfer.identity(fmt, make_model('hadamard'))) for _ in range(2)]
        handshake(*ends)
        assert all(end.migration_backend_impl.connected == ['other'] for end in ends)
    handshake(engine(0, None), engine(0, None))


@pytest.mark.covers('parallel.transfer')
def test_other_transforms_scales_or_formats_do_not():
    cases = [(INT4, make_model('hadamard'), INT4, make_model('0123')),
             (FP8, make_model(scale=1.0), FP8, make_model(scale=2.0)),
             # as many bytes
             (INT8, make_model('hadamard'), kvq.get_format('fp8_per_token_head'), make_model())]
    for one, first, other, second in cases:
        with pytest.raises(RuntimeError, match=f'dtypes differ: .*{one.name}.*{other.name}'):
            handshake(engine(one.policy, transfer.identity(one, first)),
                      engine(other.policy, transfer.identity(other, second)))
    with pytest.raises(RuntimeError, match='dtypes differ'):  # a node without this package
        handshake(engine(FP8.policy, transfer.identity(FP8, make_model(scale=1.0))), engine(FP8.policy, None))


@pytest.mark.covers('parallel.transfer')
def test_an_end_that_says_nothing_is_refused():
    end = engine(INT4.policy, 'x')
    info = end.p2p_initialize(DistServeInitRequest.model_construct(protocol=MigrationProtocol.RDMA,
                                                                   remote_engine_id='other'))
    with pytest.raises(RuntimeError, match='does not say what its cache pages hold'):
        end.p2p_connect('other', [info.model_copy(update={'cache_pools': None})])


def test_identities():
    first = transfer.identity(INT4, make_model('a'))
    assert first == transfer.identity(INT4, make_model('a')) and first.startswith(INT4.name)
    assert len({first, transfer.identity(INT4, make_model('b')), transfer.identity(INT8, make_model('a')),
                transfer.identity(FP8, make_model(scale=1.0)), transfer.identity(FP8, make_model(scale=2.0))}) == 5


@pytest.mark.covers('parallel.transfer')
@pytest.mark.parametrize('prefix', ['', 'team'])
def test_keys_of_a_store_name_the_identity(tmp_path, monkeypatch, prefix):
    path = tmp_path / 'mooncake.json'
    path.write_text(json.dumps({'metadata_server': 'x:1', 'master_server_address': 'x:2', 'protocol': 'tcp'}))
    monkeypatch.setattr(workers.MooncakeStoreWorker, '_setup_store', lambda self, store, host: None)
    keys = []
    for identity in (None, transfer.identity(INT4, make_model('a')), transfer.identity(INT4, make_model('b'))):
        config = SimpleNamespace(states_shapes=None, window_size=-1, block_size=64, kv_transfer_config=SimpleNamespace(
            kv_role='kv_both', kv_connector_extra_config={'mooncake_config_path': str(path), 'model_name': 'm',
                                                          'cache_prefix': prefix}))
        if identity is not None:
            setattr(config, transfer._KEY, identity)
        worker = workers.MooncakeStoreWorker(config, store_factory=lambda: None)
        keys.append(build_store_key(worker.key_metadata, 0, b'0' * 32))
        assert identity is None or identity in keys[-1]
        assert keys[-1].startswith(prefix)
    assert len(set(keys)) == 3


def test_the_agent_hands_the_identity_to_its_cache():
    """``BaseModelAgent.build_cache_engine`` is patched; what it builds from finds the identity in the config."""
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
    assert BaseModelAgent.build_cache_engine.__wrapped__
    seen = []
    for policy in (INT4.policy, 0):
        agent = SimpleNamespace(cache_config=SimpleNamespace(quant_policy=policy), patched_model=make_model('a'))
        transfer.build_cache_engine(lambda agent: seen.append(getattr(agent.cache_config, transfer._KEY, None)), agent)
    assert seen == [transfer.identity(INT4, make_model('a')), None]


# ---- two processes


class Node:
    """tests/pd_node.py, with this package or without."""

    def __init__(self, extension: bool):
        root = Path(__file__).resolve().parent
        self.process = subprocess.Popen(
            [sys.executable, root / 'pd_node.py', 'with' if extension else 'without'], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, 'LMDEPLOY_KVQ': str(int(extension)), 'TRITON_INTERPRET': '0',
                 'PYTHONPATH': f'{root.parent}:{os.environ.get("PYTHONPATH", "")}'})

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate()

    def send(self, value: dict) -> None:
        print(json.dumps(value), file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        for line in self.process.stdout:
            if line.startswith('NODE '):
                return json.loads(line.removeprefix('NODE '))
        raise AssertionError(self.process.stderr.read()[-3000:])


def meet(prefill: Node, decode: Node, one: dict, other: dict) -> tuple[list[dict], bool]:
    """What both ends say of each other, and whether they would find each other's pages in a store."""
    for node, case in ((prefill, one), (decode, other)):
        node.send(case)
    first, second = (node.receive() for node in (prefill, decode))
    prefill.send(second['sent'])
    decode.send(first['sent'])
    return [node.receive() for node in (prefill, decode)], first['key'] == second['key']


@pytest.mark.covers('parallel.transfer')
def test_two_processes():
    """Through LMDeploy's connection, what it sends as JSON and pickles for its workers: equal ends connect, others not.

    A node without this package, which knows policy 16 as LMDeploy's own, is another format as well.
    """
    fp8, int4, int8 = FP8.policy, INT4.policy, INT8.policy
    same = {'policy': int4, 'transforms': 'a'}
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(Node(True)) for _ in range(2))
        stock = stack.enter_context(Node(False))
        assert all(node.receive() == {'ready': True} for node in (prefill, decode, stock))
        for one, other, end in (
                (same, same, decode), ({'policy': fp8, 'scale': 0.5}, {'policy': fp8, 'scale': 0.5}, decode),
                ({'policy': 0}, {'policy': 0}, stock),
                (same, {'policy': int4, 'transforms': 'b'}, decode),
                ({'policy': fp8, 'scale': 0.5}, {'policy': fp8, 'scale': 0.25}, decode),
                ({'policy': int8}, {'policy': kvq.get_format('fp8_per_token_head').policy}, decode),
                ({'policy': fp8, 'scale': 1.0}, {'policy': fp8}, stock)):
            said, found = meet(prefill, end, one, other)
            if one == other:
                assert said == [{'connected': ['other']}] * 2 and found
                continue
            assert all('error' in answer for answer in said) and not found, (one, other)
            assert all('lmdeploy_kvq' in answer['error'] or 'Pool' in answer['error'] or 'pool' in answer['error']
                       for answer in said)
