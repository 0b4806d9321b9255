"""Reading a diffusers config.json: settings that our modules cannot compute are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

ValueT = TypeVar("ValueT")


def class_name(config: Mapping[str, Any], known: Sequence[str]) -> str:
    """The class that a config belongs to.

    Raises:
        ValueError: none, or one that is not known.
    """
    name = config.get("_class_name")
    if name not in known:
        raise ValueError(
            f"got a config with _class_name {name!r}, expected {' or '.join(known)}; give the config of such a model"
        )
    return str(name)


def choice(config: Mapping[str, Any], field: str, *allowed: Any) -> Any:
    """A setting, or the first allowed value where the config is silent.

    Raises:
        ValueError: a value that is not allowed.
    """
    value = config.get(field, allowed[0])
    if value not in allowed:
        raise refusal(config, field, " or ".join(repr(one) for one in allowed))
    return value


def refusal(config: Mapping[str, Any], field: str, expected: str) -> ValueError:
    """The error about a setting that our modules cannot compute."""
    return ValueError(
        f"got {field} {config.get(field)!r} in the config of a {config.get('_class_name')}, expected {expected}; "
        "ldm has no such network, so give a model that was built otherwise"
    )


def block_kinds(
    config: Mapping[str, Any], kinds: Mapping[str, ValueT], default: Sequence[str]
) -> tuple[list[ValueT], list[ValueT]]:
    """What the types of the blocks stand for, (on the way down, on the way up), both from the full resolution.

    Args:
        config: a config with down_block_types and up_block_types.
        kinds: what each type on the way down stands for; the way up has Up where the way down has Down.
        default: the types on the way down where the config is silent.

    Raises:
        ValueError: another type.
    """
    rising = {_upward(name): kind for name, kind in kinds.items()}
    down = _known(config, "down_block_types", kinds, default)
    up = _known(config, "up_block_types", rising, [_upward(name) for name in reversed(default)])
    return down, up[::-1]


def _known(config: Mapping[str, Any], field: str, kinds: Mapping[str, ValueT], default: Sequence[str]) -> list[ValueT]:
    # The first versions of diffusers began every name with UNetRes.
    names = [name.removeprefix("UNetRes") for name in config.get(field, default)]
    if not set(names) <= set(kinds):
        raise refusal(config, field, " or ".join(kinds) + " on every level")
    return [kinds[name] for name in names]


def _upward(name: str) -> str:
    return name.replace("Down", "Up").replace("Encoder", "Decoder")
