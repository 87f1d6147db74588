"""Modules that are imported when something in them is first used: a simulator may name an action without importing torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """Stands for the module of that name, `torch: Any = Lazy("torch")`."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self.__name__), attribute)
