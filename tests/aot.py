"""Compile, without a GPU, exactly what the launchers would launch: record a launch, then hand it to the compiler."""
from __future__ import annotations

import collections
import contextlib
import itertools
import unittest.mock as mock
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels import decode, fill, flatten, merge, workspace

MODULES = (decode, fill, flatten, merge)
_POINTER = {torch.uint8: '*u8', torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16',
            torch.int32: '*i32', torch.int64: '*i64'}


class Recorder:
    """Stands in for a jit function; keeps the arguments of each launch."""

    def __init__(self, kernel: triton.JITFunction, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def recorded(cap: int):
    """Within: launchers accept CPU tensors, believe in a GPU of capability ``cap``, and only record."""
    launches: list = []
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, believed in (('check_device', None), ('compute_capability', cap)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda _, believed=believed: believed))
            for name in vars(module):
                if name.startswith('_') and name.endswith('_kernel'):
                    stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), launches)))
        for module in (workspace, fill):
            stack.enter_context(mock.patch.object(module, 'multiprocessors', lambda device: 132))
        yield launches


def specialized(kernel: triton.JITFunction, args: tuple, kwargs: dict) -> tuple[dict, dict, dict, dict]:
    """What a recorded launch is compiled for, as Triton's launcher would: integers that are 1 or divisible by 16 count.

    Returns:
        (signature, constants, attributes, options).
    """
    options = {k: kwargs[k] for k in ('num_warps', 'num_stages', 'launch_pdl', 'maxnreg', 'enable_fp_fusion')
               if k in kwargs}
    given = dict(zip(kernel.arg_names, args), **{k: v for k, v in kwargs.items() if k in kernel.arg_names})
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = given[name]
        special = not kernel.params[position].do_not_specialize
        if name in constexprs or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(position, )] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            attributes[(position, )] = [['tt.divisibility', 16]]
        elif isinstance(value, int):
            signature[name] = 'i32' if abs(value) < 2**31 else 'i64'
            if special and value % 16 == 0:
                attributes[(position, )] = [['tt.divisibility', 16]]
        else:
            signature[name] = 'fp32'
    return signature, constants, attributes, options


def compile_launch(kernel: triton.JITFunction, args: tuple, kwargs: dict, cap: int):
    """Compile one recorded launch for ``cap``."""
    *source, options = specialized(kernel, args, kwargs)
    return triton.compile(ASTSource(kernel, *source), target=GPUTarget('cuda', cap, 32), options=options)


def compilations_of_a_server() -> dict[str, dict[str, int]]:
    """Per format, how often each kernel is compiled for decode steps of 1 to 256 sequences and tables of any width."""
    found = {}
    for fmt in kvq.FORMATS:
        cache, seen = kvq.PagedCache.allocate(fmt, 4, 64, 8, 128, device='cpu'), collections.defaultdict(set)
        for batch, width in itertools.product((1, 2, 4, 8, 16, 24, 32, 64, 128, 256), (1, 37, 512)):
            query = torch.zeros(batch, 32, 128, dtype=torch.bfloat16)
            rows = torch.zeros(batch, 8, 128, dtype=torch.bfloat16)
            lens, table = torch.ones(batch, dtype=torch.int32), torch.zeros(batch, width, dtype=torch.int32)
            with recorded(90) as launches:
                room = decode.Workspace.allocate(query, cache, batch, 1)
                fill.fill(rows, rows, cache, fill.TokenLayout(
                    q_start=lens, q_lens=lens, kv_lens=lens, block_table=table, uniform_query_len=1),
                    room.inputs(query))
                decode.decode(query, cache, table, lens, torch.empty_like(query), query_len=1, sm_scale=0.1,
                              workspace=room, filled=True)
            for kernel, args, kwargs in launches:
                seen[kernel.__name__].add(repr(specialized(kernel, args, kwargs)))
        found[fmt.name] = {name: len(kinds) for name, kinds in seen.items()}
    return found
