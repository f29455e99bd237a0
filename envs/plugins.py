"""Parts by name: built in, registered by another distribution through an entry point, or by this process itself.

A part that came in through an entry point is there in every process and on the command line. One that was registered
by a call is known to this process alone, which is enough for a script or a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from envs.errors import BadPluginError, UsageError


class Plugins:
    """The parts of one entry-point group.

    Args:
        group: name of the group, as in `[project.entry-points."engrain.envs"]`.
        what: what one part is, for messages.
        built_in: `module:attribute` by name, imported on first use; no other part may take such a name.
    """

    def __init__(self, group: str, what: str, built_in: Mapping[str, str] | None = None) -> None:
        self.group, self.what = group, what
        self.built_in = dict(built_in or {})
        self._here: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _targets(self) -> dict[str, str]:
        return {**{point.name: point.value for point in entry_points(group=self.group)}, **self.built_in}

    def names(self) -> list[str]:
        """All names, sorted. Nothing is imported."""
        return sorted({*self._targets, *self._here})

    def register(self, name: str, part: Any) -> None:
        """Add a part to this process, in place of an installed one of the same name.

        Raises:
            UsageError: the name is that of a built-in part.
        """
        if name in self.built_in:
            raise UsageError(f"{self.what} {name!r} is built in; register yours under another name")
        self._here[name] = part

    def here(self, name: str) -> bool:
        """Whether this process registered the name, so that no other process knows it."""
        return name in self._here

    def find(self, name: str) -> Any | None:
        """The part of that name, None if there is none.

        Raises:
            BadPluginError: it does not import, whatever kept it from that.
        """
        if name in self._here:
            return self._here[name]
        if name not in self._loaded:
            target = self._targets.get(name)
            if target is None:
                return None
            module, _, attribute = target.partition(":")
            try:
                self._loaded[name] = getattr(import_module(module), attribute)
            except Exception as error:  # whatever another's module raises as it is read
                raise BadPluginError(f"{self.what} {name!r} does not load from {target!r}: {error}") from error
            if self._here.get(name) is self._loaded[name]:  # its module registers it too; it is an installed part
                del self._here[name]
        return self._loaded[name]

    def function(self, name: str) -> Any:
        """The part of that name, which must be a function.

        Raises:
            BadPluginError: it does not import, or is no function.
        """
        part = self.find(name)
        if not callable(part):
            raise BadPluginError(f"{self.what} {name!r}: {part!r} is not a function")
        return part
