"""A picture in the prompts of the tiny Qwen2-VL: for transformers, and as scripts/token_engine.py takes it."""
from __future__ import annotations

from typing import Any

import torch

START, IMAGE, END = 252, 250, 253  # as in models.py
SPEC = {'seed': 0, 'grid': [1, 8, 8], 'patch': 3 * 2 * 14 * 14, 'offset': 21, 'token': IMAGE, 'tokens': 16}


def prompt(ids: list[int]) -> list[int]:
    """A prompt with the picture behind its first 20 tokens."""
    return [*ids[:20], START, *[IMAGE] * SPEC['tokens'], END, *ids[20:]]


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, ids: list[int], cache: Any = None, shown: bool = True) -> torch.Tensor:
    """transformers' predictions with the picture, or with one of zeros: fp32 [tokens, vocabulary]."""
    import token_engine
    picture, tokens = token_engine.picture(SPEC), torch.tensor([ids])
    return model(tokens, pixel_values=picture['pixel_values'] * shown, image_grid_thw=picture['image_grid_thw'],
                 mm_token_type_ids=(tokens == IMAGE).int(), past_key_values=cache).logits[0].float().log_softmax(-1)


