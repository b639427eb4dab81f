"""Names of caches, resolved: this package's formats, LMDeploy's own policies, the unquantized cache."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..calibrate import CALIBRATED, FILE
from ..console import UserError
from ..formats import FORMATS, KVFormat, format_names, get_format
from .material import Contender

NONE, ALL, STOCK = 'none', 'all', 'lmdeploy:'


def find_contenders(names: Sequence[str], kv_scales: str | None, folder: str, engine: str) -> list[Contender]:
    """The unquantized cache, then what was asked for; on a GPU the unquantized cache once more, as the floor.

    Args:
        names: of formats, :data:`ALL`, or of LMDeploy's own policies. kv_scales: a scale file, or None.
        folder: of the model. engine: what will run it.

    Raises:
        UserError: an unknown name, or one of LMDeploy's own policies where its engine does not run.
    """
    found = {NONE: Contender(NONE, 0)}
    if engine == 'lmdeploy':
        found['none again'] = Contender('none again', 0, floor=True)
    scales = _scales(kv_scales, folder)
    for name in names:
        for one in [fmt.name for fmt in FORMATS] if name == ALL else [name]:
            known = get_format(one) if one in format_names() or _is_policy(one) else None
            if known is not None:
                own = scales if scales is not None and _has(scales, known) else None
                found[known.name] = Contender(known.name, known.policy, known, scales=own)
            elif one != NONE:
                found[one] = _stock(one, engine)
    return list(found.values())


def _is_policy(name: str) -> bool:
    return name.isdecimal() and int(name) in format_names().values()


def _stock(name: str, engine: str) -> Contender:
    """A policy of LMDeploy's own: ``int4``, or ``lmdeploy:fp8`` where this package has one of that name."""
    ours = f'known are {ALL}, {", ".join(fmt.name for fmt in FORMATS)}'
    try:
        from ..backends.policies import lmdeploy_policies
        policies = lmdeploy_policies()
    except ImportError as error:
        raise UserError(f'unknown cache format {name!r}; {ours} (LMDeploy\'s own cannot be listed: {error})') from error
    bare = name.removeprefix(STOCK)
    number = next((value for key, value in policies.items() if bare in (key, str(value))), None)
    if number is None:
        raise UserError(f'unknown cache format {name!r}; {ours}; and, of LMDeploy\'s own, '
                        f'{", ".join(key if key not in format_names() else STOCK + key for key in policies)}')
    if engine != 'lmdeploy':
        raise UserError(f'{name} is LMDeploy\'s own; it can be measured where there is a GPU, by LMDeploy\'s engine')
    return Contender(name, number, stock=True)


def _has(path: str, fmt: KVFormat) -> bool:
    """Whether a scale file has what a format takes. The runs of static formats say why one cannot be read."""
    from ..scales import ScaleError, read_file
    if fmt not in CALIBRATED:
        return False
    try:
        file = read_file(path)
    except ScaleError:
        return fmt.needs_scales
    return bool(file.layers if fmt.needs_scales else file.transforms)


def _scales(given: str | None, folder: str) -> str | None:
    """The scale file: the one given, else the one beside the model."""
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f'there is no scale file {given}; lmdeploy-kvq calibrate writes one')
        return given
    beside = Path(folder, FILE)
    return str(beside) if beside.is_file() else None


def layer_contender(name: str, chosen: Sequence[Contender], kv_scales: str | None, folder: str) -> Contender:
    """The format whose layers are ranked: ``name``, or the smallest of those chosen where that is empty.

    Raises:
        UserError: no format of this package.
    """
    ours = [contender for contender in chosen if contender.format is not None]
    if name:
        asked = find_contenders((name.lower(), ), kv_scales, folder, 'transformers')
        ours = [contender for contender in asked if contender.format is not None]
    if not ours:
        raise UserError(f'--per-layer needs a format of this package: {", ".join(fmt.name for fmt in FORMATS)}')
    return min(ours, key=lambda contender: contender.format.bits_per_element(128))  # type: ignore[union-attr]
