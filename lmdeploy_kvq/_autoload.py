"""Entry point in the ``torch.backends`` group: runs at the end of ``import torch`` in every process.

LMDeploy has no plug-in entry point, and its workers (spawned processes, Ray actors) never run the user's script, so
this is the one place that reaches all of them. Standard library only, and nothing may escape: an exception here would
kill ``import torch``.
"""
from __future__ import annotations

import logging
import os
import sys

OPT_OUT = 'LMDEPLOY_KVQ'
SCALES = 'LMDEPLOY_KVQ_SCALES'
CALIBRATE = 'LMDEPLOY_KVQ_CALIBRATE'
ENVIRONMENT = (OPT_OUT, 'LMDEPLOY_KVQ_PREFILL', SCALES, CALIBRATE)
"""Our environment variables, forwarded to Ray workers on other nodes."""

_HOOK = f'{__package__}.hook'


def enabled() -> bool:
    """False if the user opted out with ``LMDEPLOY_KVQ=0``."""
    return os.environ.get(OPT_OUT, '1').strip().lower() not in ('0', 'false', 'off', 'no')


class _Trigger:
    """Meta-path finder that loads the hook when, and only when, a part of LMDeploy is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Never finds anything; at the first ``lmdeploy.*`` import it installs the hook and removes itself."""
        if name.startswith('lmdeploy.'):
            sys.meta_path.remove(self)
            if not _decided():
                _install()


def _decided() -> bool:
    """True if ``install()`` or ``uninstall()`` was called by hand before."""
    hook = sys.modules.get(_HOOK)
    return hook is not None and hook.HOOK.decided


def _install() -> None:
    try:
        from .hook import HOOK
        HOOK.install(strict=False)
    except Exception:
        logging.getLogger('lmdeploy').exception('lmdeploy_kvq could not be loaded; LMDeploy runs without it')


def activate() -> None:
    """Arrange for the hook to be installed as soon as LMDeploy is imported. Never raises."""
    try:
        if not enabled() or _decided() or any(isinstance(f, _Trigger) for f in sys.meta_path):
            return
        if any(name.startswith('lmdeploy.') for name in sys.modules):
            _install()  # LMDeploy is what imported torch
        else:
            sys.meta_path.insert(0, _Trigger())
    except Exception:
        logging.getLogger('lmdeploy').exception('lmdeploy_kvq could not be activated')
