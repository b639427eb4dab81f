"""Speculative decoding: what is configured, allocated and loaded; acceptance is in test_speculative_gpu.py."""
from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import drafts
import models
import pytest
import torch
from helpers import by_name
from test_architectures import cache_config

import lmdeploy_kvq as kvq
from lmdeploy_kvq._autoload import SCALES
from lmdeploy_kvq.kernels.decode import MAX_QUERY_LEN
from lmdeploy_kvq.scales import FILE_NAME, ScaleError, write_file

pytestmark = pytest.mark.covers('feature.speculative')
STATIC = [fmt for fmt in kvq.FORMATS if fmt.needs_scales]


@pytest.fixture(scope='module', autouse=True)
def installed():
    """The hook, whatever this process's environment says."""
    kvq.install()


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A target model, and its draft, in fp16."""
    models.write(tmp_path / 'target', 'llama', torch.float16)
    drafts.write_eagle(tmp_path / 'draft', tmp_path / 'target')
    return tmp_path / 'target', tmp_path / 'draft'


def configure(folders: tuple[Path, Path], policy: int, tokens: int = drafts.DRAFTED, method: str = 'eagle', model=None):
    """LMDeploy's own configuration of the draft, for a target with a cache of ``policy``."""
    from lmdeploy.pytorch.config import SpecDecodeConfig
    return SpecDecodeConfig.from_config(
        method=method, num_speculative_tokens=tokens, model=str(folders[1]) if model is None else model,
        target_cache_cfg=cache_config(policy), target_model=str(folders[0]), dtype='float16')


def build_draft(folders: tuple[Path, Path], policy: int, method: str = 'eagle', target=None):
    """LMDeploy's ``SpecModelAgent.build_model`` on the CPU, with what it needs of an agent; returns the draft."""
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.models.patch import BuildModelContext
    from lmdeploy.pytorch.spec_decode.proposers.base import build_specdecode_proposer
    from lmdeploy.pytorch.spec_decode.spec_agent import SpecModelAgent
    config = configure(folders, policy, method=method)
    agent = SimpleNamespace(proposer=build_specdecode_proposer(config, device='cpu'), rank=0,
                            draft_context=contextlib.nullcontext, cache_config=config.cache_config,
                            model_config=config.model_config)
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        SpecModelAgent.build_model(agent, False, target_model=target, build_model_ctx=BuildModelContext())
    return agent.proposer.model


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_the_draft_shares_the_policy(folders, fmt):
    """Checked like the target before anything is loaded, and its pages are allocated in the same format."""
    from lmdeploy.pytorch.engine import executor
    from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan
    config = configure(folders, fmt.policy)
    assert config.model_config.hf_config.architectures == ['EagleLlamaForCausalLM']
    executor._finalize_sparse_mla_cache_policy([config.model_config], config.cache_config)
    assert int(config.cache_config.quant_policy) == fmt.policy
    planned = build_block_cache_plan(config.model_config, config.cache_config, 1)
    assert planned.logical_block_nbytes == kvq.capacity.block_bytes(fmt, kvq.capacity.CacheShape(2, 2, 128))


def test_more_draft_tokens_than_the_kernel_reads_are_refused(folders):
    """Before the draft's configuration is read: the kernel reads one token more than are drafted."""
    for fmt in kvq.FORMATS:
        assert configure(folders, fmt.policy, MAX_QUERY_LEN - 1).num_speculative_tokens == MAX_QUERY_LEN - 1
        with pytest.raises(ValueError, match=f'{fmt.name}: {MAX_QUERY_LEN} draft tokens .* up to {MAX_QUERY_LEN - 1}'):
            configure(folders, fmt.policy, MAX_QUERY_LEN)
    assert configure(folders, 0, MAX_QUERY_LEN).num_speculative_tokens == MAX_QUERY_LEN


def test_dflash_refuses_quantized_caches_itself(folders):
    """Its draft attends in both directions; LMDeploy says so for every policy but none."""
    for fmt in kvq.FORMATS:
        with pytest.raises(ValueError, match='DFlash V1 does not support KV-cache quantization'):
            configure(folders, fmt.policy, method='dflash')


def buffers(model) -> list[tuple[float, float]]:
    from lmdeploy_kvq.backends.loading import attention_layers
    return [(float(m.k_scale), float(m.v_scale)) for m in attention_layers(model).values()]


def pair(k: float, v: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(k), torch.tensor(v)


@pytest.mark.parametrize('fmt', STATIC, ids=by_name)
def test_a_draft_has_scales_of_its_own(folders, fmt, monkeypatch, caplog):
    """From a file beside its weights, else 1.0 with a line that says so; never those of the target."""
    target, draft = folders
    write_file(target / FILE_NAME, {n: pair(3, 4) for n in range(2)}, {'format': fmt.name})
    named = target / 'named.safetensors'
    write_file(named, {n: pair(5, 6) for n in range(7)}, {'format': fmt.name})  # of a target with more layers
    monkeypatch.setenv(SCALES, str(named))
    assert buffers(build_draft(folders, fmt.policy)) == [(1, 1)] * 2
    lines = [r.message for r in caplog.records if '2 of 2 layers of the draft model' in r.message]
    assert len(lines) == (fmt.key.codec.qmax < 1000), 'e5m2 has range to spare'
    caplog.clear()
    write_file(draft / FILE_NAME, {n: pair(n + 1.5, 2) for n in range(2)}, {'format': fmt.name})
    assert buffers(build_draft(folders, fmt.policy)) == [(1.5, 2), (2.5, 2)]
    assert 'of the draft model' not in caplog.text
    (draft / FILE_NAME).unlink()
    monkeypatch.setenv(SCALES, 'strict')
    with pytest.raises(ScaleError, match='strict: no scales for 2 of 2 layers'):
        build_draft(folders, fmt.policy)


def test_scales_of_a_drafts_checkpoint(folders, monkeypatch):
    from safetensors.torch import load_file, save_file
    monkeypatch.delenv(SCALES, raising=False)
    path = folders[1] / 'model.safetensors'
    save_file({**load_file(path), **{f'layers.{n}.self_attn.{x}_scale': torch.tensor(n + 1.5)
                                     for n in range(2) for x in 'kv'}}, path, metadata={'format': 'pt'})
    for fmt in kvq.FORMATS:
        expected = [(1.5, 1.5), (2.5, 2.5)] if fmt.needs_scales else [(1, 1)] * 2
        assert buffers(build_draft(folders, fmt.policy)) == expected


@pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)
def test_an_eagle3_draft_loads(folders, fmt, monkeypatch):
    """Its one layer has no number for a scale file to name; only a file could ask for one."""
    monkeypatch.delenv(SCALES, raising=False)
    drafts.write_eagle3(folders[1], folders[0])
    target = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(models.VOCAB, models.HIDDEN))
    assert buffers(build_draft(folders, fmt.policy, 'eagle3', target)) == [(1, 1)]


def test_a_drafts_steps_know_the_format_of_its_pages(monkeypatch):
    """LMDeploy names no policy where it runs a draft (draft_model_forward): its pages would be read as bf16."""
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch import model_inputs
    monkeypatch.setattr(model_inputs.StepContext, 'new', lambda *args: args[5])
    manager = model_inputs.StepContextManager()
    for policy in (*(fmt.policy for fmt in kvq.FORMATS), 0, 8):
        cache_config = SimpleNamespace(quant_policy=QuantPolicy(policy))
        expected = policy if policy not in (0, 8) else QuantPolicy.NONE
        assert manager.build_context(inputs=None, model_config=None, cache_config=cache_config) == expected
        assert manager.build_context(None, None, cache_config, kv_quant_policy=QuantPolicy(policy)) == policy


def test_the_targets_file_is_not_checked_against_the_draft(folders, monkeypatch):
    """Before loading: a file of the target's layers would not fit a draft of one layer."""
    from lmdeploy.pytorch.engine import executor
    fmt = STATIC[0]
    named = folders[0] / 'named.safetensors'
    write_file(named, {n: pair(5, 6) for n in range(7)}, {'format': fmt.name})
    monkeypatch.setenv(SCALES, str(named))
    config = configure(folders, fmt.policy)
    executor._finalize_sparse_mla_cache_policy([config.model_config], config.cache_config)
    write_file(folders[1] / FILE_NAME, {0: pair(1, 1)}, {'format': fmt.name})
    with pytest.raises(ScaleError, match='layer 1'):
        executor._finalize_sparse_mla_cache_policy([config.model_config], config.cache_config)


def test_a_draft_among_the_targets_weights_has_no_folder(folders):
    """Multi-token prediction: the scale file beside the weights is the target's."""
    from lmdeploy_kvq.backends.drafts import draft_file, draft_folder
    write_file(folders[0] / FILE_NAME, {n: pair(3, 4) for n in range(2)}, {})
    for model in ('', str(folders[0])):
        folder = draft_folder(configure(folders, STATIC[0].policy, model=model).model_config)
        assert folder == '' and draft_file(folder) == (None, False)
    assert draft_folder(configure(folders, 0).model_config) == str(folders[1])


def test_the_draft_computes_what_the_target_computes(folders):
    """By transformers: the target without its first norm, and without the first token of the text."""
    model = models.build('llama')
    ids = models.prompts(1, 200)[0]
    whole = models.log_probabilities(model, ids)[1:].argmax(-1)
    agreement = float((models.log_probabilities(drafts.as_draft(model), ids[1:]).argmax(-1) == whole).float().mean())
    assert 0.7 < agreement < 1


def test_accepted_drafts_are_counted():
    """Three per step: two right, then one that the target replaces; none right; then the text ends."""
    text = [5, 6, 7, 8, 9, 10]
    assert drafts.count_accepted([5, 6, 0, 0, 9, 10], text, 3) == (4, 9)
    assert drafts.count_accepted([5] * 8, [5] * 8, 3) == (6, 6)
    assert drafts.count_accepted([], [], 3) == (0, 0)


def test_acceptance_of_a_target_that_drafts_for_itself():
    """Exact caches: what is left are texts that the first token of the prompt would have changed."""
    model = models.build('llama')
    prompts = models.prompts(2, 24, seed=3)
    texts = []
    for ids in prompts:
        with torch.inference_mode():
            texts.append(model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids):].tolist())
    draft = drafts.as_draft(model)
    exact = drafts.acceptance(draft, prompts, texts, None, drafts.DRAFTED)
    assert 0.3 < exact < 1
    assert drafts.acceptance(draft, prompts, [text[::-1] for text in texts], None, drafts.DRAFTED) < exact / 2


def test_a_fitted_draft_foresees_hidden_states(tmp_path):
    """On texts it was fitted to, better than their mean does, adding nothing behind its projection, and better still
    once its layer is trained; what is written is that draft, and LMDeploy loads it."""
    from safetensors.torch import load_file
    models.write(tmp_path / 'target', 'llama', torch.float16)
    model = models.build('llama')
    texts = torch.tensor(models.prompts(40, 64, seed=4))
    torch.manual_seed(0)
    with torch.no_grad():
        states = model.model(texts).last_hidden_state
        known = torch.cat([model.get_input_embeddings()(texts[:, 1:]), states[:, :-1]], -1)

        def error(draft: drafts.EagleDraft) -> float:
            return float((draft(known) - states[:, 1:]).square().mean())

        linear = error(drafts.fit_eagle(tmp_path / 'linear', tmp_path / 'target', model, texts))
        assert linear < 0.7 * (states - states.mean((0, 1))).square().mean()
    weights = load_file(tmp_path / 'linear' / 'model.safetensors')
    assert not any(weights[f'layers.0.{name}.weight'].any() for name in ('self_attn.o_proj', 'mlp.down_proj'))
    trained = drafts.fit_eagle(tmp_path / 'draft', tmp_path / 'target', model, texts, steps=60)
    with torch.no_grad():
        assert error(trained) < 0.95 * linear
    written = load_file(tmp_path / 'draft' / 'model.safetensors')
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in trained.state_dict().items())
    draft = build_draft((tmp_path / 'target', tmp_path / 'draft'), 108)
    assert len(draft.model.layers) == 1
