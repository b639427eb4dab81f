#!/usr/bin/env python3
"""Runs LMDeploy's engine itself on token ids, without pipeline or tokenizer, and keeps every log-probability.

    python scripts/token_engine.py SPEC.json ANSWER.json

SPEC.json has ``model`` (folder) and, as wanted,

* ``quant_policy``; ``engine``: further arguments of PytorchEngineConfig; ``speculative``: those of SpeculativeConfig;
* ``prompts``: lists of token ids, all continued greedily at once by ``new_tokens``; ``adapter``: name of the LoRA
  adapter to continue and to score with;
* ``image``: a picture of noise in every prompt and passage, for Qwen2-VL: ``seed``, ``grid`` (patches: time, height,
  width), ``patch`` (numbers of one), and ``tokens`` times ``token`` in the text from ``offset`` on;
* ``score_generated``: score the prompts with what was generated, too;
* ``passages``: lists of token ids to score;
* ``out``: file for the tensors (without it none are asked for), written with torch.save, all log-probabilities:
  ``generated`` and, of the same tokens by prefill, ``rescored`` (fp32 [new tokens, vocabulary] per prompt), and
  ``passages`` (fp32 [tokens, vocabulary] each).

ANSWER.json has ``tokens`` (per prompt), ``num_gpu_blocks``, ``start_seconds``, and with a draft model ``drafted`` and
``accepted``: draft tokens in all, and those that the target model took. Everything is generated before anything is
scored: asking LMDeploy 0.18 for prompt logits disturbs later generations of the same engine.
"""
from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import torch


def skip_chat_format() -> None:
    """Of gpt-oss, LMDeploy downloads the vocabulary of the chat format, to parse text. Token ids are not parsed."""
    import openai_harmony
    openai_harmony.load_harmony_encoding = lambda name: None


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, and do what the specification asks for."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.messages import SpeculativeConfig
    from lmdeploy.pytorch.engine import Engine
    start = time.time()
    skip_chat_format()
    config = PytorchEngineConfig(quant_policy=spec.get('quant_policy', 0), logprobs_mode='raw_logits',
                                 **spec.get('engine', {}))
    draft = SpeculativeConfig(**spec['speculative']) if spec.get('speculative') else None
    engine = Engine.from_pretrained(spec['model'], engine_config=config, speculative_config=draft)
    answer = {'start_seconds': time.time() - start, 'num_gpu_blocks': engine.executor.cache_config.num_gpu_blocks}
    # not asyncio.run, which would wait for the tasks of the engine's loop
    return {**answer, **asyncio.new_event_loop().run_until_complete(_run(engine, spec))}


async def _run(engine: Any, spec: dict[str, Any]) -> dict[str, Any]:
    engine.start_loop()
    counts = _count_drafts(engine) if spec.get('speculative') else {}
    sessions, kept = itertools.count(1), {}
    prompts = spec.get('prompts', [])
    scored = bool(spec.get('out'))
    done = await asyncio.gather(*(generate(engine, next(sessions), ids, spec['new_tokens'], spec, scored)
                                  for ids in prompts))
    tokens = [found for found, _ in done]
    kept['generated'] = [scores for _, scores in done]
    if spec.get('score_generated'):
        whole = [await score(engine, next(sessions), ids + found, spec) for ids, found in zip(prompts, tokens)]
        kept['rescored'] = [scores[len(ids) - 1:-1] for ids, scores in zip(prompts, whole)]
    kept['passages'] = [await score(engine, next(sessions), ids, spec) for ids in spec.get('passages', [])]
    if spec.get('out'):
        torch.save(kept, spec['out'])
    return {'tokens': tokens, **counts}


async def generate(engine: Any, session: int, ids: list[int], new_tokens: int, spec: dict[str, Any],
                   scored: bool = True) -> tuple[list[int], torch.Tensor | None]:
    """Continue greedily.

    Returns:
        The new tokens, and the log-probabilities they were taken from if they are to be ``scored``: fp32 [new tokens,
        vocabulary].

    Raises:
        RuntimeError: the engine ended the request otherwise.
    """
    from lmdeploy.messages import GenerationConfig
    vocabulary = engine.model_config.vocab_size
    # LMDeploy takes every image token of a prompt for one of its picture: none may be generated, to be scored later
    never = [spec['image']['token']] if spec.get('image') else None
    config = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, top_k=1, temperature=1.0,
                              logprobs=vocabulary if scored else None, bad_token_ids=never)
    tokens, rows = [], []
    async for out in _stream(engine, session, ids, config, spec):
        tokens += out.token_ids
        rows += out.logprobs or []
    if len(tokens) != new_tokens or scored and len(rows) != new_tokens:
        raise RuntimeError(f'{len(tokens)} tokens and {len(rows)} rows of log-probabilities instead of {new_tokens}')
    if not scored:
        return tokens, None
    scores = torch.tensor([[row[token] for token in range(vocabulary)] for row in rows])
    return tokens, scores.log_softmax(-1)


async def score(engine: Any, session: int, ids: list[int], spec: dict[str, Any]) -> torch.Tensor:
    """Predictions of every position of a prompt: log-probabilities, fp32 [tokens, vocabulary]."""
    from lmdeploy.messages import GenerationConfig
    config = GenerationConfig(max_new_tokens=0, output_logits='all', top_k=1)
    async for out in _stream(engine, session, ids, config, spec):
        logits = out.logits
    return logits[:len(ids)].float().log_softmax(-1).cpu()


async def _stream(engine: Any, session: int, ids: list[int], config: Any, spec: dict[str, Any]) -> Any:
    from lmdeploy.messages import ResponseType
    instance = engine.create_instance()
    pictures = [picture(spec['image'])] if spec.get('image') else None
    async for out in instance.async_stream_infer(session, ids, gen_config=config, multimodal=pictures,
                                                 adapter_name=spec.get('adapter')):
        if out.status not in (ResponseType.SUCCESS, ResponseType.FINISH):
            raise RuntimeError(f'a request of {len(ids)} tokens ended with {out.status}')
        yield out


def picture(image: dict[str, Any]) -> dict[str, Any]:
    """What LMDeploy's preprocessing of an image gives the engine: noise, [patches, numbers of one]."""
    generator, grid = torch.Generator().manual_seed(image['seed']), torch.tensor([image['grid']])
    return {'pixel_values': torch.randn(int(grid.prod()), image['patch'], generator=generator), 'image_grid_thw': grid,
            'offset': image['offset'], 'image_token_id': image['token'], 'image_tokens': image['tokens']}


def _count_drafts(engine: Any) -> dict[str, int]:
    """Count draft tokens and accepted ones where the engine awaits its results; every decode step is seen."""
    counts, receive = {'drafted': 0, 'accepted': 0}, engine.executor.get_output_async
    each = engine.specdecode_config.num_speculative_tokens

    async def get_output_async(*args: Any, **kwargs: Any) -> Any:
        out = await receive(*args, **kwargs)
        tokens = getattr(out, 'next_token_ids', None)  # decoding: [sequences, 1 + draft tokens], -1: rejected
        if tokens is not None and tuple(tokens.shape[1:]) == (each + 1, ):
            counts['drafted'] += each * len(tokens)
            counts['accepted'] += int((tokens > -1).sum()) - len(tokens)
        return out

    engine.executor.get_output_async = get_output_async
    return counts


if __name__ == '__main__':
    from lmdeploy_kvq.backends.probe import as_program
    as_program(main)
