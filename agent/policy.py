"""Between an env that speaks text and an engine that speaks tokens: one conversation, kept append-only."""

from __future__ import annotations

from agent.engines.base import Completion
from agent.episode import Message
from agent.renderer import Renderer


class Conversation:
    """One episode's messages, and its token ids with mask and log-probabilities, growing together.

    `ids[:prompt_length]` is the first prompt. `mask` is True exactly at sampled ids, `logprobs` is 0.0 elsewhere.
    Ids of a reply that an engine knows as text only (`Completion.exact` is False) do not count as sampled.
    `messages` never hold the knowledge: it is only in the ids.
    """

    def __init__(self, renderer: Renderer, system: str, observation: str, knowledge: str | None = None) -> None:
        self.renderer = renderer
        self.messages: list[Message] = [Message(role="system", content=system)] if system else []
        self.messages.append(Message(role="user", content=observation))
        self.ids: list[int] = renderer.prompt(self.messages, knowledge)
        self.prompt_length = len(self.ids)
        self.mask: list[bool] = [False] * self.prompt_length
        self.logprobs: list[float] = [0.0] * self.prompt_length

    def say(self, completion: Completion) -> str:
        """Append a sampled reply; its text."""
        text = self.renderer.decode(completion.token_ids)
        self.messages.append(Message(role="assistant", content=text))
        self.ids += completion.token_ids
        self.mask += [completion.exact] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        return text

    def bridge(self, observation: str) -> list[int]:
        """The ids that would follow the last reply if the env now says this."""
        ended = self.ids[-1] == self.renderer.end_of_turn
        return self.renderer.bridge(self.messages[:-1], observation, ended)

    def hear(self, observation: str, bridge: list[int]) -> None:
        """Append what the env says, so that the next reply can be sampled."""
        self.messages.append(Message(role="user", content=observation))
        self.ids += bridge
        self.mask += [False] * len(bridge)
        self.logprobs += [0.0] * len(bridge)
