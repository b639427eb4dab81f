"""Speculative decoding with engines on a GPU: a draft model, and how much of what it drafts is accepted."""
from __future__ import annotations

from pathlib import Path

import drafts
import engines
import models
import pytest
import torch
from helpers import MODEL

import lmdeploy_kvq as kvq

pytestmark = pytest.mark.gpu


def with_drafts(folder: Path, draft: Path, prompts: list[list[int]], ways: tuple[str, ...] = ('draft', ),
                scored: bool = True) -> tuple:
    """Engines of the bf16 cache and of three formats, with the draft and, if asked for, alone: runs, and policies.

    Args:
        scored: keep the log-probabilities of what is generated: LMDeploy makes a dictionary of the whole vocabulary for
            every token, a quarter of an hour with 49,152 entries.
    """
    engine = {'num_gpu_blocks': 400, 'session_len': 512, 'max_batch_size': 64, 'cudagraph_capture_batch_sizes': [64]}
    speculative = {'method': 'eagle', 'model': str(draft), 'num_speculative_tokens': drafts.DRAFTED}
    policies = {'none': 0, **{name: kvq.get_format(name).policy for name in engines.FORMATS}}
    return engines.run(folder, {
        f'{name} {way}': {'prompts': prompts, 'new_tokens': 64, 'quant_policy': policy, 'engine': engine,
                          **({'speculative': speculative} if way == 'draft' else {}),
                          **({} if scored else {'out': None})}
        for name, policy in policies.items() for way in ways}, jobs=8, env=engines.fa3_with_pages()), policies


def shares(runs: dict, policies: dict[str, int]) -> dict[str, float]:
    """Of each format, the share of draft tokens that its target accepted."""
    return {name: runs[f'{name} draft']['accepted'] / runs[f'{name} draft']['drafted'] for name in policies}


@pytest.mark.covers('feature.speculative')
def test_acceptance_with_a_trained_model(tmp_path):
    """Of a trained model, whose draft was trained on its own texts: within 2 points of the bf16 cache."""
    from benchlib import write_results
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmdeploy_kvq.evaluation.material import built_in
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).cuda()
    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL).encode(text)[:4096] for text in built_in().values()])
    starts = ids.unfold(1, 16, 16).flatten(0, 1).cuda()
    torch.manual_seed(0)
    texts = model.generate(starts, max_new_tokens=240, do_sample=True, top_k=0, temperature=0.5, num_return_sequences=2,
                           pad_token_id=0)  # nearer to what is generated greedily than at 1.0
    drafts.fit_eagle(tmp_path, Path(MODEL), model, texts, steps=1000)
    del model
    torch.cuda.empty_cache()
    prompts = ids[:, 10:].unfold(1, 24, 40).flatten(0, 1).tolist()[:192]
    runs, policies = with_drafts(Path(MODEL), tmp_path, prompts, scored=False)
    accepted = shares(runs, policies)
    rows = [{'policy': policy, 'drafted': runs[f'{name} draft']['drafted'], 'accepted': accepted[name]}
            for name, policy in policies.items()]
    print(write_results('acceptance_trained', rows, tmp_path, model='SmolLM2, an EAGLE draft trained with it'), rows)
    assert 0.05 < accepted['none'] < 1 and min(row['drafted'] for row in rows) > 10000
    assert {name: share for name, share in accepted.items() if abs(share - accepted['none']) > 0.02} == {}


@pytest.fixture(scope='module')
def random_weights(tmp_path_factory):
    """Engines of a model with random weights, with its draft and alone: a row per cache, by format."""
    folder = tmp_path_factory.mktemp('random')
    models.write(folder / 'target', 'llama')
    drafts.write_eagle(folder / 'draft', folder / 'target')
    prompts = models.prompts(192, 24, seed=3, step=1)
    runs, policies = with_drafts(folder / 'target', folder / 'draft', prompts, ('alone', 'draft'))
    accepted = shares(runs, policies)
    several = {name: engines.kl(*engines.same_history(runs[f'{name} alone'], runs[f'{name} draft']))
               for name in policies}
    exact = drafts.as_draft(models.build('llama').to(torch.bfloat16).float())
    own = {name: drafts.acceptance(exact, prompts, runs[f'{name} draft']['tokens'], name if policy else None,
                                   drafts.DRAFTED)
           for name, policy in policies.items()}
    return {name: {'policy': policy, 'drafted': runs[f'{name} draft']['drafted'], 'accepted': accepted[name],
                   'accepted_by_transformers': own[name], 'kl_of_several_at_once': several[name]}
            for name, policy in policies.items()}


@pytest.mark.covers('feature.speculative')
@pytest.mark.xdist_group('random drafts')
def test_formats_cost_the_acceptance_that_their_error_costs(random_weights, tmp_path):
    """By transformers, within 2 points; and reading several tokens at once predicts what reading one by one predicts.

    A target and its draft round what they read independently of each other, and choices of random weights are close
    calls.
    """
    from benchlib import write_results
    rows, expected = random_weights, engines.reference('llama')
    print(write_results('acceptance', list(rows.values()), tmp_path, model='llama of tests/models.py, its EAGLE draft'),
          rows)
    exact = rows['none']
    assert 0.5 < exact['accepted'] < 1 and exact['drafted'] > 5000
    for name in engines.FORMATS:
        row = rows[name]
        cost, costs = (exact[key] - row[key] for key in ('accepted', 'accepted_by_transformers'))
        assert abs(cost - costs) <= 0.02, f'{name}: not what the error of the format costs'
        several = exact['kl_of_several_at_once']
        assert row['kl_of_several_at_once'] <= 3 * (several + (several * expected[name])**.5)


@pytest.mark.covers('feature.acceptance')
@pytest.mark.xdist_group('random drafts')
def test_acceptance_is_that_of_the_bf16_cache(random_weights):
    """Within 2 points, whatever the format's error costs where every choice is a close call."""
    exact = random_weights['none']['accepted']
    lost = {name: exact - random_weights[name]['accepted'] for name in engines.FORMATS}
    assert {name: share for name, share in lost.items() if abs(share) > 0.02} == {}
