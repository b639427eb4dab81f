"""LMDeploy's own policies by name. Imports LMDeploy late: its import, where the hook is on, imports ``config``."""
from __future__ import annotations

from ..formats import FORMATS


def lmdeploy_policies() -> dict[str, int]:
    """LMDeploy's own quantized policies, those included that this package serves with its kernels: name to number."""
    from lmdeploy.messages import QuantPolicy
    added = {fmt.policy for fmt in FORMATS if not fmt.upstream}
    return {p.name.lower(): int(p) for p in QuantPolicy if int(p) and int(p) not in added}
