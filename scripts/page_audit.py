#!/usr/bin/env python3
"""Whether the pages of the prefix cache hold what their tokens say, after a load: read again, and compared.

  scripts/page_audit.py --format fp8_per_token_head --rounds 8 --seconds 30

One engine under the load of soak.py, in this process. After every round, when all have been answered, the keys and
values of all cached blocks are kept, the prefix cache is emptied, and every cached text is read again, by itself. Per
token and layer, ``error`` is how far the kept keys (values) are from those read now, relative to these. In the first
layer, keys and values depend on a token and its place alone: any error there is a slot that holds another token.
Further up, it is what the format and rounding make of a token (an answer's tokens saw the cache, and are now read as a
prompt; some tokens react by much, the worst are listed), and of a token computed from something else it is about 1.
``none`` is LMDeploy's bf16 cache. Writes page_audit_FORMAT.json; exit code 1 if a token of the first layer is another
one, if one in a thousand is farther off than --limit, or if a block stays in use.
"""
from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchlib import print_table, write_results
from engine_process import Engine
from smollm2 import chosen_model
from soak import Settings, all_prompts, parse
from soak_load import Prompt, Request, make_requests

from lmdeploy_kvq import flatten, get_format
from lmdeploy_kvq.backends.attention import page_views

BLOCK = 64
WORST = 8


@dataclass(frozen=True)
class Cached:
    """A block of the prefix cache.

    Attributes:
        key: of its text, from the beginning. block: its page. start: position of its first token. path: the text.
    """
    key: bytes
    block: int
    start: int
    path: tuple[int, ...]


def cached(trie: Any) -> Iterator[tuple[Cached, bool]]:
    """Every block of the prefix cache, and whether it is the last of its text."""
    stack = [(root, b'', ()) for root in trie._roots.values()]
    while stack:
        node, key, path = stack.pop()
        for child in node.children.values():
            longer = (*path, *(int(token) for token in child.token_ids))
            name = hashlib.blake2b(key + child.token_ids.tobytes(), digest_size=16).digest()
            yield Cached(name, int(child.block_id), len(path), longer), not child.children
            stack.append((child, name, longer))


class Pages:
    """The pages of an engine in this process."""

    def __init__(self, engine: Engine, policy: str):
        agent = engine.engine.executor.model_agent
        self.caches, self.scheduler = agent.cache_engine.gpu_cache, engine.engine.scheduler
        config = engine.engine.model_config
        self.format = None if policy == 'none' else get_format(policy)
        self.dims = config.k_head_dim or config.head_dim, config.v_head_dim or config.head_dim

    def read(self, blocks: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer keys and values of these blocks, bf16 [tokens, kv_heads, dim]."""
        manager = self.scheduler.block_manager
        physical = torch.as_tensor(manager.allocator.get_physical_blocks(torch.tensor(blocks).numpy()),
                                   dtype=torch.int32, device=self.caches[0][0].device)
        found = []
        for layer in self.caches:
            if self.format is None:
                found.append(tuple(x[physical].flatten(0, 1).clone() for x in layer[:2]))
                continue
            view = page_views(self.format, *layer[:2], *self.dims, *layer[2:4])
            lens = torch.tensor([len(blocks) * BLOCK], dtype=torch.int32, device=physical.device)
            found.append(flatten(view, physical[None], lens, torch.bfloat16))
        return found


async def load(engine: Engine, prompts: Sequence[Prompt], requests: Iterator[Request], seconds: float,
               concurrency: int) -> dict[str, int]:
    """Requests for so long; some are given up, as in soak.py."""
    counts, end = {'requests': 0, 'aborted': 0, 'tokens': 0}, time.monotonic() + seconds

    async def one(request: Request) -> None:
        prompt, session = prompts[request.prompt], engine.asynchronous.session_mgr.get()
        seen, aborting = 0, []

        def watch(count: int) -> None:
            nonlocal seen
            seen = count
            if request.abort_tokens is not None and count >= request.abort_tokens and not aborting:
                aborting.append(asyncio.create_task(session.async_abort()))

        task = asyncio.create_task(engine.stream(prompt.ids, prompt.new_tokens, session, watch))
        if request.abort_seconds is not None:
            await asyncio.wait([task], timeout=request.abort_seconds)
            if not task.done():
                aborting.append(asyncio.create_task(session.async_abort()))
        await asyncio.wait([task], timeout=120)
        if not task.done():
            raise RuntimeError('a request was not answered within two minutes')
        task.result()
        await asyncio.gather(*aborting)
        counts['requests'] += 1
        counts['aborted'] += bool(aborting)
        counts['tokens'] += seen

    async def worker() -> None:
        for request in requests:
            await one(request)
            if time.monotonic() > end:
                return

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return counts


def of_prompt(prompts: Sequence[Prompt], path: tuple[int, ...]) -> tuple[int, int]:
    """The prompt that agrees with a text longest, and how many tokens."""
    def agree(ids: tuple[int, ...]) -> int:
        return next((i for i, (a, b) in enumerate(zip(ids, path)) if a != b), min(len(ids), len(path)))

    found = [agree(prompt.ids) for prompt in prompts]
    best = max(range(len(found)), key=found.__getitem__)
    return best, found[best]


def audit(engine: Engine, pages: Pages, prompts: Sequence[Prompt], limit: float) -> dict[str, Any]:
    """Keep, empty, read again, compare; one row."""
    _rest(engine)
    trie = pages.scheduler.block_trie
    before = engine.call(lambda: list(cached(trie)))
    blocks = [block for block, _ in before]
    kept = pages.read([block.block for block in blocks])
    engine.free_blocks()
    left = engine.call(lambda: sum(1 for _ in cached(trie)))
    for block, last in before:  # all blocks of a text are computed, or come from one that was read before
        if last:
            engine.ask([(*block.path, block.path[0])], 1)
    _rest(engine)
    now = {block.key: block.block for block, _ in engine.call(lambda: list(cached(trie)))}
    both = [i for i, block in enumerate(blocks) if block.key in now]
    again = pages.read([now[blocks[i].key] for i in both])
    rows = (torch.tensor(both, device='cuda')[:, None] * BLOCK + torch.arange(BLOCK, device='cuda')).flatten()
    errors = torch.stack([torch.stack([_error(old[rows], new) for old, new in zip(*layer)])
                          for layer in zip(kept, again)])  # [layers, 2, tokens]
    largest = errors.flatten(0, 1).max(0).values
    worst = []
    for index in largest.topk(WORST).indices.tolist():
        block, offset = blocks[both[index // BLOCK]], index % BLOCK
        prompt, agreed = of_prompt(prompts, block.path)
        worst.append({'position': block.start + offset, 'block_start': block.start, 'prompt': prompt,
                      'prompt_tokens': len(prompts[prompt].ids), 'agrees': agreed,
                      'token': block.path[block.start + offset], 'error': float(largest[index]),
                      'keys': errors[:, 0, index].tolist(), 'values': errors[:, 1, index].tolist()})
    return {'blocks': len(blocks), 'left': left, 'compared': len(both),
            'first_layer': float(errors[0].max()), 'median': float(largest.median()),
            'p999': float(largest.quantile(0.999)), 'largest': float(largest.max()),
            'tokens_beyond': int((largest > limit).sum()), 'worst': worst}


def _rest(engine: Engine) -> None:
    """Wait until nobody holds a block but the prefix cache."""
    if not engine.idle(20):
        raise RuntimeError('sessions do not end')


def failures(row: dict[str, Any], limit: float) -> list[str]:
    """Sentences of what a row fails."""
    checks = {'a slot of the first layer holds another token': row['first_layer'] == 0,
              f'{row["left"]} blocks stay in use': row['left'] == 0,
              f'one token in a thousand is off by {row["p999"]:.2f}, the limit is {limit}': row['p999'] <= limit}
    return [f'round {row["round"]}: {sentence}' for sentence, good in checks.items() if not good]


def _error(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Relative error of every token, over heads and elements: [tokens]."""
    old, new = old.float().flatten(1), new.float().flatten(1)
    return torch.nan_to_num((old - new).norm(dim=1) / new.norm(dim=1).clamp(min=1e-20), nan=float('inf'))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path)
    parser.add_argument('--format', default='fp8_per_token_head', help='with a scale per token and head; or none')
    parser.add_argument('--rounds', type=int, default=4)
    parser.add_argument('--seconds', type=float, default=30.0, help='of load per round')
    parser.add_argument('--limit', type=float, default=0.5)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.format != 'none' and not get_format(args.format).per_token_head:
        parser.error(f'--format: {args.format} has scales in the model, which are not read here')
    folder = args.model or chosen_model()
    settings: Settings = parse(['--model', str(folder)])[2]
    prompts, policy = all_prompts(settings), args.format
    engine = Engine({'model': str(folder), 'quant_policy': 0 if policy == 'none' else policy, 'engine': {
        'enable_prefix_caching': True, 'num_gpu_blocks': settings.pool_tokens // BLOCK, 'block_size': BLOCK,
        'session_len': settings.pool_tokens + BLOCK, 'max_batch_size': settings.concurrency}})
    pages, rows = Pages(engine, policy), []
    requests = make_requests(prompts, args.seed + 1)
    for number in itertools.count(1):
        counts = engine.run(load(engine, prompts, requests, args.seconds, settings.concurrency),
                            timeout=args.seconds + 150)
        rows.append({'format': policy, 'round': number, **counts, **audit(engine, pages, prompts, args.limit)})
        print({name: value for name, value in rows[-1].items() if name != 'worst'}, flush=True)
        failed = [sentence for row in rows for sentence in failures(row, args.limit)]
        path = write_results(f'page_audit_{policy}', rows, args.out, prefill=os.environ.get('LMDEPLOY_KVQ_PREFILL'),
                             limit=args.limit, failed=failed)
        if number == args.rounds:
            break
    print_table(rows, ['format', 'round', 'requests', 'blocks', 'compared', 'first_layer', 'median', 'p999', 'largest',
                       'tokens_beyond'])
    print(path, *failed, sep='\n')
    return int(bool(failed))


if __name__ == '__main__':
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the engine's threads
