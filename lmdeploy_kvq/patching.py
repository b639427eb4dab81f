"""Checked, reversible patches of modules that may not be imported yet. Knows nothing of LMDeploy or of formats."""
from __future__ import annotations

import ast
import functools
import importlib.machinery
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Undo = Callable[[], None]


@dataclass(frozen=True)
class Patch:
    """One patched target: a row of the hook's table.

    Attributes:
        module: dotted name of the module.
        target: ``function``, ``Class.method``, or the name of a module-level object.
        parameters: names the function's parameters must have, or None where the target is no function.
        apply: makes the change in the imported module and returns what undoes it.
        why: what the change is for, in the words of a user.
        wrapper: what a function is replaced by, see :func:`wrap`; None where the target is no function.
    """
    module: str
    target: str
    parameters: tuple[str, ...] | None
    apply: Callable[[ModuleType], Undo]
    why: str
    wrapper: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Full dotted name of the target."""
        return f'{self.module}.{self.target}'


def wrap(module: str, target: str, parameters: str, wrapper: Callable[..., Any], why: str) -> Patch:
    """A row that replaces a function (or static or class method) by ``wrapper(original, *args, **kwargs)``.

    Of a coroutine function, the wrapper is one as well.
    """
    *parents, leaf = target.split('.')

    def apply(loaded: ModuleType) -> Undo:
        owner = functools.reduce(getattr, parents, loaded)
        raw = vars(owner)[leaf]
        kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
        original = raw.__func__ if kind else raw

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        @functools.wraps(original)
        async def patched_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await wrapper(original, *args, **kwargs)

        new = patched_coroutine if inspect.iscoroutinefunction(original) else patched
        setattr(owner, leaf, kind(new) if kind else new)
        return lambda: setattr(owner, leaf, raw)

    return Patch(module, target, tuple(parameters.replace(',', ' ').split()), apply, why, wrapper)


def data(module: str, target: str, apply: Callable[[Any], Undo], why: str) -> Patch:
    """A row that changes a module-level object in place: ``apply(object)`` returns what undoes it."""
    return Patch(module, target, None, lambda loaded: apply(getattr(loaded, target)), why)


def mismatch(patch: Patch, source: Path) -> str | None:
    """Compare a row with the module's source, without importing it; a sentence if they differ."""
    body = _parse(source)
    if body is None:
        return f'{patch.module} was not found'
    node: Any = None
    for part in patch.target.split('.'):
        node = next((n for n in body if part in _defined(n)), None)
        if node is None:
            return f'{patch.name} does not exist'
        body = getattr(node, 'body', [])
    if patch.parameters is None:
        return None
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f'{patch.name} is not a function'
    found = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    if found != patch.parameters:
        return f'{patch.name} takes ({", ".join(found)}), expected ({", ".join(patch.parameters)})'
    return None


def _defined(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return (node.name, )
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return tuple(t.id for t in targets if isinstance(t, ast.Name))


@functools.lru_cache(maxsize=32)
def _parse(source: Path) -> list[ast.stmt] | None:
    return ast.parse(source.read_text(encoding='utf-8')).body if source.is_file() else None


def initialized(name: str) -> ModuleType | None:
    """The module if it is imported and its body has run to the end, else None."""
    module = sys.modules.get(name)
    spec = getattr(module, '__spec__', None)
    return None if module is None or getattr(spec, '_initializing', False) else module


class Finder:
    """Meta-path finder that calls ``ready(module)`` right after one of ``names`` has been executed.

    Wrapping the loader is what works here: post-import hooks in the style of wrapt fire at once, on a half-initialized
    module, for targets that are already being imported (LMDeploy's ``messages`` is: it is what imports torch). Those
    are left to ``look``, which is called at every later import from the same package.
    """

    def __init__(self, package: str, names: set[str], ready: Callable[[ModuleType], None], look: Callable[[], None]):
        self.prefix, self.names, self.ready, self.look = package + '.', names, ready, look

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find targets like the standard finder would, with a loader that reports when it is done."""
        if not name.startswith(self.prefix):
            return None
        self.look()
        if name not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.ready(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
