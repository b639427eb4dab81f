"""Watches the attention of LMDeploy's engine: post-RoPE Q and K, and V, of a 16-bit cache in eager mode.

The engine runs in this process (one GPU, executor ``uni``), so what the hook wraps reaches the observer through
:data:`ACTIVE`; nothing is watched, and nothing costs anything, while it is None.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from threading import Lock
from typing import Any

import torch

from ..console import UserError
from ..kvstats import ModelStatistics


class Observer:
    """Counts what reaches attention between ``counting = True`` and ``False``: LMDeploy's warm-up is no data.

    Attributes:
        layers: an attention implementation's id to its layer's index.
    """

    def __init__(self, statistics: ModelStatistics):
        self.statistics, self.counting = statistics, False
        self.layers: dict[int, int] = {}
        self._lock = Lock()  # the engine runs in a thread of its own

    def attach(self, layers: Mapping[int, torch.nn.Module]) -> None:
        """Learn a model's attention layers, by index."""
        self.layers = {id(module.impl): index for index, module in layers.items()}

    def see(self, impl: Any, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
            meta: Any) -> None:
        """Count one call of attention: Q [tokens, heads, dim], K and V [tokens, kv_heads, dim], packed sequences."""
        layer = self.layers.get(id(impl))
        if layer is None or key is None or value is None:
            return
        with self._lock:
            if not self.counting:
                return
            tokens = int(meta.q_seqlens.sum())  # rows behind them are padding
            first = torch.zeros(tokens, dtype=torch.bool, device=query.device)
            starts = meta.q_seqlens.cumsum(0) - meta.q_seqlens
            first[starts[meta.kv_seqlens == meta.q_seqlens].long()] = True  # sequences without history
            self.statistics.update(layer, query[:tokens], key[:tokens], value[:tokens], first)

    def stop(self) -> None:
        """Count nothing more; what is being counted is finished first."""
        with self._lock:
            self.counting = False


ACTIVE: Observer | None = None


def observe(folder: str, pieces: Iterable[list[int]], length: int, new_tokens: int, statistics: ModelStatistics,
            done: Callable[[int], None], closing: ExitStack, batch: int = 16) -> None:
    """Serve every piece in a real engine of its own and continue it greedily, counting prompt and generated tokens.

    When it returns, or is interrupted, the statistics are complete and stay as they are.

    Args:
        folder: the model; it must fit one GPU.
        pieces: token ids of prompts, of at most ``length`` tokens.
        new_tokens: tokens to generate after each prompt, at least 1. The last one is not fed back, so not counted.
        statistics: counts; on the GPU.
        done: called with the prompt tokens of each batch when it is through.
        closing: is told how to close the engine; not done here, so that an interrupted caller can save what there is.
        batch: prompts at once.

    Raises:
        UserError: a model whose attention is not the one that is watched.
    """
    global ACTIVE
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
    watcher = ACTIVE = Observer(statistics)
    session_len = 2 * length + new_tokens + 64  # text is tokenized again: not always alike
    config = PytorchEngineConfig(quant_policy=0, eager_mode=True, distributed_executor_backend='uni',
                                 max_batch_size=batch, session_len=session_len)
    # Room for one batch, and no share of the GPU's memory: others may be starting at the same time.
    config.num_gpu_blocks = batch * (session_len // config.block_size + 2)
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
    try:
        pipe = pipeline(folder, backend_config=config, log_level='ERROR')
        closing.callback(pipe.close)
        tokenizer = pipe.async_engine.tokenizer
        watcher.counting = True
        rest = list(pieces)
        while rest:
            now, rest = rest[:batch], rest[batch:]
            pipe([tokenizer.decode(ids) for ids in now], gen_config=generation, do_preprocess=False)
            done(sum(map(len, now)))
    finally:
        watcher.stop()
        ACTIVE = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was counted on the engine's stream is there
    if not statistics.layers:
        raise UserError(f'{folder}: LMDeploy runs this model with another attention than the one whose cache is '
                        'quantized (MLA, or a backend of its own); its KV cache has no static scales')
