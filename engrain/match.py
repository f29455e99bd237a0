"""One game that is played turn by turn: by a person alone, or with a model that plays or suggests.

Where a model takes part the conversation is kept as ids, as in every rollout: what it sampled is marked as sampled, and
a person's words stand there as ids that are read and never trained on (`human_turns` tells them apart).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from agent.engines.base import Completion
from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn, episode_id
from agent.errors import ContextLengthError
from agent.game import Game, Plan
from agent.scheduler import describe
from agent.workers import forget
from engrain.nearby import open_env
from envs.base import Env, Observation, Step, Task

MakeEnv = Callable[[Task], Env]


class NoRoomError(Exception):
    """The next prompt does not fit; the message says what limits it."""


class WorldError(Exception):
    """The world broke down over a call; the message is its error."""


class Match:
    """One task played turn by turn: `begin`, then `play` until `ended`; `episode` at any time.

    Args:
        task: what is played.
        make_env: builds its env.
    """

    def __init__(self, task: Task, make_env: MakeEnv | None = None) -> None:
        self.task = task
        self.ended: StopReason | None = None
        self.turns: list[Turn] = []
        self._make_env = make_env or open_env
        self._env: Env | None = None
        self._observation = Observation("")

    @property
    def observation(self) -> Observation:
        """What the world said last."""
        return self._observation

    @property
    def system(self) -> str:
        """The world's instructions, "" for none; known after `begin`."""
        return self._env.system if self._env else ""

    @property
    def max_turns(self) -> int:
        """The most replies; known after `begin`."""
        return self._env.max_turns if self._env else 1

    @property
    def begun(self) -> bool:
        """Whether anything was said, so that there is something to keep."""
        return bool(self.turns)

    def begin(self) -> Observation:
        """Start the world.

        Raises:
            WorldError: it does not start.
        """
        with _world():
            self._env = self._make_env(self.task)
            self._observation = self._env.reset()
        return self._observation

    def play(self, reply: str | Completion) -> Step:
        """Say a reply, and hear the world's answer.

        Raises:
            WorldError: the world broke down over it.
        """
        raise NotImplementedError

    def episode(self, reason: StopReason, error: str | None = None) -> Episode:
        """The episode as it is kept."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the world."""
        forget([self._env])

    def _step(self, text: str) -> tuple[Step, float]:
        assert self._env is not None  # noqa: S101
        before = time.perf_counter()
        with _world():
            step = self._env.step(text)
        self._observation = step.observation
        return step, time.perf_counter() - before


class HumanMatch(Match):
    """A person plays alone: no model, no ids."""

    def __init__(self, task: Task, make_env: MakeEnv | None = None) -> None:
        super().__init__(task, make_env)
        self._started, self._clock = datetime.now(UTC), time.perf_counter()
        self._messages: list[Message] = []

    def begin(self) -> Observation:
        """Start the world."""
        observation = super().begin()
        self._messages = [Message(role="system", content=self.system)] if self.system else []
        self._messages.append(Message(role="user", content=observation.text))
        return observation

    def play(self, reply: str | Completion) -> Step:
        """Say a reply, and hear the world's answer."""
        assert isinstance(reply, str)  # noqa: S101 - nobody else is here
        before = self.observation.text
        step, seconds = self._step(reply)
        self.turns.append(
            Turn(
                observation=before,
                action=reply,
                start=0,
                end=0,
                finish_reason=FinishReason.STOP,
                reward=step.reward,
                feedback=step.feedback,
                seconds=seconds,
            )
        )
        self._messages.append(Message(role="assistant", content=reply))
        if step.observation.text:
            self._messages.append(Message(role="user", content=step.observation.text))
        if step.done:
            self.ended = StopReason.DONE
        elif len(self.turns) >= self.max_turns:
            self.ended = StopReason.MAX_TURNS
        return step

    def episode(self, reason: StopReason, error: str | None = None) -> Episode:
        """The episode as it is kept: text only."""
        return Episode(
            id=episode_id(f"human\0{self._started.isoformat()}", self.task),
            task=self.task,
            messages=tuple(self._messages),
            turns=tuple(self.turns),
            token_ids=(),
            prompt_length=0,
            loss_mask=(),
            logprobs=(),
            reward=sum(turn.reward for turn in self.turns),
            score=self._env.score if self._env else 0.0,
            success=self._env.success if self._env else False,
            feedback="\n".join(dict.fromkeys(turn.feedback for turn in self.turns if turn.feedback)),
            stop_reason=reason,
            error=error,
            model="human",
            sampling=SamplingParams(),
            started_at=self._started,
            seconds=time.perf_counter() - self._clock,
            human=True,
        )


class AgentMatch(Match):
    """A model takes part: it plays, or suggests replies that a person may replace.

    Args:
        task: what is played.
        plan: engine, renderer, sampling and knowledge.
        namespace: what the episode's id is derived from. A game that a person took part in, or that was left, is like
            no other, so its id is derived from the time too.
        make_env: builds the env.
    """

    def __init__(self, task: Task, plan: Plan, namespace: str, make_env: MakeEnv | None = None) -> None:
        super().__init__(task, make_env)
        self.plan = plan
        self._namespace = namespace
        self._game = Game(plan, 0, episode_id(namespace, task), task, 0)
        self._by_hand = False

    @property
    def begun(self) -> bool:
        """Whether anything was said."""
        return bool(self._game.conversation and any(m.role == "assistant" for m in self._game.conversation.messages))

    def begin(self) -> Observation:
        """Start the world."""
        self._game.started_at, self._game.clock = datetime.now(UTC), time.perf_counter()
        observation = super().begin()
        self._game.system, self._game.max_turns = self.system, self.max_turns
        self._game.begin(observation)
        return observation

    def suggest(self) -> Completion:
        """What the model says next; once a turn, before `play`.

        Raises:
            NoRoomError: the next prompt leaves no room for a reply.
            EngrainError: the engine failed.
        """
        request = self._game.request()
        if isinstance(request, str):
            raise NoRoomError(request)
        try:
            return self.plan.engine.generate([self._game.prompt], [request])[0]
        except ContextLengthError as error:
            raise NoRoomError(str(error)) from error

    def text_of(self, suggestion: Completion) -> str:
        """A suggestion as text."""
        return self.plan.renderer.decode(suggestion.token_ids)

    def supposing(self, suggestion: Completion) -> Episode:
        """The episode so far, and this reply to the world's last words as if it had been said."""
        so_far, ids = self._game.episode(StopReason.INTERRUPTED, None), suggestion.token_ids
        start = len(so_far.token_ids)
        turn = Turn(
            observation=self.observation.text,
            action=self.text_of(suggestion),
            start=start,
            end=start + len(ids),
            finish_reason=suggestion.finish_reason,
            choices=self._game.choices,
        )
        return so_far.model_copy(
            update={
                "token_ids": so_far.token_ids + ids,
                "loss_mask": so_far.loss_mask + (suggestion.exact,) * len(ids),
                "logprobs": so_far.logprobs + suggestion.logprobs,
                "turns": (*so_far.turns, turn),
            }
        )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A time that does not count as the episode's."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._game.clock += time.perf_counter() - before

    def play(self, reply: str | Completion) -> Step:
        """Say what was suggested, or a person's own words, and hear the world's answer."""
        if isinstance(reply, str):
            self._by_hand = True
            ids = self.plan.renderer.reencode(reply, ended=True)
            reply = Completion(tuple(ids), (0.0,) * len(ids), FinishReason.STOP, exact=False)
        text = self._game.say(reply)
        step, seconds = self._step(text)
        assert self._env is not None  # noqa: S101
        self._game.score, self._game.success = self._env.score, self._env.success
        self.ended = self._game.hear(step, seconds)
        self.turns.append(self._game.turns[-1])
        return step

    def episode(self, reason: StopReason, error: str | None = None) -> Episode:
        """The episode as it is kept."""
        episode = self._game.episode(reason, error)
        if not self._by_hand and reason is not StopReason.INTERRUPTED:
            return episode
        alone = episode_id(f"{self._namespace}\0{self._game.started_at.isoformat()}", self.task)
        return episode.model_copy(update={"id": alone, "human": self._by_hand})


def human_turns(episode: Episode) -> tuple[bool, ...]:
    """For each turn whether a person chose its words.

    In an episode with a person (`Episode.human`) those are the turns of which nothing was sampled.
    """
    return tuple(episode.human and not any(episode.loss_mask[t.start : t.end]) for t in episode.turns)


def sampled_turns(episode: Episode) -> list[tuple[int, slice]]:
    """Each turn with sampled tokens: its number from 0, and its place among all sampled tokens of the episode."""
    places = [i for i, sampled in enumerate(episode.loss_mask) if sampled]
    found = []
    for number, turn in enumerate(episode.turns):
        start, end = bisect_left(places, turn.start), bisect_left(places, turn.end)
        if start < end:
            found.append((number, slice(start, end)))
    return found


@contextmanager
def _world() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WorldError(describe(error)) from error
