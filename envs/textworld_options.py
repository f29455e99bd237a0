"""What one may choose of a text adventure: `-o NAME=VALUE` of the `textworld` world."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from envs.options import Options

#: What the Z-machine holds of TextWorld's rooms.
MOST_ROOMS = 100


class TextWorldOptions(Options):
    """Options of the `textworld` world."""

    game: Literal["cooking", "coin_collector", "custom"] = "cooking"
    path: Path | None = None
    """A `.z1`-`.z8` or, with TextWorld before 1.7, `.ulx` file: it is the world's one task, in split `test`."""
    max_turns: int = Field(8, ge=1)
    """Commands per episode. `ood` games get four more."""
    list_commands: bool = True
    """Whether observations list the commands that work now; small models need it."""
    recipe: int = Field(1, ge=1, le=5)
    """Cooking: ingredients in the recipe."""
    take: int = Field(1, ge=0, le=5)
    """Cooking: ingredients that must be found first, at most `recipe`."""
    go: Literal[1, 6, 9, 12] = 1
    """Cooking: rooms."""
    open: bool = False
    """Cooking: containers and doors start closed."""
    cook: bool = False
    """Cooking: ingredients must be cooked."""
    cut: bool = False
    """Cooking: ingredients must be cut."""
    drop: bool = False
    """Cooking: the player can carry only a few things."""
    level: int = Field(3, ge=1, le=250)
    """Coin collector: its level; the quest's length is the level's last two digits. 1-150 and 201-233 can be made."""
    world_size: int = Field(5, ge=1, le=100)
    """Custom: rooms."""
    nb_objects: int = Field(10, ge=1, le=100)
    """Custom: objects."""
    quest_length: int = Field(3, ge=1, le=20)
    """Custom: commands that the shortest solution takes."""

    @model_validator(mode="before")
    @classmethod
    def _number_of_rooms(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("go"), str) and values["go"].isdigit():
            return {**values, "go": int(values["go"])}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TextWorldOptions:
        if self.take > self.recipe:
            raise ValueError(f"take={self.take} is more than recipe={self.recipe}")
        if self.game == "coin_collector" and coin_rooms(self.level) > MOST_ROOMS:
            raise ValueError(f"level={self.level} has {coin_rooms(self.level)} rooms, TextWorld makes {MOST_ROOMS}")
        return self


def coin_rooms(level: int) -> int:
    """Rooms of a coin collector game: a quest of 1 to 100 rooms, times one more for each hundred levels."""
    return ((level - 1) // 100 + 1) * ((level - 1) % 100 + 1)
