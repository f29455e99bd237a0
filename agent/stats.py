"""What a rollout has done so far, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RolloutStats:
    """What was played, and where the time went. Seconds are wall time; `prompt_tokens` counts all ids sent."""

    total: int = 0
    episodes: int = 0
    known: int = 0  # of these, were there before and are not played again
    successes: int = 0
    failed: int = 0
    requests: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, their keys and values existed already, as far as the engine tells
    later_prompt_tokens: int = 0  # the same two for an episode's second turn and the ones after it
    later_cached_tokens: int = 0
    engine_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of engine time; 0.0 before the first call."""
        return self.sampled_tokens / self.engine_seconds if self.engine_seconds else 0.0

    @property
    def episodes_per_second(self) -> float:
        """Episodes played per second of wall time; 0.0 before the first."""
        return (self.episodes - self.known) / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def engine_share(self) -> float:
        """Share of the wall time in which the engine was busy."""
        return self.engine_seconds / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens that the engine found in its cache; 0.0 where it does not tell."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
