"""Options of a world as the command line gives them, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.errors import UsageError


def comma_list(value: Any) -> Any:
    """Split `"a, b"` into `("a", "b")`; leave anything that is not a string alone. For `BeforeValidator`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class Options(BaseModel):
    """Frozen options; a world subclasses it with its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, world: str, options: Mapping[str, Any]) -> Self:
        """Validate options whose values may be strings.

        Raises:
            UsageError: an option is unknown (the message lists the known ones) or its value does not fit.
        """
        unknown = sorted(set(options) - set(cls.model_fields))
        if unknown:
            known = ", ".join(cls.model_fields)
            raise UsageError(f"unknown option {unknown[0]!r} for env {world!r}; known options: {known}")
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "options"
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"env {world!r}, option {name}={first['input']!r}: {reason}") from error
