"""Builds objects from config nodes, and says which setting is wrong where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.cli.errors import UserError, call_mistake, user_mistakes


def build(node: DictConfig, *arguments: Any, **objects: Any) -> Any:
    """Calls a node's `_target_` with its settings, after positional arguments and beside objects that no config holds.

    Containers become plain ones.

    Raises:
        UserError: a setting is wrong.
    """
    with user_mistakes():
        return instantiate(node, *arguments, _convert_="all", **objects)


def build_later(node: DictConfig) -> Callable[..., Any]:
    """Binds a node's settings to its `_target_`; what is returned takes the objects that no config can hold.

    Each call builds the node's own objects anew, so that nothing is shared by what two calls return.

    Raises:
        UserError: a setting is wrong, now or when called.
    """
    with user_mistakes():
        bound = [instantiate(node, _partial_=True, _convert_="all")]

    def call(**objects: Any) -> Any:
        with user_mistakes():
            ready = bound.pop() if bound else instantiate(node, _partial_=True, _convert_="all")
            try:
                return ready(**objects)
            except TypeError as error:
                raise UserError(call_mistake(error, node["_target_"])) from error

    return call


def build_all(nodes: DictConfig | None) -> list[Any]:
    """Builds each node of a dict, in order; a node set to null, or left without a `_target_`, is left out."""
    return [build(node) for node in (nodes or {}).values() if OmegaConf.is_dict(node) and "_target_" in node]
