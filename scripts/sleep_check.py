#!/usr/bin/env python3
"""Scales through a level-2 sleep: the engine drops weights and cache, wakes up, gets its weights, and serves alike.

  scripts/sleep_check.py [MODEL]

The model's checkpoint gets scales of its own, one of which is updated live before the sleep. After waking up, weights
come without scales, as a trainer sends them. Prints RESULT and JSON; exit code 1 if anything differs. One GPU, about
a minute.
"""
from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from eval_engine import PROMPTS

TIMEOUT = 120
LIVE = ('model.layers.1.self_attn.k_scale', 0.03125)


def add_scales(source: Path, target: Path) -> int:
    """Copy a model whose checkpoint then has a K and a V scale per layer; returns the number of layers."""
    import torch
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, target)
    weights = load_file(target / 'model.safetensors')
    layers = json.loads((target / 'config.json').read_text())['num_hidden_layers']
    for layer in range(layers):
        for i, which in enumerate('kv'):
            weights[f'model.layers.{layer}.self_attn.{which}_scale'] = torch.tensor(0.0625 * (1 + i))
    save_file(weights, target / 'model.safetensors', metadata={'format': 'pt'})
    return layers


def main(source: str) -> int:
    import torch
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
    from safetensors.torch import load_file

    from lmdeploy_kvq.backends.loading import attention_layers, bare_model
    from lmdeploy_kvq.scales import parse_name
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, 'model')
        layers = add_scales(Path(source), folder)
        pipe = pipeline(str(folder), backend_config=PytorchEngineConfig(quant_policy='fp8', num_gpu_blocks=200,
                                                                        session_len=1024, max_batch_size=8))
        agent = pipe.async_engine.engine.executor.model_agent
        generation = GenerationConfig(max_new_tokens=32, do_sample=False, ignore_eos=True)

        def call(function, *args):
            return pipe._run(fn=lambda: function(*args)).result(TIMEOUT)

        def scales() -> list[list[float]]:
            return [[float(m.k_scale), float(m.v_scale)]
                    for m in attention_layers(bare_model(agent.patched_model)).values()]

        def update(weights: list) -> None:
            with agent.all_context(), torch.inference_mode():
                agent._load_updated_weight_bucket(weights, 'sleep_check')
                agent._finalize_updated_weights()

        def serve() -> list[list[int]]:
            return [o.token_ids for o in pipe(PROMPTS, gen_config=generation, do_preprocess=False)]

        call(update, [(LIVE[0], torch.tensor(LIVE[1], device='cuda'))])
        result = {'layers': layers, 'before': scales(), 'text before': serve()}
        pipe._run(coro=pipe.async_engine.sleep(2)).result(TIMEOUT)
        call(pipe.async_engine.wakeup, ['weights'])
        result['after waking up'] = scales()
        call(update, [(name, weight.cuda()) for name, weight in load_file(folder / 'model.safetensors').items()
                      if parse_name(name) is None])
        call(pipe.async_engine.wakeup, ['kv_cache'])
        result['after loading weights'], result['text after'] = scales(), serve()
        pipe.close()
    expected = [[LIVE[1] if layer == 1 else 0.0625, 0.125] for layer in range(layers)]
    result['failed'] = [what for what in ('before', 'after waking up', 'after loading weights')
                        if result[what] != expected]
    result['failed'] += ['text'] if result['text before'] != result['text after'] else []
    print('RESULT ' + json.dumps(result), flush=True)
    return 1 if result['failed'] else 0


if __name__ == '__main__':
    code = main(os.path.expanduser(sys.argv[1] if len(sys.argv) > 1 else '~/models/smollm2'))
    os._exit(code)  # engine threads may still hold CUDA graphs; the result is out
