"""THE patch table: every place where this package attaches to LMDeploy, checked before use and reversible.

The table is LMDeploy 0.18's; ``versions`` has what is otherwise in older ones.

All rows are compared with the installed LMDeploy's source (version range, existence, parameter names) before any is
applied; a mismatch leaves LMDeploy untouched, and only this package's policies are refused. Rows take effect as
LMDeploy's modules are imported.
"""
from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from .formats import FORMATS, format_names
from .patching import Finder, Patch, Undo, data, initialized, mismatch, wrap
from .versions import adapted

SUPPORTED = ((0, 16), (0, 19))
"""LMDeploy versions: from the first, up to but not including the second."""

logger = logging.getLogger('lmdeploy')


def _late(home: str, name: str) -> Callable[..., Any]:
    """A function of ``backends`` that is imported when first called: backends import torch and LMDeploy."""

    @functools.cache  # attention goes through here once per layer and step
    def target() -> Callable[..., Any]:
        return getattr(importlib.import_module(f'.backends.{home}', __package__), name)

    return lambda *args, **kwargs: target()(*args, **kwargs)


_FORWARD = 'self query key value k_cache v_cache attn_metadata k_scales_zeros v_scales_zeros learnable_sink inplace'

PATCHES: tuple[Patch, ...] = (
    data('lmdeploy.messages', 'QuantPolicy', _late('config', 'extend_quant_policy'),
         'the formats become members of QuantPolicy, so every API and CLI that takes one takes ours'),
    wrap('lmdeploy.messages', 'PytorchEngineConfig.__post_init__', 'self', _late('config', 'check_pytorch_config'),
         'names and numbers are accepted or refused, and devices checked, when the configuration is made'),
    wrap('lmdeploy.messages', 'TurbomindEngineConfig.__post_init__', 'self', _late('config', 'check_turbomind_config'),
         'TurboMind cannot read our pages: refuse, naming the engine that can'),
    wrap('lmdeploy.cli.utils', 'ArgumentHelper.quant_policy', 'parser default',
         _late('config', 'quant_policy_argument'),
         '--quant-policy accepts every name and alias, and --help lists them'),
    wrap('lmdeploy.cli.utils', 'ArgumentHelper.backend', 'parser', _late('config', 'backend_argument'),
         'an explicit --backend turbomind can be told from the default'),
    wrap('lmdeploy.cli.serve', 'SubCliServe.api_server', 'args', _late('config', 'run_with_backend'),
         'our policies select the PyTorch engine unless --backend says otherwise'),
    wrap('lmdeploy.cli.cli', 'CLI.chat', 'args', _late('config', 'run_with_backend'),
         'our policies select the PyTorch engine unless --backend says otherwise'),
    wrap('lmdeploy.pytorch.engine.executor', '_finalize_sparse_mla_cache_policy', 'model_configs cache_config',
         _late('cache', 'finalize_cache_policy'),
         'models and head sizes a format cannot store are refused before loading'),
    wrap('lmdeploy.pytorch.engine.cache_engine.schema', 'build_k_cache_desc', 'model_config cache_config world_size',
         _late('cache', 'build_k_cache_desc'), 'K pages are allocated in our layout'),
    wrap('lmdeploy.pytorch.engine.cache_engine.schema', 'build_v_cache_desc', 'model_config cache_config world_size',
         _late('cache', 'build_v_cache_desc'), 'V pages are allocated in our layout'),
    wrap('lmdeploy.pytorch.engine.cache_engine.schema', 'build_quant_cache_descs',
         'k_cache_desc v_cache_desc model_config cache_config', _late('cache', 'build_quant_cache_descs'),
         'scales are allocated with the pages'),
    data('lmdeploy.pytorch.engine.cache_engine.engine', '_KV_CACHE_QUANT_POLICY_DESCS',
         _late('config', 'name_policies'), 'the log names the cache format in use'),
    wrap('lmdeploy.pytorch.backends.cuda.attention.default', 'TritonAttentionImpl.forward', _FORWARD,
         _late('attention', 'forward'), 'attention writes and reads our pages'),
    wrap('lmdeploy.pytorch.backends.cuda.attention.fa3', 'FA3Impl.forward', _FORWARD, _late('attention', 'forward'),
         'attention writes and reads our pages'),
    wrap('lmdeploy.pytorch.engine.model_agent.agent', 'model_forward',
         'model inputs model_config cache_engine state_cache_engine stream cache_inputs',
         _late('steps', 'model_forward'),
         'scales are found on the first tokens served; where a server asks for metrics, the codes at the limit of fp8 '
         'are counted on a few pages'),
    wrap('lmdeploy.pytorch.backends.cuda.graph_runner.runner', 'CUDAGraphRunner._should_use_full_graph',
         'self step_context model_inputs', _late('steps', 'use_full_graph'),
         'CUDA graphs are captured at start and replayed once scales are found, by steps whose block tables they hold'),
    wrap('lmdeploy.pytorch.backends.cuda.graph_runner.runner', 'CUDAGraphRunner.__init__',
         'self model model_config cache_config backend_config device', _late('tables', 'make_runner'),
         'block tables of CUDA graphs are bounded, and wide enough for kernel blocks'),
    wrap('lmdeploy.pytorch.engine.model_agent.agent', 'BaseModelAgent.get_output_async', 'self',
         _late('saturation', 'send'), 'the counts of a worker reach the engine with the output of a step'),
    wrap('lmdeploy.pytorch.engine.engine_loop', 'EngineLoop._make_infer_outputs',
         'self batched_outputs running model_inputs delta', _late('saturation', 'take'),
         'the engine takes them out of it'),
    wrap('lmdeploy.pytorch.engine.engine', 'Engine.get_schedule_metrics', 'self',
         _late('saturation', 'schedule_metrics'),
         'the counts go to the server, in another process, with the metrics it asks for'),
    wrap('lmdeploy.metrics.stats', 'SchedulerStats.update_from_schedule_metrics', 'self scheduled_metrics',
         _late('saturation', 'receive'), 'the server takes the counts out of its engine\'s metrics'),
    wrap('lmdeploy.metrics.loggers', 'PrometheusStatLogger.__init__', 'self model_name max_model_len dp_rank',
         _late('saturation', 'expose'), 'the metrics endpoint shows the share of saturated codes per layer'),
    wrap('lmdeploy.pytorch.weight_loader.model_weight_loader', 'ModelWeightLoader._rename_weights_iterator',
         'iterator model', _late('loading', 'rename_weights'),
         'scales in checkpoints are taken out of the stream of weights, in which they would be a KeyError'),
    wrap('lmdeploy.pytorch.engine.model_agent.agent', 'BaseModelAgent._build_model', 'self',
         _late('loading', 'build_model'),
         'scales of files and checkpoints reach the attention layers, and are audited'),
    wrap('lmdeploy.pytorch.spec_decode.spec_agent', 'SpecModelAgent.build_model',
         'self empty_init target_model build_model_ctx', _late('drafts', 'build_model'),
         'draft models of speculative decoding get scales of their own'),
    wrap('lmdeploy.pytorch.config', 'SpecDecodeConfig.from_config',
         'cls method num_speculative_tokens model target_cache_cfg target_model dtype trust_remote_code model_format '
         'hf_overrides dist_config', _late('drafts', 'configure'),
         'more draft tokens than the kernel reads at once are refused when the configuration is made'),
    wrap('lmdeploy.pytorch.model_inputs', 'StepContextManager.build_context',
         'self inputs model_config cache_config kv_caches state_caches kv_quant_policy',
         _late('drafts', 'build_context'), 'a draft model\'s steps know the format of its pages'),
    wrap('lmdeploy.pytorch.engine.model_agent.agent', 'BaseModelAgent.build_cache_engine', 'self',
         _late('transfer', 'build_cache_engine'), 'pages that leave the process carry format, scales and transforms'),
    wrap('lmdeploy.pytorch.engine.cache_engine.engine', 'CacheEngine.p2p_initialize', 'self migration_init_request',
         _late('transfer', 'p2p_initialize'), 'a prefill node says what its pages hold'),
    wrap('lmdeploy.pytorch.engine.cache_engine.engine', 'CacheEngine._get_pd_cache_pool_infos', 'self',
         _late('transfer', 'pool_infos'), 'a decode node compares it with its own'),
    wrap('lmdeploy.pytorch.engine.cache_engine.engine', 'CacheEngine.p2p_connect',
         'self remote_engine_id migration_conn_request', _late('transfer', 'p2p_connect'),
         'a node that does not say what its pages hold is refused'),
    wrap('lmdeploy.pytorch.kv_connector.mooncake.store.worker', 'MooncakeStoreWorker.__init__',
         'self cache_config global_rank tp_rank tp_size kv_head_replica_num store_factory replicate_config',
         _late('transfer', 'store_worker'), 'keys of stored pages name format, scales and transforms'),
    wrap('lmdeploy.pytorch.config', 'QuantizationConfig.from_config', 'cls hf_config',
         _late('checkpoints', 'quantization_config'), 'checkpoints of which only the KV cache is quantized load'),
    wrap('lmdeploy.pytorch.backends.cuda.graph_runner.full_graph', '_configure_decode_torch_compile', '',
         _late('config', 'skip_in_dynamo'), 'torch.compile of decode graphs leaves our launchers alone'),
    data('lmdeploy.pytorch.envs', '_ENVS', _late('config', 'forward_environment'),
         'our environment variables reach Ray workers on other nodes'),
)


class Hook:
    """Installs and removes the patch table in this process."""

    def __init__(self, patches: tuple[Patch, ...] = PATCHES):
        self.patches = patches
        self.rows = patches  # for the installed LMDeploy, known once checked
        self.problems: list[str] = []
        self.decided = False  # install() or uninstall() has been called
        self._undo: dict[str, Undo] = {}
        self._finder: Finder | None = None

    @property
    def installed(self) -> bool:
        """True between install and uninstall, unless the installed LMDeploy does not match."""
        return self._finder is not None and not self.problems

    def check(self) -> list[str]:
        """Sentences saying what of the installed LMDeploy does not match the table; empty if all does."""
        try:
            version = metadata.version('lmdeploy')
        except metadata.PackageNotFoundError:
            return ['LMDeploy is not installed']
        number = tuple(int(re.match(r'\d*', part)[0] or 0) for part in version.split('.')[:2])  # type: ignore[index]
        if not SUPPORTED[0] <= number < SUPPORTED[1]:
            return [f'lmdeploy_kvq supports LMDeploy >= {_dotted(SUPPORTED[0])}, < {_dotted(SUPPORTED[1])}; '
                    f'found {version}']
        self.rows = adapted(self.patches, number)
        root = _package_folder()
        found = (mismatch(patch, _source(root, patch.module)) for patch in self.rows)
        return [f'LMDeploy {version}: {problem}' for problem in found if problem]

    def install(self, strict: bool = True) -> None:
        """Apply every row, now where the module is imported, otherwise when it is.

        Args:
            strict: raise on a mismatch; otherwise only this package's policies are refused.

        Raises:
            RuntimeError: LMDeploy does not match the table (strict only). Nothing has been changed then.
        """
        if self._finder is not None:
            return
        self.decided = True
        self.problems = self.check()
        if self.problems and strict:
            raise RuntimeError('; '.join(self.problems))
        names = {'lmdeploy.messages'} if self.problems else {patch.module for patch in self.rows}
        self._finder = Finder('lmdeploy', names, self._apply, self._apply_initialized)
        sys.meta_path.insert(0, self._finder)
        self._apply_initialized()

    def uninstall(self) -> None:
        """Restore every original."""
        self.decided = True
        if self._finder is not None:
            sys.meta_path.remove(self._finder)
            self._finder = None
        while self._undo:
            self._undo.popitem()[1]()

    def state(self, patch: Patch) -> str:
        """``applied``, ``waiting`` (its module is not imported yet), ``off`` or ``refused``."""
        if self.problems:
            return 'refused'
        return 'applied' if patch.name in self._undo else 'waiting' if self._finder else 'off'

    def _apply_initialized(self) -> None:
        for name in self._finder.names if self._finder else ():
            module = initialized(name)
            if module is not None:
                self._apply(module)

    def _apply(self, module: ModuleType) -> None:
        if self.problems:
            self._refuse(module)
            return
        for patch in self.rows:
            if patch.module == module.__name__ and patch.name not in self._undo:
                self._undo[patch.name] = patch.apply(module)

    def _refuse(self, messages: ModuleType) -> None:
        """Leave LMDeploy as it is, except that our policies say why they are missing."""
        if 'refusal' in self._undo:
            return
        reason = f'lmdeploy_kvq is inactive: {"; ".join(self.problems)}'
        policies = {fmt.policy for fmt in FORMATS if not fmt.upstream}
        names = {name for name, policy in format_names().items() if policy in policies}

        def missing(cls: type, value: object) -> None:
            if value in policies or str(value).strip().lower() in names:
                raise ValueError(reason)

        messages.QuantPolicy._missing_ = classmethod(missing)
        self._undo['refusal'] = lambda: type.__delattr__(messages.QuantPolicy, '_missing_')
        if _asked_for() in policies:
            logger.error(reason)


HOOK = Hook()


def install() -> None:
    """Attach to LMDeploy in this process; done by itself unless ``LMDEPLOY_KVQ=0`` is set.

    Raises:
        RuntimeError: the installed LMDeploy is not supported. Nothing has been changed then.
    """
    HOOK.install()


def uninstall() -> None:
    """Detach: every original of LMDeploy is restored. Engines built before keep what they use."""
    HOOK.uninstall()


def _asked_for() -> int | None:
    """The policy of ours that this process's command line asks for, or None."""
    for position, argument in enumerate(sys.argv):
        option, equals, value = argument.partition('=')
        if option.replace('_', '-') == '--quant-policy':
            value = (value if equals else ' '.join(sys.argv[position + 1:position + 2])).strip().lower()
            return int(value) if value.isdecimal() else format_names().get(value)
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version))


def _package_folder() -> Path:
    loaded = sys.modules.get('lmdeploy')
    if loaded is not None:
        return Path(next(iter(loaded.__path__)))
    from importlib.util import find_spec
    spec = find_spec('lmdeploy')
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _source(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split('.')[1:])
    return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


__all__ = ['HOOK', 'PATCHES', 'SUPPORTED', 'Hook', 'install', 'uninstall']
