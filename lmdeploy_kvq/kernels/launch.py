"""What launchers need to know of the device, and their shared argument checks."""
from __future__ import annotations

import functools

import torch
import triton


def interpreted() -> bool:
    """True under ``TRITON_INTERPRET=1``: kernels run on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _gpu(index: int) -> tuple[int, int, int]:
    properties = torch.cuda.get_device_properties(index)
    largest = triton.runtime.driver.active.utils.get_device_properties(index)['max_shared_mem']  # of one program
    return properties.major * 10 + properties.minor, properties.multi_processor_count, largest + 1024


def _of(device: torch.device) -> tuple[int, int, int]:
    """Compute capability, multiprocessors, and bytes of shared memory of each; invented ones in the interpreter."""
    if device.type != 'cuda' or interpreted():
        return 0, 4, 228 << 10  # few multiprocessors, so that splits get tested
    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


def compute_capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as an integer (90 for sm_90); 0 (portable code) in the interpreter."""
    return _of(device)[0]


def dependent_launch(cap: int) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch (compute capability 9.0 and later), ``PDL`` for the kernel.

    The kernel may then begin before what the one before it writes has arrived, and must wait for that (``gdc_wait``).
    """
    return {'PDL': True, 'launch_pdl': True} if cap >= 90 else {'PDL': False}


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; in the interpreter a small number."""
    return _of(device)[1]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of each multiprocessor of a CUDA device; an H200's in the interpreter."""
    return _of(device)[2]


def batch_block(batch: int) -> int:
    """A power of two, ``batch`` or more, and one of few, for kernels are compiled for each, in a second or two.

    LMDeploy captures CUDA graphs for a dozen batch sizes when it starts. Up to 32 lengths are summed within a warp, and
    for 256 it takes hardly more instructions than for 64.
    """
    return next((size for size in (1, 32, 256) if batch <= size), triton.next_power_of_2(batch))


def check_device(tensor: torch.Tensor) -> None:
    """Raise ValueError unless kernels can run on this tensor."""
    if tensor.device.type != 'cuda' and not interpreted():
        raise ValueError(f'kernels run on CUDA tensors, got {tensor.device.type}; set TRITON_INTERPRET=1 before '
                         'importing triton to run them on CPU tensors, or use lmdeploy_kvq.reference')
