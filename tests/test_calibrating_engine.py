"""Calibration while serving, as an engine does it: LMDeploy's own model, loader and steps, and what is asked for."""
from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
from helpers import frobenius
from hypothesis import given
from hypothesis import strategies as st
from test_calibrating import PAGE, STATIC, installed  # noqa: F401  installed is a fixture
from test_loading import build, wrapped, write_model
from test_prefill import dense_attention

import lmdeploy_kvq as kvq
from lmdeploy_kvq._autoload import CALIBRATE, SCALES
from lmdeploy_kvq.backends import asked
from lmdeploy_kvq.backends.calibrating import ATTRIBUTE
from lmdeploy_kvq.scales import fingerprint, read_file, validate, write_file

# ---- the engine's own steps


@pytest.fixture
def pretended(monkeypatch):
    """What LMDeploy's kernels ask a GPU for before they are launched, so that they run in the interpreter."""
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda *args: None)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: SimpleNamespace(major=8, minor=0, multi_processor_count=4))


class Silu(torch.nn.Module):
    """In the place of LMDeploy's activation kernel, which the interpreter cannot run."""

    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class Served:
    """An agent's model as ``model_forward`` runs it, built by LMDeploy; pages and inputs are LMDeploy's own classes."""

    def __init__(self, folder, policy, before=None):
        from lmdeploy.pytorch.backends.graph_runner import GraphRunner
        from lmdeploy.pytorch.config import CacheConfig

        from lmdeploy_kvq.backends.loading import attention_layers
        self.agent = build(folder, policy, empty=before is not None, before=before)
        self.model = self.agent.patched_model
        self.config = CacheConfig(max_batches=4, block_size=PAGE, num_cpu_blocks=0, num_gpu_blocks=8,
                                  quant_policy=policy)
        self.layers = attention_layers(self.model)
        for module in self.layers.values():
            module.impl.flash_attention_fwd = dense_attention
        for part in self.model.model.layers:
            part.mlp.act_fn = Silu()
        self.runner = GraphRunner(self.model, self.agent.model_config, self.config, None, 'cpu')
        self.pages = [kvq.PagedCache.allocate(policy, 8, PAGE, 2, 16, device='cpu') for _ in self.layers]

    @torch.inference_mode()
    def forward(self, ids, history=0, dummy=False):
        """One sequence on pages 1 and 2; returns its hidden states."""
        from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
        from lmdeploy.pytorch.engine.model_agent import agent
        from lmdeploy.pytorch.model_inputs import ModelInputs
        total = history + len(ids)
        inputs = ModelInputs(
            input_ids=torch.tensor([ids]), seq_length=torch.tensor([len(ids)]), history_lengths=torch.tensor([history]),
            block_offsets=torch.tensor([[1, 2]], dtype=torch.int32), is_decoding=history > 0 and len(ids) == 1,
            num_ignored_history=torch.tensor([0]), max_q_seqlen=len(ids), max_kv_seqlen=total, sum_kv_seqlen=total,
            is_dummy=dummy)
        engine = SimpleNamespace(cache_config=self.config, block_caches={},
                                 gpu_cache=[(page.k_codes, page.v_codes) for page in self.pages])
        states = SimpleNamespace(state_caches=[], named_state_caches={})
        with get_device_manager().context(DeviceContext(device_type='cuda')):
            return agent.model_forward(self.runner, inputs, self.agent.model_config, engine, states)['hidden_states'][0]


@pytest.mark.parametrize('granularity', ['tensor', 'head'])
def test_an_engine_finds_its_scales(tmp_path, monkeypatch, pretended, caplog, granularity):
    """LMDeploy's model, loader, inputs and step: warm-up, prompt, decoding, the step that sets the scales, the file."""
    import transformers
    from safetensors.torch import load_file, save_file
    fmt, ids = STATIC[0], [3, 9, 4, 5, 60, 7]
    write_model(tmp_path, 'Llama')
    weights = load_file(tmp_path / 'model.safetensors')
    for name in weights:  # keys far beyond the range, and not alike
        if 'k_proj' in name:
            weights[name] *= torch.tensor([20000.0, 4000.0]).repeat_interleave(16)[:, None].to(weights[name].dtype)
        elif 'q_proj' in name:
            weights[name] /= 2000
    save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        base = oracle(torch.tensor([ids]), output_hidden_states=True, use_cache=True)
    exact = base.hidden_states[-1][0]

    monkeypatch.setenv(CALIBRATE, f'4,{granularity}')
    served = Served(tmp_path, fmt.policy)
    assert '4 tokens served' in caplog.text and 'pending' in caplog.text
    buffers = [x for module in served.layers.values() for x in (module.k_scale, module.v_scale)]
    addresses = [x.data_ptr() for x in buffers]
    from lmdeploy.pytorch.backends.cuda.graph_runner.runner import CUDAGraphRunner
    graphs = CUDAGraphRunner.__new__(CUDAGraphRunner)
    graphs.model, graphs.enable_graph, graphs.num_blocks = served.model, lambda **inputs: True, 8
    step = {'attn_metadata': SimpleNamespace(quant_policy=fmt.policy, block_offsets=torch.zeros(1, 8))}
    context, replayed = SimpleNamespace(global_is_decoding=lambda: True), []
    served.layers['model.layers.0.self_attn.attn_fwd'].register_forward_pre_hook(
        lambda *args: replayed.append(graphs._should_use_full_graph(context, step)))

    served.forward([1, 2], dummy=True)  # warm-up captures graphs, and is no data
    assert frobenius(served.forward(ids[:3]), exact[:3]) < 5e-3
    assert frobenius(served.forward(ids[3:4], history=3), exact[3:4]) < 5e-3
    assert not (tmp_path / 'kv_scales.safetensors').exists() and replayed == [True, False, False]
    assert frobenius(served.forward(ids[4:5], history=4), exact[4:5]) < 0.1  # the fifth token does not fit
    assert frobenius(served.forward(ids[5:], history=5), exact[5:]) < 0.1
    assert replayed[3:] == [False, True] and [x.data_ptr() for x in buffers] == addresses

    file = read_file(tmp_path / 'kv_scales.safetensors')
    validate(file, range(2), 2)
    assert file.metadata.pop('date').count('-') == 2
    assert file.metadata.pop('scale_digest')
    assert file.metadata == {'format': fmt.name, 'method': 'absmax', 'granularity': granularity, 'model': tmp_path.name,
                             'fingerprint': fingerprint(tmp_path), 'tokens': '5', 'data': 'served',
                             'engine': 'lmdeploy', 'partial': 'false'}
    for n, (cached, module) in enumerate(zip(base.past_key_values.layers, served.layers.values())):
        found = file.layers[n].resolved('')[:2]
        for x, scale, buffer, encoding in zip((cached.keys, cached.values), found, (module.k_scale, module.v_scale),
                                              (fmt.key, fmt.value)):
            size = x[0, :, :5].abs().amax((1, 2)) / encoding.codec.qmax
            torch.testing.assert_close(scale, size if granularity == 'head' else size.max(), rtol=2e-2,
                                       atol=0)  # fp16 weights; the fifth token saw fp8 in the layer before
            assert torch.equal(buffer, scale)
    assert caplog.text.count('calibrated') >= 2 and 'wrote' in caplog.text

    caplog.clear()
    monkeypatch.setenv(SCALES, str(tmp_path / 'elsewhere.safetensors'))
    again = Served(tmp_path, fmt.policy, before=wrapped(served.model))  # a level-2 sleep: nothing is asked of files
    assert 'pending' not in caplog.text and 'calibrated' in caplog.text
    for module, other in zip(again.layers.values(), served.layers.values()):
        assert torch.equal(module.k_scale, other.k_scale) and torch.equal(module.v_scale, other.v_scale)
    monkeypatch.delenv(SCALES)
    caplog.clear()
    assert all(not hasattr(module.impl, ATTRIBUTE) for module in Served(tmp_path, fmt.policy).layers.values())
    assert 'calibrated' in caplog.text, 'the next start reads the file'


def test_a_model_rebuilt_while_scales_are_pending_starts_again(tmp_path, monkeypatch):
    """Level-2 wake-up before enough was served: the old logs are gone, the new model's are empty."""
    from lmdeploy_kvq.backends.freezing import pending_scales
    write_model(tmp_path, 'Llama')
    monkeypatch.setenv(CALIBRATE, '100')
    model = build(tmp_path, STATIC[0].policy).patched_model
    first = pending_scales(model)
    assert first is not None and first.nbytes == 100 * 2 * 2 * 2 * 16 * 2
    again = build(tmp_path, STATIC[0].policy, empty=True, before=wrapped(model)).patched_model
    assert pending_scales(model) is None and first.layers == [] and pending_scales(again).nbytes == first.nbytes + \
        100 * 2 * 2 * 2 * 16 * 2


def test_a_file_that_cannot_be_written_does_not_end_the_server(tmp_path, monkeypatch, caplog):
    from lmdeploy_kvq.backends import freezing
    from lmdeploy_kvq.backends.calibrating import Found
    from lmdeploy_kvq.backends.loading import attention_layers, model_scales
    write_model(tmp_path, 'Llama')
    monkeypatch.setenv(CALIBRATE, '100')
    monkeypatch.setenv(SCALES, str(tmp_path / 'gone' / 'x.safetensors'))
    model = build(tmp_path, STATIC[0].policy).patched_model
    found = {name: Found(torch.tensor(0.5), torch.tensor(2.0), {}, 7) for name in attention_layers(model)}
    model_scales(model).calibration.finish(found)
    assert 'x.safetensors is not written' in caplog.text and '--kv-scales PATH' in caplog.text
    caplog.clear()
    monkeypatch.delenv(SCALES)
    found.popitem()
    freezing._take(model, STATIC[0], found, str(tmp_path), 'tensor', quiet=False)
    assert '1 layers attended to nothing' in caplog.text and not (tmp_path / 'kv_scales.safetensors').exists()


# ---- what is asked for


@pytest.mark.parametrize('text', ['', '0', '-3', 'x', '5,', '5,heads', '5.5', ',head', '1e3'])
def test_what_cannot_be_read(text, monkeypatch):
    if text == '5,':
        assert asked.parse(text) == asked.Request(5)
        return
    with pytest.raises(ValueError, match='not a number of tokens above 0'):
        asked.parse(text)
    monkeypatch.setenv(CALIBRATE, text)
    if text:
        with pytest.raises(ValueError, match=f'{CALIBRATE}: '):
            asked.requested()
    else:
        assert asked.requested() is None


@given(tokens=st.integers(1, 10**9), granularity=st.sampled_from(['', ',head', ',tensor', ' , HEAD ']))
def test_what_can_be_read(tokens, granularity):
    assert asked.parse(f' {tokens}{granularity}') == asked.Request(tokens, granularity.strip(' ,').lower() or 'tensor')


def configurations(folder, policy=STATIC[0].policy, **changes):
    """LMDeploy's own."""
    from lmdeploy.pytorch.config import CacheConfig, ModelConfig
    model = ModelConfig.from_pretrained(str(folder), dtype='float16', device_type='cuda')
    cache = CacheConfig(max_batches=8, block_size=64, num_cpu_blocks=0, num_gpu_blocks=8, quant_policy=policy)
    for name, value in changes.items():
        setattr(model if hasattr(model, name) else cache, name, value)
    return model, cache


def refuse(model, cache, match):
    import lmdeploy.pytorch.engine.executor as executor
    with pytest.raises(ValueError, match=match):
        executor._finalize_sparse_mla_cache_policy([model], cache)


def test_what_it_does_not_work_with_is_refused_before_loading(tmp_path, monkeypatch):
    """By LMDeploy's own step before workers start; not where the file is there already."""
    import lmdeploy.pytorch.engine.executor as executor
    from lmdeploy.pytorch.config import DistConfig
    from lmdeploy.pytorch.disagg.config import EngineRole
    write_model(tmp_path, 'Llama')
    monkeypatch.setenv(CALIBRATE, '100')
    for policy in (0, 8, *(fmt.policy for fmt in kvq.FORMATS if fmt.per_token_head)):
        refuse(*configurations(tmp_path, policy), 'asks to calibrate while serving.*serve one of fp8')
    executor._finalize_sparse_mla_cache_policy([(pair := configurations(tmp_path))[0]], pair[1])
    dp = DistConfig(dp=2, tp=2)
    cases = [({'dist_config': dp}, 'data parallelism'), ({'role': EngineRole.Prefill}, 'disaggregated serving'),
             ({'model_paradigm': 'ar_spec'}, 'speculative decoding'),
             ({'model_paradigm': 'dllm'}, 'block-diffusion models'),
             ({'enable_prefix_caching': True, 'states_shapes': [((1, ), torch.float16)]},
              'prefix caching of models with recurrent states')]
    for changes, match in cases:
        refuse(*configurations(tmp_path, **changes), f'does not work with {match}.*lmdeploy-kvq calibrate MODEL -o')
    monkeypatch.setenv(SCALES, str(tmp_path / 'nowhere' / 'x.safetensors'))
    refuse(*configurations(tmp_path), 'cannot be written; name a file that can be with --kv-scales')
    monkeypatch.delenv(SCALES)
    write_file(tmp_path / 'kv_scales.safetensors', {n: (torch.ones(()), torch.ones(())) for n in range(2)}, {})
    for changes, _ in cases:
        executor._finalize_sparse_mla_cache_policy([(pair := configurations(tmp_path, **changes))[0]], pair[1])


def test_the_stock_command_takes_it(monkeypatch, capsys):
    """Next to --kv-scales; other policies are refused in a sentence."""
    import os

    from lmdeploy.cli.utils import ArgumentHelper

    from lmdeploy_kvq.backends.config import run_with_backend
    parser = argparse.ArgumentParser()
    ArgumentHelper.quant_policy(parser)
    ArgumentHelper.backend(parser)
    seen = []
    monkeypatch.setenv(CALIBRATE, '')  # so that what the command sets is taken back
    args = parser.parse_args(['--quant-policy', 'fp8', '--kv-calibrate', '4096,head'])
    run_with_backend(seen.append, args)
    assert os.environ[CALIBRATE] == '4096,head' and not hasattr(seen[0], 'kv_calibrate')
    assert 'unquantized' in parser.format_help()
    for policy in ('int8', 'fp8_per_token_head', '0'):
        with pytest.raises(SystemExit, match=r'--kv-calibrate .* asks to calibrate while serving'):
            run_with_backend(seen.append, parser.parse_args(['--quant-policy', policy, '--kv-calibrate', '9']))
    with pytest.raises(SystemExit):
        parser.parse_args(['--kv-calibrate', '0'])
    assert 'not a number of tokens above 0' in capsys.readouterr().err and len(seen) == 1
