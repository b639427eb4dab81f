#!/usr/bin/env python3
"""Run one real LMDeploy engine and report what it did, as JSON: greedy text, prompt log-probabilities, cache size.

  scripts/engine_probe.py '{"model": "~/models/smollm2", "quant_policy": "fp8_per_token_head", "out": "/tmp/a.pt"}'

Keys: model; quant_policy; engine (further PytorchEngineConfig arguments); prompts (list of texts) with new_tokens
(greedy), batches (sizes: the first N prompts at once, one round after the other in the same engine); passages (lists
of token ids, scored after generation, because LMDeploy's prompt logits disturb later generations); out (file for the
passages' log-probs).
"""
from __future__ import annotations

import json
import os
import sys
import time


def main(spec: dict) -> dict:
    import torch
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
    start = time.time()
    config = PytorchEngineConfig(quant_policy=spec.get('quant_policy', 0), **spec.get('engine', {}))
    pipe = pipeline(os.path.expanduser(spec['model']), backend_config=config,
                    log_level=spec.get('log_level', 'WARNING'))
    result: dict = {'quant_policy': int(config.quant_policy), 'start_seconds': time.time() - start}
    cache = pipe.async_engine.engine.executor.cache_config if hasattr(pipe.async_engine.engine, 'executor') else None
    if cache is not None:
        result.update(num_gpu_blocks=cache.num_gpu_blocks, block_size=cache.block_size)
    if spec.get('prompts'):
        generation = GenerationConfig(max_new_tokens=spec.get('new_tokens', 32), do_sample=False, ignore_eos=True)
        rounds = []
        for size in spec.get('batches', [len(spec['prompts'])]):
            start = time.time()
            outputs = pipe(spec['prompts'][:size], gen_config=generation, do_preprocess=False)
            rounds.append({'seconds': time.time() - start, 'text': [o.text for o in outputs],
                           'tokens': [o.token_ids for o in outputs],
                           'cached_tokens': [o.cached_tokens for o in outputs]})
        result['rounds'] = rounds
        result['prompt_ids'] = [pipe.async_engine.tokenizer.encode(p, add_bos=True) for p in spec['prompts']]
    if spec.get('score_generated'):
        result['decode_against_prefill'] = []
        for ids, tokens in zip(result['prompt_ids'], result['rounds'][0]['tokens']):
            logits = pipe._run(coro=pipe.async_engine.async_get_logits(input_ids=[ids + tokens])).result()[0]
            scores = logits[len(ids) - 1:-1].float().log_softmax(-1).cpu()
            chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            result['decode_against_prefill'].append({
                'agreement': float((scores.argmax(-1) == torch.tensor(tokens)).float().mean()),
                'worst_gap': float((scores.amax(-1) - chosen).max())})
    if spec.get('passages'):
        scores = []
        for ids in spec['passages']:
            logits = pipe._run(coro=pipe.async_engine.async_get_logits(input_ids=[ids])).result()[0]
            scores.append(torch.log_softmax(logits.float().cuda(), -1).half().cpu())
        torch.save(scores, spec['out'])
        result['perplexity'] = [float(torch.exp(-s[:-1].float().gather(1, torch.tensor(ids[1:])[:, None]).mean()))
                                for s, ids in zip(scores, spec['passages'])]
    pipe.close()
    return result


if __name__ == '__main__':
    print('RESULT ' + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # engine threads may still hold CUDA graphs; the result is out
