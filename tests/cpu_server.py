"""LMDeploy's API server where no GPU is: a program, ``python cpu_server.py MODEL PORT SESSION_LEN``.

Everything above the engine is LMDeploy's own: HTTP, validation, sessions, tokenizer, streaming, cancelling, metrics.
Its PyTorch engine does not run on a CPU; in its place a model of transformers generates greedily, one request at a
time, token by token. So this tests clients and what happens to requests on their way, not the engine.
"""
from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from lmdeploy.messages import EngineOutput, PytorchEngineConfig, RequestMetrics, ResponseType, ScheduleMetrics
from lmdeploy.serve.core import AsyncEngine
from transformers import AutoModelForCausalLM


class Handle:
    """What serves one request at a time; LMDeploy keeps a pool of them."""

    def __init__(self, engine: Engine):
        self.engine, self.cancelled = engine, False

    async def async_cancel(self, session_id: int) -> None:
        self.cancelled = True

    async def async_stream_infer(self, session_id: int, input_ids: list[int], gen_config: Any, adapter_name=None,
                                 stream_output=True, **kwargs: Any):
        """One :class:`EngineOutput` per token, as the engine's own instances yield them."""
        self.cancelled, engine = False, self.engine
        vocabulary = engine.model.config.vocab_size
        if not input_ids or min(input_ids) < 0 or max(input_ids) >= vocabulary:
            yield EngineOutput(ResponseType.INTERNAL_ENGINE_ERROR, [])
            return
        engine.active += 1
        try:
            past, new = None, input_ids
            limit = min(gen_config.max_new_tokens, engine.engine_config.session_len - len(input_ids))
            for number in range(limit):
                await asyncio.sleep(0.002)  # others may run, and cancel
                if self.cancelled:
                    yield EngineOutput(ResponseType.CANCEL, [])
                    return
                with torch.inference_mode():
                    out = engine.model(torch.tensor([new]), past_key_values=past, use_cache=True)
                past, logp = out.past_key_values, out.logits[0, -1].float().log_softmax(-1)
                values, ids = logp.topk(max(gen_config.logprobs or 1, 1))
                new = ids[:1].tolist()
                last = number + 1 == limit or new[0] in (gen_config.stop_token_ids or []) and not gen_config.ignore_eos
                yield EngineOutput(ResponseType.FINISH if last else ResponseType.SUCCESS, new,
                                   logprobs=[dict(zip(ids.tolist(), values.tolist()))] if gen_config.logprobs else None,
                                   req_metrics=RequestMetrics())
                if last:
                    return
        finally:
            engine.active -= 1


class Engine:
    """The surface of LMDeploy's PyTorch engine that its server uses."""

    def __init__(self, path: str, config: PytorchEngineConfig):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.engine_config, self.active = config, 0

    def create_instance(self) -> Handle:
        return Handle(self)

    def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics(active_seqs=self.active, cache_usage=self.active / 100)

    async def get_health_status(self) -> dict:
        return {'alive': True, 'message': '', 'schedule_metrics': None}

    def start_loop(self) -> bool:
        return True

    def close(self) -> None:
        pass


if __name__ == '__main__':
    from lmdeploy.serve.openai import api_server
    torch.set_num_threads(1)
    AsyncEngine._build_pytorch = lambda self, model_path, backend_config, **kwargs: Engine(model_path, backend_config)
    api_server.serve(sys.argv[1], backend='pytorch', server_name='127.0.0.1', server_port=int(sys.argv[2]),
                     backend_config=PytorchEngineConfig(session_len=int(sys.argv[3]), max_batch_size=8,
                                                        enable_metrics=True, logprobs_mode='raw_logprobs'))
