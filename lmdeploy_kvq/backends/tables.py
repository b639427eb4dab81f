"""Block tables of CUDA graphs: as wide as kernel blocks need, and no larger than a bound.

LMDeploy gives every captured batch size a table of its own, int32 [batch, num_gpu_blocks], which it does not count
when it sizes the cache, and rewrites all of it at every step. A narrow format has up to seven times bf16's blocks: with
1,024 sequences at most and half a million blocks, the tables of all graphs would take 6 GB. A row that wide is of no
use, as it would list the whole pool for one sequence. The columns are also counted in blocks of ``block_size``, while
tables list blocks of ``kernel_block_size``: where these differ, a long sequence's row would be cut off without a word.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmdeploy.utils import get_logger

from ..capacity import TABLE_BYTES
from ..formats import find_format

logger = get_logger('lmdeploy')

_SAID = 'lmdeploy_kvq_said_eager'
"""Attribute of a graph runner: the line about steps without a graph is out."""


def columns(cache_config: Any, batch_sizes: Sequence[int], bounded: bool = True) -> int:
    """Columns of every table.

    Args:
        cache_config: LMDeploy's, with its number of blocks.
        batch_sizes: those that graphs are captured for.
        bounded: all tables together have at most ``TABLE_BYTES``.
    """
    whole = cache_config.num_gpu_blocks * (cache_config.block_size // cache_config.kernel_block_size)
    return min(whole, max(TABLE_BYTES // (4 * sum(batch_sizes)), 1)) if bounded else whole


def make_runner(original: Callable[..., None], runner: Any, model: Any, model_config: Any, cache_config: Any,
                backend_config: Any, device: Any) -> None:
    """``CUDAGraphRunner.__init__``: how wide the tables of its graphs will be.

    Under data parallelism nothing is bounded: ranks whose tables differ would have to agree on running without a graph.
    """
    original(runner, model, model_config, cache_config, backend_config, device)
    if find_format(cache_config.quant_policy) is not None:
        dist_config = model_config.dist_config
        runner.num_blocks = columns(cache_config, runner.get_capture_batch_sizes(),
                                    bounded=dist_config is None or dist_config.dp == 1)


def fits(runner: Any, model_inputs: dict[str, Any]) -> bool:
    """True if a step's block table fits the graphs; else it runs without one, which is slower and as right.

    All ranks of tensor parallelism have the same table, so they decide alike.
    """
    meta = model_inputs['attn_metadata']
    if find_format(meta.quant_policy) is None or meta.block_offsets.size(1) <= runner.num_blocks:
        return True
    if not getattr(runner, _SAID, False):
        setattr(runner, _SAID, True)
        tokens = runner.num_blocks * runner.cache_config.kernel_block_size
        logger.warning(f'lmdeploy_kvq: a sequence of more than {tokens} tokens decodes without CUDA graphs, whose '
                       f'block tables are bounded to {TABLE_BYTES >> 20} MiB in all; a smaller --max-batch-size leaves '
                       'more room for each sequence')
    return False
