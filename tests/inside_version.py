"""What test_versions.py runs in a process whose LMDeploy is an older one: every check by name, its traceback or null.

    python tests/inside_version.py VERSION FOLDER     a model is written to FOLDER; the last line printed is JSON
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.update(LMDEPLOY_KVQ='0', TRITON_INTERPRET='1', LMDEPLOY_KVQ_PREFILL='cache')

import triton.runtime
from triton.backends.compiler import GPUTarget

# LMDeploy 0.16 asks for Triton's device when its kernels are imported, which without a GPU is an error
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget('cpu', 0, 1)))

import lmdeploy  # noqa: E402
import torch  # noqa: E402
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy, TurbomindEngineConfig  # noqa: E402

import lmdeploy_kvq as kvq  # noqa: E402
from lmdeploy_kvq import hook  # noqa: E402

VERSION, FOLDER = sys.argv[1], Path(sys.argv[2])
ADDED = [fmt for fmt in kvq.FORMATS if not fmt.upstream]
STATIC = next(fmt for fmt in kvq.FORMATS if fmt.needs_scales)
K_SCALE, V_SCALE = 0.5, 0.25  # in the checkpoint


def refused(call, *words: str) -> None:
    """Assert that a call is a ValueError with these words."""
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), (words, str(error))
    else:
        raise AssertionError(f'not refused: {words}')


def model_config(kv_heads: int = 4, head_dim: int = 64, **changes):
    """A model's configuration, as LMDeploy builds it."""
    from lmdeploy.pytorch.config import ModelConfig
    given = dict(hidden_size=256, num_layers=3, num_attention_heads=4 * kv_heads, num_key_value_heads=kv_heads,
                 bos_token_id=1, eos_token_id=[2], head_dim=head_dim, dtype=torch.bfloat16,
                 hf_config=SimpleNamespace(architectures=['LlamaForCausalLM'], name_or_path=''))
    return ModelConfig(**given | changes)


def cache_config(policy: int, **changes):
    """A cache's configuration, as the engine makes it."""
    from lmdeploy.pytorch.config import CacheConfig
    given = dict(max_batches=8, block_size=64, num_cpu_blocks=0, num_gpu_blocks=6, quant_policy=QuantPolicy(policy))
    return CacheConfig(**given | changes)


def places() -> dict[str, tuple[object, str]]:
    """Owner and attribute of every row's target."""
    found = {}
    for row in hook.HOOK.rows:
        *parents, leaf = row.target.split('.')
        found[row.name] = functools.reduce(getattr, parents, importlib.import_module(row.module)), leaf
    return found


def values() -> dict[str, tuple[object, object]]:
    """What is at every place, and the contents of what is changed in place."""
    found = {name: vars(owner)[leaf] for name, (owner, leaf) in places().items()}
    return {name: (value, dict(vars(value)) if isinstance(value, type) else dict(value) if isinstance(value, dict)
                   else None) for name, value in found.items()}


# ---- checks, in this order

def it_is_the_wheel():
    assert lmdeploy.__version__ == VERSION and kvq.hook.metadata.version('lmdeploy') == VERSION
    assert hook.HOOK.check() == [] and not hook.HOOK.installed
    assert [int(p) for p in QuantPolicy] == [0, 4, 8, 16, 17, 42]


def every_row_applies_and_is_undone():
    before = values()
    for _ in range(2):
        kvq.install()
        assert hook.HOOK.installed and {hook.HOOK.state(row) for row in hook.HOOK.rows} == {'applied'}
        for name, (value, contents) in values().items():
            assert (value is before[name][0]) == (contents is not None) and (value, contents) != before[name], name
        kvq.uninstall()
        for name, (value, contents) in values().items():
            assert value is before[name][0] and contents == before[name][1], name
    kvq.install()


def policies():
    names = kvq.formats.format_names()
    assert {QuantPolicy[fmt.name.upper()] for fmt in ADDED} == {fmt.policy for fmt in ADDED}
    for name, policy in names.items():
        for given in (name, policy, QuantPolicy(policy)):
            assert PytorchEngineConfig(quant_policy=given).quant_policy is QuantPolicy(policy)
        refused(lambda policy=policy: TurbomindEngineConfig(quant_policy=policy), 'TurboMind')
        refused(lambda policy=policy: PytorchEngineConfig(quant_policy=policy, device_type='camb'), 'cuda')
    for policy in (0, 4, 8, 42):
        assert PytorchEngineConfig(quant_policy=policy).quant_policy == policy
        assert TurbomindEngineConfig(quant_policy=policy).quant_policy == policy
    refused(lambda: PytorchEngineConfig(quant_policy='fp9'), 'unknown', *(fmt.name for fmt in kvq.FORMATS))


def command_line():
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    from lmdeploy_kvq.backends.config import run_with_backend
    CLI.add_parsers()
    SubCliServe.add_parsers()
    for command, patched in ((['serve', 'api_server'], SubCliServe.api_server), (['chat'], CLI.chat)):
        for fmt in kvq.FORMATS:
            args = CLI.parser.parse_args([*command, 'MODEL', '--quant-policy', fmt.name])
            assert args.quant_policy == fmt.policy and args.run.__wrapped__ is patched.__wrapped__
            calls, said = [], io.StringIO()
            with contextlib.redirect_stderr(said):
                run_with_backend(calls.append, args)
            assert calls == [args] and args.backend == 'pytorch' and '--backend pytorch is selected' in said.getvalue()
        assert CLI.parser.parse_args([*command, 'MODEL', '--quant-policy', 'int8']).quant_policy == 8
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                CLI.parser.parse_args([*command, 'MODEL', '--quant-policy', 'fp9'])
            except SystemExit as stop:
                assert stop.code == 2 and all(fmt.name in said.getvalue() for fmt in kvq.FORMATS)
            else:
                raise AssertionError('fp9')


def pages_are_ours():
    """Through the engine's own allocation and sizing: shapes, dtypes, bytes, kernel blocks, tensor parallelism."""
    from lmdeploy.pytorch.engine.cache_engine import CacheEngine
    for fmt in kvq.FORMATS:
        for heads, dim, v_dim, block, kernel_block, tp in ((4, 64, None, 64, 64, 1), (8, 128, None, 128, 64, 4),
                                                           (2, 96, 64, 64, 32, 2)):
            model = model_config(heads, dim, k_head_dim=dim if v_dim else None, v_head_dim=v_dim)
            config = cache_config(fmt.policy, block_size=block, kernel_block_size=kernel_block)
            _, found = CacheEngine.allocate_caches(num_blocks=2, model_config=model, cache_config=config,
                                                   world_size=tp, device='cpu')
            blocks = 2 * block // kernel_block
            own = kvq.PagedCache.allocate(fmt, blocks, kernel_block, heads // tp, dim, v_dim or dim, device='cpu')
            expected = [own.k_codes, own.v_codes] + [
                own.k_codes.new_empty((blocks, heads // tp, 0), dtype=torch.float32) if scale is None else scale
                for scale in (own.k_scales, own.v_scales) if fmt.per_token_head]
            assert [(x.shape, x.dtype) for x in found] == [((3, *x.shape), x.dtype) for x in expected], fmt.name
            size = CacheEngine.get_cache_block_size(config, model, tp)
            stored = sum(x.numel() * x.element_size() for x in found) // 2
            assert stored <= size <= stored + 255 * 3 * 4 * block // kernel_block, fmt.name
    refused(lambda: CacheEngine.get_cache_block_size(cache_config(108), model_config(3), 2), '3 KV heads')


def their_pages_are_theirs():
    """LMDeploy's own policies, and its fp8 of sparse MLA, which is a layout of its own."""
    from lmdeploy.pytorch.engine.cache_engine import CacheEngine
    sparse = dict(use_flash_mla=True, mla_index_topk=2048, k_head_dim=576, v_head_dim=0)
    cases = [(policy, {}) for policy in (0, 4, 8, 42)] + [(0, sparse), (16, sparse)]

    def all_of_them():
        return [[(x.shape, x.dtype) for x in CacheEngine.allocate_caches(
            num_blocks=2, model_config=model_config(1, mla_kv_cache_dtype='fp8_ds_mla' if policy == 16 else None,
                                                    **changes) if changes else model_config(),
            cache_config=cache_config(policy), world_size=1, device='meta')[1]] for policy, changes in cases]

    ours = all_of_them()
    kvq.uninstall()
    theirs = all_of_them()
    kvq.install()
    assert ours == theirs


def executors_check_before_loading():
    """The first step of every executor: models that cannot be stored, the draft model, prefill and decode apart."""
    from lmdeploy.pytorch.disagg.config import EngineRole
    from lmdeploy.pytorch.engine.cache_engine import CacheEngine
    from lmdeploy.pytorch.engine.executor.base import ExecutorBase

    def build(policy, model=None, draft=None, memory=None, **changes):
        config = cache_config(policy, **changes)
        specdecode = draft and SimpleNamespace(model_config=draft, cache_config=config)
        executor = object.__new__(ExecutorBase)
        executor.__init__(
            model_path='', model_config=model or model_config(), cache_config=config, backend_config=None,
            dist_config=SimpleNamespace(dp=1, world_size=1), specdecode_config=specdecode,
            misc_config=SimpleNamespace(memdecode_config=memory and SimpleNamespace(memory_model_config=memory)))
        assert executor.cache_config is config and executor.specdecode_config is specdecode
        return executor

    latent = model_config(use_flash_mla=True, v_head_dim=0, hf_config=SimpleNamespace(
        architectures=['DeepseekV2ForCausalLM'], name_or_path=''))
    sparse = model_config(use_flash_mla=True, v_head_dim=0, mla_index_topk=2048, hf_config=SimpleNamespace(
        architectures=['DeepseekV32ForCausalLM'], name_or_path=''))
    for fmt in kvq.FORMATS:
        build(fmt.policy)
        build(fmt.policy, draft=model_config(2), memory=model_config(2))
        for arguments in ({'model': latent}, {'draft': latent}, {'memory': latent}):
            refused(lambda fmt=fmt, given=arguments: build(fmt.policy, **given), fmt.name, 'MLA')
        for role in (EngineRole.Prefill, EngineRole.Decode):
            refused(lambda fmt=fmt, role=role: build(fmt.policy, role=role), fmt.name, '0.18')
        for method, arguments in (('p2p_initialize', (None, )), ('p2p_connect', ('other', [None]))):
            engine = object.__new__(CacheEngine)
            engine.cache_config = cache_config(fmt.policy)
            refused(functools.partial(getattr(engine, method), *arguments), fmt.name, '0.18')
    for fmt in ADDED:
        refused(lambda fmt=fmt: build(fmt.policy, model=sparse), fmt.name, 'MLA')
    for role in EngineRole:
        build(STATIC.policy, model=sparse, role=role)  # LMDeploy's own fp8 there
    for policy in (0, 4, 8, 42):
        for model in (model_config(), latent, sparse):
            build(policy, model=model)
            build(policy, model=model, role=EngineRole.Prefill)


def graphs_wait_for_scales():
    from lmdeploy.pytorch.backends.cuda.graph_runner import CUDAGraphRunner

    from lmdeploy_kvq.backends.loading import model_scales
    runner = object.__new__(CUDAGraphRunner)
    runner.model, runner.backend_config = torch.nn.Identity(), SimpleNamespace(eager_mode=False)
    asked = []
    runner.model.support_cuda_graph = lambda **inputs: not asked.append(inputs)
    runner.num_blocks, runner.cache_config = 2, SimpleNamespace(kernel_block_size=64)
    fits, wide = ({'attn_metadata': SimpleNamespace(quant_policy=STATIC.policy, block_offsets=torch.zeros(1, blocks))}
                  for blocks in (2, 3))
    enabled = runner.check_enable_graph()
    assert enabled(**fits) is True and asked == [fits]
    assert enabled(**wide) is False  # a table that the graphs have no room for
    model_scales(runner.model).calibration = SimpleNamespace(active=True)
    assert enabled(**fits) is False
    model_scales(runner.model).calibration = SimpleNamespace(active=False)  # while it warms up
    assert enabled(**fits) is True and asked[-1] == fits
    runner.backend_config.eager_mode = True
    assert runner.check_enable_graph()(**fits) is False


def tables_of_graphs_are_bounded():
    from lmdeploy.pytorch.backends.cuda import graph_runner

    from lmdeploy_kvq.capacity import TABLE_BYTES
    config = cache_config(STATIC.policy, num_gpu_blocks=10**7)
    model, backend = model_config(), SimpleNamespace(eager_mode=True)
    for policy, bounded in ((STATIC.policy, True), (0, False)):
        config.quant_policy = policy
        runner = graph_runner.CUDAGraphRunner(torch.nn.Identity(), model, config, backend, None)
        sizes = runner.get_capture_batch_sizes()
        assert (runner.num_blocks * sum(sizes) * 4 <= TABLE_BYTES) is bounded


def shared_heads_are_counted():
    """KV heads that tensor parallelism replicates, by LMDeploy's own configuration of a model."""
    from lmdeploy.pytorch.config import DistConfig, ModelConfig

    from lmdeploy_kvq.backends.loading import kv_heads
    for tp, heads in ((1, 2), (2, 2), (4, 4)):
        config = ModelConfig.from_pretrained(str(FOLDER), dtype='float16', device_type='cuda',
                                             dist_config=DistConfig(tp=tp))
        assert (config.num_key_value_heads, config.num_replicate_key_value_heads) == (heads, heads // 2)
        assert kv_heads(config) == 2


def write_model() -> None:
    """A tiny random Llama of one layer, and scales of its cache among its weights."""
    import transformers
    from test_loading import add_scales
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(FOLDER)
    add_scales(FOLDER, {f'model.layers.0.self_attn.{name}': torch.tensor(scale)
                        for name, scale in (('k_scale', K_SCALE), ('v_scale', V_SCALE))})


class Silu(torch.nn.Module):
    """In the place of LMDeploy's activation kernel, which Triton's interpreter cannot run."""

    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class Served:
    """LMDeploy's model, loader, cache engine's pages and step of its agent, on the CPU."""

    def __init__(self, policy: int):
        from lmdeploy.pytorch.backends.graph_runner import GraphRunner
        from lmdeploy.pytorch.engine.cache_engine import CacheEngine
        from test_loading import build
        from test_prefill import dense_attention

        from lmdeploy_kvq.backends.loading import attention_layers
        self.agent = build(FOLDER, policy)
        self.config = cache_config(policy, block_size=16)
        model = self.agent.patched_model
        for module in attention_layers(model).values():
            module.impl.flash_attention_fwd = dense_attention
        for part in model.model.layers:
            part.mlp.act_fn = Silu()
        _, views = CacheEngine.allocate_caches(num_blocks=8, model_config=self.agent.model_config,
                                               cache_config=self.config, world_size=1, device='cpu')
        self.runner = GraphRunner(model, self.agent.model_config, self.config, None, 'cpu')
        self.engine = SimpleNamespace(cache_config=self.config, model_config=self.agent.model_config, block_caches={},
                                      gpu_cache=list(zip(*views)))

    @torch.inference_mode()
    def forward(self, ids: list[int], history: int = 0) -> torch.Tensor:
        """Hidden states of one sequence's next tokens, on pages 3 and 1."""
        from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
        from lmdeploy.pytorch.engine.model_agent import agent
        from lmdeploy.pytorch.model_inputs import ModelInputs
        total = history + len(ids)
        inputs = ModelInputs(
            input_ids=torch.tensor([ids]), seq_length=torch.tensor([len(ids)]), history_lengths=torch.tensor([history]),
            block_offsets=torch.tensor([[3, 1]], dtype=torch.int32), is_decoding=history > 0 and len(ids) == 1,
            num_ignored_history=torch.tensor([0]), max_q_seqlen=len(ids), max_kv_seqlen=total, sum_kv_seqlen=total)
        states = SimpleNamespace(state_caches=[], named_state_caches={})
        with get_device_manager().context(DeviceContext(device_type='cuda')):
            return agent.model_forward(self.runner, inputs, self.engine, states)['hidden_states'][0]


def steps_read_and_write_our_pages():
    """Prompt, chunk and decoding against transformers with a cache of the same codes, and scales from a checkpoint."""
    import transformers
    from helpers import frobenius

    from lmdeploy_kvq.backends import saturation
    from lmdeploy_kvq.hf_cache import QuantizedCache
    oracle = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    torch.cuda.current_stream = lambda *args: None  # what LMDeploy's kernels ask of a GPU before they are launched
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=8, minor=0, multi_processor_count=4)
    ids = [3, 9, 4, 5, 60, 7, 11, 13, 2, 8, 21, 34, 55, 1, 6, 9, 12]  # the last one is the first of the second page
    with torch.inference_mode():
        exact = oracle(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    for fmt in (next(fmt for fmt in kvq.FORMATS if fmt.per_token_head and fmt.key.rotation), STATIC):
        served, cache, seen = Served(fmt.policy), QuantizedCache(fmt, K_SCALE, V_SCALE), 0
        for part in (ids[:13], ids[13:16], ids[16:]) if fmt.per_token_head else (ids[:16], ids[16:]):
            if len(part) == 1:
                setattr(served.config, saturation.ATTRIBUTE, saturation.Sampler(STATIC))
            with torch.inference_mode():
                expected = oracle(torch.tensor([part]), past_key_values=cache, output_hidden_states=True)
                expected = expected.hidden_states[-1][0]
            found = served.forward(part, seen)
            lost = frobenius(expected, exact[seen:seen + len(part)])
            seen += len(part)
            off = frobenius(found, expected)
            assert off < 2e-3 + lost / 2, (fmt.name, seen, off, lost)  # its weights are fp16, the oracle's fp32
    tally = getattr(served.config, saturation.ATTRIBUTE).tally  # of the newest full page of layer 0
    assert tally.counts[0, :, 1].tolist() == [16 * 2 * 16] * 2


def doctor_is_content():
    """Every row applied here, and the hook in a new process that loads it by itself."""
    from lmdeploy_kvq import cli
    del os.environ['LMDEPLOY_KVQ']
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(['doctor', '--json'])
    report = json.loads(out.getvalue())
    assert code == 0 and report['problems'] == [] and report['versions']['lmdeploy'] == VERSION, report['problems']
    assert all(process['active'] for process in report['hook'].values()), report['hook']
    assert [row['state'] for row in report['patches']] == ['applied'] * len(hook.HOOK.rows)


CHECKS = (it_is_the_wheel, every_row_applies_and_is_undone, policies, command_line, pages_are_ours,
          their_pages_are_theirs, executors_check_before_loading, graphs_wait_for_scales, shared_heads_are_counted,
          steps_read_and_write_our_pages, doctor_is_content)

if __name__ == '__main__':
    write_model()
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print('\n' + json.dumps(results))
