"""Actions by name: how a run records one, and how it is found again."""

from __future__ import annotations

from typing import Any

from sbiplat import symmetry
from sbiplat.errors import SettingError
from sbiplat.symmetry.action import GroupAction


def resolve_action(given: Any) -> GroupAction:
    """The action that a simulator names."""
    return given


def describe(action: GroupAction) -> dict[str, Any]:
    """What a run records of an action."""
    made = action.to_json()
    assert made is not None
    return made


def from_json(data: dict[str, Any]) -> GroupAction:
    """The action that a run records."""
    fields = dict(data)
    name = fields.pop("action")
    if name == "Product":
        return symmetry.Product(*[from_json(f) for f in fields["factors"]])
    if name not in symmetry.__all__:
        raise SettingError(f"no action is called {name!r}")
    return getattr(symmetry, name)(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
