"""Modules that remember how they were built, so that they can be described, written and rebuilt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def keeps_arguments(init: Constructor) -> Constructor:
    """Decorates a constructor: afterwards `self.arguments` holds every argument by name, defaults included."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        self.arguments = dict(given)

    return cast(Constructor, remembering)
