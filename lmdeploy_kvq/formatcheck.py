"""What of ``lmdeploy-kvq doctor`` is about formats: which of them this machine serves, why not, and their kernels."""
from __future__ import annotations

from typing import Any

from . import _autoload
from .capacity import CacheShape, gain
from .console import UserError, reason, table, wrapped
from .environment import MIN_CAPABILITY
from .formats import E4M3, E5M2, FORMATS, KVFormat

HEAD_DIM = 128
"""Head size at which the table of formats is printed, the most common one."""

MAX_KERNEL_ERROR = 0.01
"""Relative error of attention in fp16 against the reference in fp32; below 1e-3 where all is well."""


def format_rows(gpus: list[dict[str, Any]], active: bool) -> list[dict[str, Any]]:
    """The table of formats: bits per element and bytes per token (1.0: as many as bf16), at head size 128.

    Args:
        gpus: from :func:`~lmdeploy_kvq.environment.find_gpus`. active: LMDeploy uses this package in this process.

    Returns:
        Rows; ``supported``: this machine can serve the format; ``reason``: why not, or how, or nothing to say.
    """
    shape, rows = CacheShape(num_layers=1, kv_heads=8, head_dim=HEAD_DIM), []
    for fmt in FORMATS:
        supported, why = _support(fmt, gpus, active)
        rows.append({'name': fmt.name, 'policy': fmt.policy, 'aliases': list(fmt.aliases), 'summary': fmt.label,
                     'experimental': fmt.experimental, 'bits_per_element': fmt.bits_per_element(HEAD_DIM),
                     'bytes_against_bf16': 1 / gain(fmt, shape), 'supported': supported, 'reason': why})
    return rows


def _support(fmt: KVFormat, gpus: list[dict[str, Any]], active: bool) -> tuple[bool, str]:
    if not active:
        return False, f'LMDeploy does not use this package: {"opted out" if not _autoload.enabled() else "see below"}'
    if not gpus:
        return False, 'there is no CUDA GPU here that PyTorch can use'
    usable = [gpu for gpu in gpus if _numbers(gpu) >= MIN_CAPABILITY]
    if not usable:
        return False, f'compute capability {".".join(map(str, MIN_CAPABILITY))} or newer is needed; here ' \
                      f'{", ".join(sorted({gpu["compute_capability"] for gpu in gpus}))}'
    slow = sorted({gpu['name'] for gpu in usable if gpu['fp8_conversion'] != 'hardware'})
    if slow and {fmt.key.codec.name, fmt.value.codec.name} & {E4M3.name, E5M2.name}:
        return True, f'fp8 is decoded by integer arithmetic on {", ".join(slow)}, which has no instruction for it'
    return True, ''


def _numbers(gpu: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in gpu['compute_capability'].split('.'))


def try_kernels(fmt: KVFormat) -> float:
    """Write 100 tokens and attend to them with a format's kernels, on the GPU or in Triton's interpreter.

    Returns:
        Relative error (Frobenius) against the reference on the same pages.

    Raises:
        Exception: whatever compiling or launching raises.
    """
    import torch

    from . import paged, reference
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(0)
    cache = paged.PagedCache.allocate(fmt, 4, 64, 2, HEAD_DIM, device=device)
    key, value = torch.randn(2, 100, 2, HEAD_DIM, generator=generator).to(device, torch.float16)
    query = torch.randn(1, 8, HEAD_DIM, generator=generator).to(device, torch.float16)
    paged.reshape_and_cache(key, value, cache, torch.arange(64, 164, device=device))
    pages = torch.tensor([[1, 2]], dtype=torch.int32, device=device), torch.tensor([100], device=device)
    out = paged.paged_attention(query, cache, *pages).float()
    expected = reference.paged_attention(query.float(), cache, *pages)
    return float((out - expected).norm() / expected.norm())


def run_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Try every format, add ``kernel_error`` (None: it does not run) to its row, and return which failed.

    Raises:
        UserError: neither a GPU nor Triton's interpreter.
    """
    import torch

    from .kernels.launch import interpreted
    if not torch.cuda.is_available() and not interpreted():
        raise UserError('--kernels needs a CUDA GPU; on a CPU, set TRITON_INTERPRET=1')
    problems = []
    for fmt, row in zip(FORMATS, rows):
        try:
            row['kernel_error'] = try_kernels(fmt)
            if not row['kernel_error'] < MAX_KERNEL_ERROR:
                problems.append(f'The kernels of {fmt.name} are wrong here: relative error {row["kernel_error"]:.2g} '
                                f'against the reference, {MAX_KERNEL_ERROR:g} is the limit.')
        except Exception as error:  # a compiler or driver that fails is the finding
            row['kernel_error'] = None
            problems.append(f'The kernels of {fmt.name} do not run here: {reason(error)}.')
    return problems


def format_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of :func:`format_rows` as lines of text, and under it what there is to say."""
    tried = 'kernel_error' in rows[0]
    cells = [(row['name'], row['policy'], f'{row["bits_per_element"]:.2f}', f'{row["bytes_against_bf16"]:.1%}',
              'yes' if row['supported'] else 'no',
              *([] if not tried else ['failed' if row['kernel_error'] is None else f'{row["kernel_error"]:.0e}']),
              ', '.join(row['aliases'])) for row in rows]
    lines = [table(cells, ['--quant-policy', 'number', 'bits', 'bytes', 'here', *(['error'] if tried else []),
                           'also called'], right='number,bits,bytes,error')]
    for supported in (False, True):
        for why in dict.fromkeys(row['reason'] for row in rows if row['supported'] == supported and row['reason']):
            lines.append(wrapped(why, '      ', '  yes: ' if supported else '  no: '))
    lines += [wrapped(f'{row["name"]} is EXPERIMENTAL: {row["experimental"]}.', '  ') for row in rows
              if row['experimental']]
    return lines


