#!/usr/bin/env python3
"""See the quantized KV cache work. On a CUDA GPU: LMDeploy's own server with a format of this package, a question over
HTTP, its speed and how many tokens fit. Without a GPU: the same prompt through transformers, with the cache quantized
by the same code, and what every format costs and saves.
"""
from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('TQDM_DISABLE', '1')  # read at import: loading prints one line here, not four bars
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import smollm2
from server import Server

from lmdeploy_kvq import FORMATS, get_format
from lmdeploy_kvq.capacity import CacheShape, bytes_per_token, gain
from lmdeploy_kvq.console import table, wrapped
from lmdeploy_kvq.formats import KVFormat

QUESTION = 'What is photosynthesis?'  # no near tie at its first words: every format answers it
REQUESTS, TOKENS = 32, 128
_START = time.monotonic()


def step(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f'[{time.monotonic() - _START:4.0f} s] {text}', flush=True)


def typed(tool: str) -> str:
    """How to start a tool of this Python's environment from here: its name where the PATH finds it."""
    beside, found = Path(sys.executable).with_name(tool), shutil.which(tool)
    if not beside.exists() or (found and os.path.samefile(beside.parent, os.path.dirname(found))):
        return tool
    return min(os.path.relpath(beside), str(beside), key=len)


def cache_shape(model: str, block_size: int = 64) -> CacheShape:
    """The KV cache of a model on one GPU, from its config.json."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    return CacheShape(config.num_hidden_layers, getattr(config, 'num_key_value_heads', None) or heads,
                      getattr(config, 'head_dim', None) or config.hidden_size // heads, block_size=block_size)


def demo_gpu(model: str, policy: str) -> None:
    """Serve, ask, load, and say how many tokens fit."""
    fmt = get_format(policy)
    with Server(model, ['--quant-policy', fmt.name], progress=step) as server:
        step(f'server answers: {shlex.join(server.command)}')
        print(f'\nQuestion: {QUESTION}\nAnswer:   {server.ask(QUESTION)}\n')
        step('warming up')
        server.load(REQUESTS, 16)
        step(f'{REQUESTS} requests of {TOKENS} tokens at once')
        tokens, seconds = server.load(REQUESTS, TOKENS)
        report_speed(server.cache_blocks(), model, fmt, tokens, seconds)
        step('stopping the server')  # last, for giving memory back takes a while


def report_speed(blocks: dict[str, int], model: str, fmt: KVFormat, tokens: int, seconds: float) -> None:
    """Print speed and the tokens that fit, with ``blocks`` as the engine logged them."""
    shape = cache_shape(model, blocks['kernel_block_size'])
    fit, ratio = blocks['num_gpu_blocks'] * blocks['block_size'], gain(fmt, shape)
    print(f'\nSpeed: {tokens / seconds:,.0f} tokens/s ({tokens:,} tokens in {seconds:.2f} s, HTTP included)\n\n'
          'Tokens that fit into the KV cache of this server\n' + table([
              (fmt.name, f'{fit:,}', f'{bytes_per_token(fmt, shape):,.0f}',
               f'as the engine says: {blocks["num_gpu_blocks"]:,} blocks of {blocks["block_size"]}'),
              ('bf16 (no --quant-policy)', f'{int(fit / ratio):,}', f'{bytes_per_token(None, shape):,.0f}',
               'computed, for the same memory')], ['cache', 'tokens', 'bytes/token', ''], right='tokens,bytes/token'))
    print(f'\n{ratio:.2f} times as many tokens fit. Next, your own model, or every format and patch in a table:\n\n'
          f'  lmdeploy serve api_server MODEL --quant-policy {fmt.name}\n  {typed("lmdeploy-kvq")} doctor\n',
          flush=True)


def demo_cpu(model: str, tokens: int) -> None:
    """Answer and score a text with every format."""
    import torch
    import transformers

    from lmdeploy_kvq.hf_cache import QuantizedCache
    transformers.logging.set_verbosity_error()
    print(wrapped('No CUDA GPU here, so the model runs in transformers, in fp32, and only its KV cache is quantized, '
                  "by this package's reference code: the one that the GPU kernels are tested against. On a machine "
                  "with a GPU the same command starts LMDeploy's server."), end='\n\n')
    step(f'loading {model}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = Path(__file__).resolve().parent.parent.joinpath('lmdeploy_kvq/data/prose.txt').read_text(encoding='utf-8')
    passage = tokenizer(text, return_tensors='pt').input_ids[:, :tokens]
    prompt = tokenizer.apply_chat_template([{'role': 'user', 'content': QUESTION}], add_generation_prompt=True,
                                           return_tensors='pt', return_dict=True)
    shape = cache_shape(model)
    caches: list[tuple[str, Any, Callable[[], Any]]] = [('none', None, transformers.DynamicCache)]
    caches += [(fmt.name, fmt, lambda fmt=fmt: QuantizedCache(fmt)) for fmt in FORMATS]  # static scales: 1.0
    answers: dict[str, list[str]] = {}
    rows, full = [], None
    for name, fmt, cache in caches:
        step(f'cache {name}: answering, then reading {passage.size(1):,} tokens')
        with torch.inference_mode():
            out = network.generate(**prompt, past_key_values=cache(), max_new_tokens=40, do_sample=False)
            logp = network(passage, past_key_values=cache()).logits[0, :-1].log_softmax(-1)
        answer = tokenizer.decode(out[0, prompt['input_ids'].size(1):], skip_special_tokens=True)
        answers.setdefault(' '.join(answer.split()), []).append(name)
        loss = -logp.gather(1, passage[0, 1:, None]).mean().item()
        full = logp if full is None else full
        pieces = zip(full.split(128), logp.split(128), strict=True)  # rows are as long as the vocabulary
        divergence = sum((a.exp() * (a - b)).sum().item() for a, b in pieces)
        size = bytes_per_token(fmt, shape)
        rows.append((name, f'{size:,.0f}', f'{size / bytes_per_token(None, shape):.0%}', f'{math.exp(loss):.2f}',
                     f'{divergence / len(logp):.4f}'))
    print(f'\nQuestion: {QUESTION}')
    for answer, names in answers.items():
        print(wrapped(answer, '          ', 'Answer:   '))
        print(wrapped(f'(cache: {", ".join(names)})', '          '))
    if len(answers) > 1:
        print(wrapped('The answers differ: a small model is often near a tie between two words, and the first other '
                      'word changes the rest. What counts is how often that happens, which the table measures.'))
    print(f'\nThe same text ({passage.size(1):,} tokens of English prose) read through every cache\n')
    print(table(rows, ['--quant-policy', 'bytes/token', 'of bf16', 'perplexity', 'KL'],
                right='bytes/token,of bf16,perplexity,KL'))
    print('\n' + '\n'.join(wrapped(line, '    ', '  ') for line in (
        'bytes/token  what one token takes in LMDeploy\'s pages, scales included; none: the 16-bit cache',
        'perplexity   how surprised the model is by the text: lower is better, near the first row is good',
        'KL           how far its predictions move from the full-precision cache\'s: 0 is identical')))
    print('\nNext: check your installation, measure a longer text or your own model, and serve on a GPU:\n\n'
          f'  {typed("lmdeploy-kvq")} doctor\n  {typed("python")} scripts/demo.py MODEL --tokens 4096\n'
          '  lmdeploy serve api_server MODEL --quant-policy fp8_per_token_head\n')


def main() -> int:
    """Run the demo this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', nargs='?', help='folder or hub name of a model (default: SmolLM2-135M-Instruct)')
    parser.add_argument('--quant-policy', default='fp8_per_token_head', help='on a GPU: the format to serve with')
    parser.add_argument('--tokens', type=int, default=1024, help='on a CPU: how much text to read (default 1024)')
    parser.add_argument('--cpu', action='store_true', help='the CPU demo, also where there is a GPU')
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error(f'--tokens {args.tokens}: at least 2 are needed, one is predicted from the other')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    import torch
    try:
        get_format(args.quant_policy)
        model = os.path.expanduser(args.model) if args.model else str(smollm2.find_or_convert())
        if model.startswith(('/', '.')) and not os.path.isdir(model):
            parser.error(f'there is no folder {model}')
        if torch.cuda.is_available() and not args.cpu:
            demo_gpu(model, args.quant_policy)
        else:
            demo_cpu(model, args.tokens)
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f'demo: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
