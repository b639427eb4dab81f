"""What tables and figures call a contender's policy."""
from __future__ import annotations

import functools

from lmdeploy_kvq.formats import find_format

BF16 = 'LMDeploy bf16'
CONTENDERS = {'kvq': '', 'lmdeploy': 'LMDeploy ', 'flashinfer': 'FlashInfer '}


@functools.cache
def label(contender: str, policy: int) -> str:
    """A format of ours by its name; another contender's policy by its own and LMDeploy's (or the format's) name."""
    fmt = find_format(policy)
    if fmt is not None:
        name = fmt.name
    elif policy == 0:
        name = 'bf16'
    else:
        from lmdeploy.messages import QuantPolicy
        name = QuantPolicy(policy).name.lower()
    return CONTENDERS.get(contender, f'{contender} ') + name
