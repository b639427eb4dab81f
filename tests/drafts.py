"""Draft models: for the tiny Llama of tests/models.py, and for a trained model."""
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import models
import torch

from lmdeploy_kvq.accuracy import agreeing

DRAFTED = 3  # tokens per step
LEARNING_RATE, CROSS_ENTROPY = 5e-4, 0.1


def write_eagle(folder: Path, target: Path) -> None:
    """An EAGLE draft that computes what its target computes, from the target's own layers.

    An EAGLE model joins the embedding of the next token with the target's hidden state of the last one, goes without
    the first and the last norm, and leaves the logits to the target's head. Here the joint projection takes the
    embedding alone; rows of the embedding have the same length, so that the first norm changes nothing; and the last
    one scales a position's logits together. What the draft lacks is the first token of the text. So both models answer
    alike as long as both read what was written to their caches.
    """
    from safetensors.torch import load_file, save_file
    config, weights = json.loads((target / 'config.json').read_text()), load_file(target / 'model.safetensors')
    own = {name.removeprefix('model.'): weight for name, weight in weights.items() if name.startswith('model.')}
    for name in ('norm.weight', 'layers.0.input_layernorm.weight'):
        del own[name]
    hidden = config['hidden_size']
    own['fc.weight'] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1).to(own['embed_tokens.weight'])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file({name: weight.contiguous() for name, weight in own.items()}, folder / 'model.safetensors',
              metadata={'format': 'pt'})


class EagleDraft(torch.nn.Module):
    """The joint projection of a token's embedding and the hidden state before it, and one layer without its first norm.

    Its state is that of a checkpoint of LMDeploy's EagleLlamaForCausalLM, but for the embedding.
    """

    def __init__(self, model: torch.nn.Module, projection: torch.Tensor):
        """From the target's last layer, which adds nothing at first; projection: [hidden, 2 * hidden]."""
        super().__init__()
        self.fc = torch.nn.Linear(*reversed(projection.shape), bias=False)
        self.fc.weight.data = projection.contiguous()
        layer = copy.deepcopy(model.model.layers[-1])
        layer.input_layernorm = torch.nn.Identity()
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.data.zero_()
        self.layers, self.places = torch.nn.ModuleList([layer]), model.model.rotary_emb

    def forward(self, known: torch.Tensor) -> torch.Tensor:
        """The hidden states after ``known`` [texts, tokens, 2 * hidden]."""
        states, tokens = self.fc(known), known.size(1)
        places = torch.arange(tokens, device=known.device)[None]
        later = torch.full((1, 1, tokens, tokens), float('-inf'), device=known.device).triu(1)
        return self.layers[0](states, attention_mask=later, position_embeddings=self.places(states, places))


def fit_eagle(folder: Path, target: Path, model: torch.nn.Module, texts: torch.Tensor, steps: int = 0) -> EagleDraft:
    """Write an EAGLE draft of a trained target, fitted to texts: it foresees the target's hidden states.

    First the joint projection by least squares, as well as a linear map can; then, in ``steps`` of AdamW, the layer
    behind it too, to hidden states and to what the target predicts from them (the losses of EAGLE, Li et al. 2024).

    Args:
        target: folder of the model; model: the same by transformers, fp32.
        texts: [texts, tokens] token ids, on the model's device.
    """
    from safetensors.torch import save_file
    embedding, hidden = model.get_input_embeddings().weight.detach(), model.config.hidden_size
    with torch.no_grad():
        states = torch.cat([model.model(ids).last_hidden_state for ids in texts.split(32)])
        known, wanted = torch.cat([embedding[texts[:, 1:]], states[:, :-1]], -1), states[:, 1:]
        products = torch.zeros(2 * hidden, 3 * hidden, dtype=torch.float64, device=texts.device)
        for at in range(0, len(texts), 32):
            given, after = (part[at:at + 32].flatten(0, 1).double() for part in (known, wanted))
            products += given.mT @ torch.cat([given, after], 1)
        squares, crossed = products.split([2 * hidden, hidden], 1)
        projection = torch.linalg.solve(squares + 1e-3 * squares.diagonal().diag(), crossed).mT.to(embedding.dtype)
        draft = EagleDraft(model, projection).to(texts.device)
    train(draft, known, wanted, model.get_output_embeddings().weight.detach(), steps)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target / 'config.json').read_text())
    # LMDeploy's draft has no head of its own to tie: the target's is taken.
    (folder / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 1, 'tie_word_embeddings': False}))
    weights = {'embed_tokens.weight': embedding, **draft.state_dict()}
    save_file({name: weight.to(torch.bfloat16).cpu().contiguous() for name, weight in weights.items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})
    return draft


def train(draft: EagleDraft, known: torch.Tensor, wanted: torch.Tensor, head: torch.Tensor, steps: int) -> None:
    """AdamW, 16 texts at a time: hidden states [texts, tokens, hidden], and what the target's head makes of them."""
    if not steps:
        return
    draft.requires_grad_(True)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(known), (16, ), device=known.device)
        found, right = (part.flatten(0, 1) for part in (draft(known[chosen]), wanted[chosen]))
        loss = torch.nn.functional.smooth_l1_loss(found, right)
        loss += CROSS_ENTROPY * torch.nn.functional.cross_entropy(found @ head.mT, (right @ head.mT).softmax(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def as_draft(model: torch.nn.Module) -> torch.nn.Module:
    """Make the target, by transformers, what :func:`write_eagle` writes of it, in place: without its first norm."""
    model.model.layers[0].input_layernorm = torch.nn.Identity()
    return model


def count_accepted(predicted: Sequence[int], text: Sequence[int], drafted: int) -> tuple[int, int]:
    """Draft tokens that are accepted, and all, where the draft predicts ``predicted`` for the tokens of a text.

    A step drafts ``drafted`` tokens; those before the first wrong one are accepted, and the target adds one.
    """
    accepted = steps = at = 0
    while at < len(text):
        right = agreeing(predicted[at:at + drafted], text[at:at + drafted])
        accepted, steps, at = accepted + right, steps + 1, at + right + 1
    return accepted, steps * drafted


def acceptance(draft: torch.nn.Module, prompts: Sequence[list[int]], texts: Sequence[list[int]], fmt: str | None,
               drafted: int) -> float:
    """The share of draft tokens that are accepted where the target's texts are given, by transformers in fp32.

    Args:
        draft: see :func:`as_draft`.
        texts: what the target generated after each prompt; its first token comes of the prompt, without a draft.
        fmt: the format that the draft's cache stores, None for exact.
    """
    counts = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [*prompt, *text][1:]
        cache = None if fmt is None else models.quantized_cache(draft, fmt)
        predicted = models.log_probabilities(draft, ids, cache).argmax(-1)[-len(text):-1].tolist()
        counts.append(count_accepted(predicted, text[1:], drafted))
    return sum(accepted for accepted, _ in counts) / sum(every for _, every in counts)


def write_eagle3(folder: Path, target: Path) -> None:
    """A random EAGLE3 draft: one layer, without a number, and a vocabulary of its own."""
    from safetensors.torch import save_file
    config = json.loads((target / 'config.json').read_text())
    hidden, inner, vocabulary = config['hidden_size'], config['intermediate_size'], config['vocab_size'] // 2
    queries, keys = (config[f'num_{which}_heads'] * config['head_dim'] for which in ('attention', 'key_value'))
    shapes = {'fc': (hidden, 3 * hidden), 'lm_head': (vocabulary, hidden),
              'midlayer.self_attn.q_proj': (queries, 2 * hidden), 'midlayer.self_attn.k_proj': (keys, 2 * hidden),
              'midlayer.self_attn.v_proj': (keys, 2 * hidden), 'midlayer.self_attn.o_proj': (hidden, queries),
              'midlayer.mlp.gate_proj': (inner, hidden), 'midlayer.mlp.up_proj': (inner, hidden),
              'midlayer.mlp.down_proj': (hidden, inner)}
    weights = {f'{name}.weight': torch.randn(shape) / shape[1]**.5 for name, shape in shapes.items()}
    for name in ('norm', 'midlayer.hidden_norm', 'midlayer.input_layernorm', 'midlayer.post_attention_layernorm'):
        weights[f'{name}.weight'] = torch.ones(hidden)
    weights = {name: weight.to(torch.float16) for name, weight in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 1, 'draft_vocab_size': vocabulary}))
    save_file({**weights, 'd2t': torch.arange(vocabulary)}, folder / 'model.safetensors', metadata={'format': 'pt'})
