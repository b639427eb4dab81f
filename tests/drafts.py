"""Draft models: for the tiny Llama of tests/models.py, and for a trained model."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import models
import torch

from lmdeploy_kvq.accuracy import agreeing


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


@torch.inference_mode()
def fit_eagle(folder: Path, target: Path, model: torch.nn.Module, texts: torch.Tensor) -> None:
    """An EAGLE draft of a trained target, fitted to texts: it foresees hidden states by least squares.

    The joint projection takes the embedding of a token and the target's hidden state before it to the target's hidden
    state after it, as well as a linear map can. The one layer behind it, the target's last, adds nothing.

    Args:
        target: folder of the model; model: the same by transformers, fp32.
        texts: [texts, tokens] token ids, on the model's device.
    """
    from safetensors.torch import save_file
    embedding, hidden = model.get_input_embeddings().weight, model.config.hidden_size
    products = torch.zeros(2 * hidden, 3 * hidden, dtype=torch.float64, device=texts.device)
    for ids in texts.split(32):
        states = model.model(ids).last_hidden_state
        known = torch.cat([embedding[ids[:, 1:]], states[:, :-1]], -1).flatten(0, 1).double()
        products += known.mT @ torch.cat([known, states[:, 1:].flatten(0, 1).double()], 1)
    squares, wanted = products.split([2 * hidden, hidden], 1)
    fitted = torch.linalg.solve(squares + 1e-3 * squares.diagonal().diag(), wanted)
    last = f'model.layers.{model.config.num_hidden_layers - 1}.'
    weights = {f'layers.0.{name.removeprefix(last)}': weight for name, weight in model.state_dict().items()
               if name.startswith(last) and 'input_layernorm' not in name}
    for name in ('self_attn.o_proj.weight', 'mlp.down_proj.weight'):
        weights[f'layers.0.{name}'] = torch.zeros_like(weights[f'layers.0.{name}'])
    weights |= {'fc.weight': fitted.mT, 'embed_tokens.weight': embedding}
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target / 'config.json').read_text())
    # LMDeploy's draft has no head of its own to tie: the target's is taken.
    (folder / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 1, 'tie_word_embeddings': False}))
    save_file({name: weight.to(torch.bfloat16).cpu().contiguous() for name, weight in weights.items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})


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
