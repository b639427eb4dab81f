"""A layer of LMDeploy on our pages: its metadata, the arguments of its attention, and random problems for both."""
from __future__ import annotations

import torch
from helpers import problem
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.backends.cuda.attention.default import TritonAttentionImpl, TritonAttentionMetadata

from lmdeploy_kvq import reference

HEADS, KV_HEADS, DIM, V_DIM = 6, 2, 64, 32


def metadata(p, q_lens: list[int], decoding: bool) -> TritonAttentionMetadata:
    """What LMDeploy's step context makes of a batch."""
    device, q = p.kv_lens.device, torch.tensor(q_lens, device=p.kv_lens.device)
    kv = p.kv_lens.long()

    def cumulative(lens):
        return torch.cat([torch.zeros(1, dtype=torch.int32, device=device), lens.cumsum(0).int()])

    return TritonAttentionMetadata(
        is_decoding=decoding, block_offsets=p.block_table, q_start_loc=q.cumsum(0) - q, q_seqlens=q,
        kv_start_loc=kv.cumsum(0) - kv, kv_seqlens=kv, quant_policy=QuantPolicy(p.cache.format.policy),
        kv_flatten_size=int(kv.sum()), cu_seqlens_q=cumulative(q), cu_seqlens_k=cumulative(kv),
        max_kv_seqlen=int(kv.max()), max_q_seqlen=max(q_lens))


def new_rows(p, q_lens: list[int]) -> torch.Tensor:
    """Index of every sequence's last ``q_lens`` tokens among the problem's dense rows."""
    ends = p.kv_lens.cumsum(0).tolist()
    return torch.cat([torch.arange(end - q, end) for end, q in zip(ends, q_lens, strict=True)]).to(p.kv_lens.device)


def engine_problem(fmt, lens: list[int], q_lens: list[int], device: str):
    """Sequences whose history is written and whose new tokens are not, and the new tokens' query, key and value."""
    p = problem(fmt, lens, device=device, kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM, pooled=True, fill=False)
    new = torch.zeros(p.slots.numel(), dtype=torch.bool, device=device)
    new[new_rows(p, q_lens)] = True
    reference.reshape_and_cache(p.key[~new], p.value[~new], p.cache, p.slots[~new])
    query = torch.randn(sum(q_lens), HEADS, DIM, generator=torch.Generator().manual_seed(3)).to(device)
    return p, query, p.key[new], p.value[new]


def scales(p) -> dict[str, torch.Tensor]:
    """The scale arguments of a layer: the page's tensors, or the layer's buffers."""
    cache = p.cache
    return {'k_scales_zeros': cache.k_static_scale if cache.k_scales is None else cache.k_scales,
            'v_scales_zeros': cache.v_static_scale if cache.v_scales is None else cache.v_scales}


def layer(**features) -> TritonAttentionImpl:
    return TritonAttentionImpl(HEADS, DIM, num_kv_heads=KV_HEADS, v_head_size=V_DIM, **features)
