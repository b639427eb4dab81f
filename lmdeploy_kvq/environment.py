"""What this package runs on: versions of packages, GPUs, and what is wrong with them. For reports and result files."""
from __future__ import annotations

import platform
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .console import first_line

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability the kernels are built and tested for."""

_PACKAGES = ('torch', 'triton', 'lmdeploy', 'transformers')

_OPTIONAL = ('ray', 'safetensors', 'huggingface-hub', 'fa3-fwd', 'flash-attn', 'rich', 'matplotlib', 'lm-eval')
"""Packages that are listed where they are installed: they decide how a model is served, or which commands run."""


def machine() -> dict[str, str]:
    """What a bug report has to say of the machine: operating system, Python, NVIDIA's driver where there is one."""
    found = {'system': platform.platform(), 'python': sys.executable}
    driver = Path('/proc/driver/nvidia/version')
    if driver.is_file():
        number = re.search(r'\d+\.\d+(\.\d+)?', driver.read_text(errors='replace'))
        found['driver'] = number[0] if number else first_line(driver.read_text(errors='replace'))
    return found


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None: not installed. ``cuda``: what torch was built for."""
    torch = sys.modules.get('torch')
    found: dict[str, str | None] = {'lmdeploy_kvq': __version__, 'python': platform.python_version()}
    for name in _PACKAGES:
        found[name] = version(name)
        if name == 'torch':
            found['cuda'] = getattr(getattr(torch, 'version', None), 'cuda', None)
    return {**found, **{name: version(name) for name in _OPTIONAL if version(name)}}


def find_gpus() -> tuple[list[dict[str, Any]], list[str]]:
    """CUDA GPUs of this machine, and what keeps them from being used."""
    torch = sys.modules.get('torch')
    if torch is None:
        return [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        available = torch.cuda.is_available()
    if not available:
        if not Path('/dev/nvidia0').exists():
            return [], []
        why = 'this PyTorch is built without CUDA' if torch.version.cuda is None else \
            first_line(str(caught[-1].message)) if caught else 'torch.cuda.is_available() is False'
        return [], [f'An NVIDIA GPU is present, but PyTorch cannot use it ({why}): install a PyTorch built for the '
                    'driver\'s CUDA version, see https://pytorch.org/get-started/locally.']
    gpus, problems = [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        dotted = f'{properties.major}.{properties.minor}'
        gpus.append({'name': properties.name, 'compute_capability': dotted,
                     'memory_gib': round(properties.total_memory / 2**30, 1),
                     'fp8_conversion': 'hardware' if _converts_fp8(capability) else 'integer decoding'})
        if capability < MIN_CAPABILITY:
            problems.append(f'GPU {index} ({properties.name}) has compute capability {dotted}; the kernels are built '
                            'and tested for 8.0 (Ampere) and newer: use another GPU (CUDA_VISIBLE_DEVICES), or no '
                            '--quant-policy of this package on this one.')
    return gpus, problems


def _converts_fp8(capability: tuple[int, int]) -> bool:
    from .kernels.codecs import FP8_CONVERT_CAP
    return capability[0] * 10 + capability[1] >= int(FP8_CONVERT_CAP.value)


def package_problems() -> list[str]:
    """Packages that are missing or too old, from this package's own requirements. LMDeploy's version is the hook's."""
    try:
        requirements = [r for r in metadata.requires('lmdeploy-kvq') or () if ';' not in r]
    except metadata.PackageNotFoundError:
        return ['lmdeploy_kvq can be imported but is not installed, so LMDeploy will not load it: run `pip install .` '
                'in its folder.']
    problems = []
    for requirement in requirements:
        name, limits = re.match(r'([\w.-]+)\s*(.*)', requirement).groups()  # type: ignore[union-attr]
        found, least = version(name), re.search(r'>=\s*([\d.]+)', limits)
        todo = f'run `pip install "{requirement}"`.'
        if found is None:
            problems.append(f'{name} is not installed: {todo}')
        elif name != 'lmdeploy' and least and _numbers(found) < _numbers(least[1]):
            problems.append(f'{name} {found} is installed, {least[1]} or newer is needed: {todo}')
    return problems


def version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(dotted: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', dotted.split('+')[0])[:3])
