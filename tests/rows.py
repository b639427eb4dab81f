"""What docs/compatibility.md has a row for. A test says which rows it is evidence for: ``@pytest.mark.covers(ID)``."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One way of using the cache.

    Attributes:
        id: what ``covers`` names it by: section, dot, short name.
        what: the row's text.
        needs_gpu: a passed test on a GPU is asked for; a test on the CPU alone does not show that it works.
        refused: empty, or why it is refused when the configuration is made; evidence is then a test of the refusal.
    """
    id: str
    what: str
    needs_gpu: bool = True
    refused: str = ''


SECTIONS = {'arch': 'Model architectures', 'feature': 'Features of the engine',
            'parallel': 'More than one GPU or server', 'memory': 'Memory', 'load': 'Under load',
            'fault': 'Faults and bad input', 'version': 'LMDeploy versions'}

ROWS = (
    Row('arch.llama', 'Llama'),
    Row('arch.mistral', 'Mistral: sliding window'),
    Row('arch.mixtral', 'Mixtral: mixture of experts'),
    Row('arch.qwen2', 'Qwen2: seven query heads per KV head'),
    Row('arch.qwen3', 'Qwen3: normalized queries and keys'),
    Row('arch.qwen3_moe', 'Qwen3-MoE: normalized queries and keys, mixture of experts'),
    Row('arch.gemma2', 'Gemma 2: softcap, alternating window, head size 256'),
    Row('arch.gemma3', 'Gemma 3: alternating window, normalized queries and keys, head size 256'),
    Row('arch.gpt_oss', 'gpt-oss: sinks and alternating window'),
    Row('arch.phi3', 'Phi-3: head size 96'),
    Row('arch.internlm2', 'InternLM2'),
    Row('arch.qwen3_next', 'Qwen3-Next: hybrid linear attention, head size 256'),
    Row('arch.qwen3_5', 'Qwen3.5: hybrid linear attention, head size 256'),
    Row('arch.qwen2_vl', 'Qwen2-VL: vision and language'),
    Row('arch.mla', 'Multi-head latent attention (DeepSeek V2, V3, V4; MiniCPM3)', needs_gpu=False,
        refused='its cache is one latent vector per token, not K and V per head'),
    Row('feature.graphs', 'CUDA graphs and eager mode give the same tokens'),
    Row('feature.batch', 'A text depends on what else is decoded, and when, no more than with bf16'),
    Row('feature.prefix', 'Prefix caching: hits, shared prefixes'),
    Row('feature.eviction', 'Prefix caching with a full pool: eviction'),
    Row('feature.chunks', 'Chunked prefill'),
    Row('feature.prefill_graphs', 'Piecewise CUDA graphs of prefill'),
    Row('feature.lora', 'LoRA adapters'),
    Row('feature.speculative', 'Speculative decoding: a draft model, several tokens per step'),
    Row('feature.acceptance', 'Drafts of a model with random weights are accepted as often as with bf16'),
    Row('feature.dllm', 'Diffusion language models (dLLM)'),
    Row('feature.guided', 'Guided decoding (JSON schema, regex)'),
    Row('feature.sleep', 'Sleep and wake-up, level 1 and 2'),
    Row('feature.update', 'Live weight update'),
    Row('feature.block_sizes', 'Block sizes 16 to 256'),
    Row('feature.kernel_block', 'kernel_block_size other than block_size'),
    Row('feature.mp', "The engine in a process of its own ('mp' engine)"),
    Row('feature.abort', 'Sessions aborted and requests cancelled in mid-stream'),
    Row('feature.long', 'Long context: 128k tokens'),
    Row('feature.calibrate', 'Calibration while serving'),
    Row('feature.metrics', 'Saturation at the metrics endpoint'),
    Row('parallel.tp2_ray', 'tp=2 through Ray: the tokens of tp=1'),
    Row('parallel.tp2_mp', "tp=2 through 'mp': the tokens of tp=1"),
    Row('parallel.tp4', 'tp=4'),
    Row('parallel.replicated', 'Fewer KV heads than tp: heads replicated'),
    Row('parallel.scales', 'Scales and transforms per head under tp'),
    Row('parallel.metrics', 'Saturation at the metrics endpoint under tp'),
    Row('parallel.dp', 'Data parallel engines (dp)'),
    Row('parallel.transfer', 'Prefill and decode separated, KV connectors: formats and scales compared at both ends',
        needs_gpu=False),
    Row('memory.blocks', 'num_gpu_blocks within 1 % of what the bytes allow'),
    Row('memory.plan', '`lmdeploy-kvq plan` within 3 % of num_gpu_blocks'),
    Row('memory.growth', 'No growth of device memory over 10,000 requests'),
    Row('memory.graph_tables', 'Block tables of CUDA graphs bounded, or a warning with the flag that bounds them'),
    Row('load.soak', 'Mixed random load on the real server, every answer checked (scripts/soak.py)'),
    Row('load.pages', 'Cached pages hold what their tokens say, after a load (scripts/page_audit.py)'),
    Row('fault.worker', 'A worker killed while it decodes; the server restarted'),
    Row('fault.scale_file', 'A truncated or corrupt scale file', needs_gpu=False),
    Row('fault.model_folder', 'A model folder with files missing', needs_gpu=False),
    Row('fault.memory', 'Out of memory while the cache is sized; two servers on one GPU'),
    Row('fault.hostile', 'Hostile requests: absurd lengths, bad UTF-8'),
    Row('fault.fuzz', 'Any combination of policy, block sizes, head sizes and tp works or is refused before loading',
        needs_gpu=False),
    Row('fault.sanitizer', 'compute-sanitizer memcheck and racecheck on every kernel'),
    Row('version.0_18', 'LMDeploy 0.18'),
    Row('version.0_17', 'LMDeploy 0.17, its own wheel; not prefill and decode separated'),
    Row('version.0_16', 'LMDeploy 0.16, its own wheel; not prefill and decode separated'),
)
BY_ID = {row.id: row for row in ROWS}
