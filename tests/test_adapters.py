"""LoRA adapters, and guided decoding: features that change what is written to the cache, or what is taken from it."""
from __future__ import annotations

import json
import re
from pathlib import Path

import engines
import models
import pytest
import torch
from helpers import MODEL
from test_loading import load

import lmdeploy_kvq as kvq

RANK, TARGETS = 4, ('q_proj', 'k_proj', 'v_proj', 'o_proj')


def write_adapter(folder: Path, model: torch.nn.Module, dtype: torch.dtype, seed: int = 7) -> torch.nn.Module:
    """A random adapter of attention's projections, as PEFT saves it; it is merged into ``model``, which is returned.

    It is small enough that a 4-bit cache's tokens stay those of bf16 for a while: four times larger, 16 sequences had
    8 predictions in common on a GPU, too few to compare decoding by.
    """
    from safetensors.torch import save_file
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            a, b = (torch.randn(shape, generator=generator).div_(2 * shape[1]**.5).to(dtype)
                    for shape in ((RANK, module.in_features), (module.out_features, RANK)))
            tensors |= {f'base_model.model.{name}.lora_A.weight': a, f'base_model.model.{name}.lora_B.weight': b}
            module.weight.data += 2 * b.float() @ a.float()
    folder.mkdir(parents=True)
    save_file(tensors, folder / 'adapter_model.safetensors')
    (folder / 'adapter_config.json').write_text(json.dumps({
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': RANK, 'lora_alpha': 2 * RANK, 'lora_dropout': 0.0,
        'target_modules': list(TARGETS), 'base_model_name_or_path': 'llama', 'bias': 'none'}))
    return model


@pytest.mark.covers('feature.lora')
def test_lmdeploy_loads_the_adapter(tmp_path):
    """On the CPU: every projection of attention has it, and our formats find the layers they find without."""
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.models.patch import add_adapters

    from lmdeploy_kvq.backends.loading import attention_layers, settle
    kvq.install()
    models.write(tmp_path / 'model', 'llama', torch.float16)
    merged = write_adapter(tmp_path / 'adapter', models.build('llama'), torch.float16)
    ids = models.prompts(1, 100)[0]
    assert engines.kl([models.log_probabilities(models.build('llama'), ids)],
                      [models.log_probabilities(merged, ids)]) > 0.2, 'it must show'
    model = load(tmp_path / 'model')
    with get_device_manager().context(DeviceContext(device_type='cuda')):
        add_adapters(model, {'tiny': str(tmp_path / 'adapter')}, dtype=torch.float16, device='cpu')
    found = [(name.rpartition('.')[2], module.lora_A.size(0)) for name, module in model.named_modules()
             if type(module).__name__ == 'LoRA']
    assert len(found) == 2 * len(TARGETS) and set(found) == {(target, RANK) for target in TARGETS}
    for fmt in kvq.FORMATS:
        settle(model, fmt.policy, str(tmp_path / 'model'), 2, quiet=True)
    assert len(attention_layers(model)) == 2


@pytest.mark.gpu
@pytest.mark.covers('feature.lora')
def test_an_adapters_cache_loses_what_the_format_loses(tmp_path):
    """With the adapter on: as architectures are judged, against the merged model."""
    models.write(tmp_path / 'model', 'llama')
    base = models.build('llama').to(torch.bfloat16).float()
    plain = [models.log_probabilities(base, ids) for ids in engines.PASSAGES]
    merged = write_adapter(tmp_path / 'adapter', base, torch.bfloat16)
    specs = engines.six_engines()
    for spec in specs.values():
        spec['adapter'] = 'tiny'
        spec['engine'] = {**spec.get('engine', {}), 'adapters': {'tiny': str(tmp_path / 'adapter')}}
    runs = engines.run(tmp_path / 'model', specs)
    target = [models.log_probabilities(merged, ids) for ids in engines.PASSAGES]
    assert engines.kl(target, runs['none graph']['passages']) < engines.kl(plain, target) / 10, 'the adapter is on'
    figures = engines.measure(runs, engines.losses(merged))
    print(figures)
    assert engines.problems(figures) == [], figures


SCHEMA = {'type': 'object', 'properties': {'city': {'enum': ['Paris', 'Rome', 'Cairo']}, 'large': {'type': 'boolean'}},
          'required': ['city', 'large'], 'additionalProperties': False}
GUIDES = {'json': {'type': 'json_schema', 'json_schema': {'name': 'city', 'schema': SCHEMA}},
          'regex': {'type': 'regex_schema', 'regex_schema': r'(January|June|July) [0-9]{1,2}, [0-9]{4}'}}


def matches(kind: str, text: str) -> bool:
    """Whether an answer is what was asked for."""
    if kind == 'regex':
        return re.fullmatch(GUIDES[kind]['regex_schema'], text) is not None
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (isinstance(found, dict) and set(found) == {'city', 'large'} and isinstance(found['large'], bool)
            and found['city'] in SCHEMA['properties']['city']['enum'])


def begins(kind: str, text: str) -> bool:
    """Whether text is the beginning of JSON that was asked for; spaces may go on for ever, as SmolLM2's do at times."""
    whole = [json.dumps({'city': city, 'large': large}, separators=(',', ':'))
             for city in SCHEMA['properties']['city']['enum'] for large in (True, False)]
    return kind == 'json' and any(answer.startswith(re.sub(r'\s', '', text)) for answer in whole)


@pytest.mark.covers('feature.guided')
def test_what_is_asked_for_can_be_compiled():
    """By LMDeploy's own check before a request reaches the engine; and the judgement tells right from wrong."""
    from lmdeploy._guided_decoding import ensure_response_format_compilable
    for guide in GUIDES.values():
        ensure_response_format_compilable(guide)
    assert matches('json', '{"city": "Paris", "large": true}') and matches('regex', 'July 4, 1776')
    for kind, text in (('json', '{"city": "Paris", "large": 1}'), ('json', 'Paris'), ('regex', 'July')):
        assert not matches(kind, text)
    assert begins('json', '{ "city": "Paris",\n \n ') and not begins('json', '{"city": "London')
    assert not begins('regex', 'July 4') and not begins('json', '{ "large": true, ')


@pytest.mark.gpu
@pytest.mark.covers('feature.guided')
def test_guided_answers_match(tmp_path):
    """SmolLM2 through LMDeploy's pipeline: answers follow the grammar with a quantized cache as with bf16.

    In a process of its own, which the engine needs: guided.py is written here.
    """
    program = tmp_path / 'guided.py'
    program.write_text('''
import json, sys
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

if __name__ == '__main__':
    spec = json.load(open(sys.argv[1]))
    pipe = pipeline(spec['model'], backend_config=PytorchEngineConfig(
        quant_policy=spec['quant_policy'], num_gpu_blocks=200, session_len=1024, max_batch_size=8))
    answers = {kind: [[out.text, out.finish_reason] for out in pipe(spec['prompts'], gen_config=GenerationConfig(
        max_new_tokens=96, do_sample=False, response_format=guide))] for kind, guide in spec['guides'].items()}
    json.dump(answers, open(sys.argv[2], 'w'))
    sys.stdout.flush()
    import os
    os._exit(0)
''')
    prompts = ['Name a city as JSON.', 'When was the Declaration of Independence signed?', 'Describe Paris.',
               'Tell me a date.']
    asked = {'prompts': prompts, 'guides': {**GUIDES, 'free': {'type': 'text'}}, 'out': ''}
    policies = {'none': 0, **{name: kvq.get_format(name).policy for name in engines.FORMATS}}
    for found in engines.run(Path(MODEL), {name: {**asked, 'quant_policy': policy} for name, policy in
                                             policies.items()}, program=program).values():
        for kind in GUIDES:
            wrong = [answer for answer in found[kind] if not (
                begins(kind, answer[0]) if answer[1] == 'length' else matches(kind, answer[0]))]
            assert wrong == [] and [reason for _, reason in found[kind]].count('stop') >= 2, found[kind]
            assert not all(matches(kind, text) for text, _ in found['free']), 'it is the grammar that makes them match'
