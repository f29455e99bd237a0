"""One episode while it is played: what its env says goes in, the next request and at last the `Episode` come out."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from agent.engines.base import Completion, Engine
from agent.episode import Episode, SamplingParams, StopReason, Turn
from agent.policy import Conversation
from agent.renderer import Renderer
from envs.base import Env, Observation, Step, Task


def request_seed(seed: int, task: str, sample: int, turn: int) -> int:
    """The sampling seed of one request, in [0, 2**63). It does not depend on the episode's id: two runs of one seed
    sample alike whatever they are called."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{sample}\0{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Plan:
    """What all episodes of one run share."""

    engine: Engine
    renderer: Renderer
    sampling: SamplingParams  # its seed is the run's
    knowledge: str | None = None
    knowledge_id: str | None = None
    max_new: int | None = None  # most tokens after the first prompt
    episode_seconds: float | None = None


@dataclass(eq=False)
class Game:
    """One episode while it is played. Its env is called in another thread, by one call at a time."""

    plan: Plan
    order: int
    id: str
    task: Task
    sample: int
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)
    env: Env | None = None
    conversation: Conversation | None = None
    system: str = ""
    max_turns: int = 1
    observation: Observation | None = None
    choices: tuple[str, ...] | None = None
    last: Completion | None = None
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0
    success: bool = False

    @property
    def prompt(self) -> list[int]:
        """The ids that the next reply follows."""
        assert self.conversation is not None  # noqa: S101
        return self.conversation.ids

    @property
    def overdue(self) -> str | None:
        """Why the episode has to end, where it has used up its time."""
        limit = self.plan.episode_seconds
        if limit is None or time.perf_counter() - self.clock <= limit:
            return None
        return f"the episode took longer than its limit of {limit:g} s"

    def begin(self, observation: Observation) -> None:
        """Take in the first observation."""
        self.observation = observation
        self.conversation = Conversation(self.plan.renderer, self.system, observation.text, self.plan.knowledge)

    def say(self, completion: Completion) -> str:
        """Take in what was sampled; the reply's text."""
        assert self.conversation is not None  # noqa: S101
        self.last = completion
        return self.conversation.say(completion)

    def hear(self, step: Step, seconds: float) -> StopReason | None:
        """Take in the env's answer to the last reply; why the episode is over, if it is."""
        conversation = self.conversation
        assert conversation is not None  # noqa: S101
        assert self.observation is not None  # noqa: S101
        assert self.last is not None  # noqa: S101
        self.turns.append(
            Turn(
                observation=self.observation.text,
                action=conversation.messages[-1].content,
                start=len(conversation.ids) - len(self.last.token_ids),
                end=len(conversation.ids),
                finish_reason=self.last.finish_reason,
                reward=step.reward,
                feedback=step.feedback,
                seconds=seconds,
                choices=self.choices,
            )
        )
        self.observation = step.observation
        if step.done:
            return StopReason.DONE
        return StopReason.MAX_TURNS if len(self.turns) >= self.max_turns else None

    def request(self) -> SamplingParams | str:
        """How the next reply is sampled after `prompt`, or why there is no room for one."""
        plan, conversation = self.plan, self.conversation
        assert conversation is not None  # noqa: S101
        assert self.observation is not None  # noqa: S101
        bridge = conversation.bridge(self.observation.text) if self.turns else []
        length = len(conversation.ids) + len(bridge)
        room = plan.engine.max_context - length
        if plan.max_new is not None:
            room = min(room, plan.max_new - (length - conversation.prompt_length))
        if room < 1:
            limit = f"{plan.engine.max_context} tokens of context"
            if plan.max_new is not None:
                limit += f" and {plan.max_new} tokens an episode"
            return f"a prompt of {length} tokens leaves no room: {limit}"
        if bridge:
            conversation.hear(self.observation.text, bridge)
        sampling = plan.sampling
        self.choices = self.observation.admissible if sampling.admissible_only else None
        return sampling.model_copy(
            update={
                "max_tokens": min(sampling.max_tokens, room),
                "seed": request_seed(sampling.seed or 0, self.task.id, self.sample, len(self.turns)),
                "choices": self.choices,
            }
        )

    def episode(self, reason: StopReason, error: str | None) -> Episode:
        """The episode as it is kept."""
        conversation, plan = self.conversation, self.plan
        messages = list(conversation.messages) if conversation else []
        said = self.observation.text if self.observation else ""
        if messages and messages[-1].role == "assistant" and reason is not StopReason.ERROR and said:
            messages.append(messages[0].model_copy(update={"role": "user", "content": said}))
        return Episode(
            id=self.id,
            task=self.task,
            messages=tuple(messages),
            turns=tuple(self.turns),
            token_ids=tuple(conversation.ids) if conversation else (),
            prompt_length=conversation.prompt_length if conversation else 0,
            loss_mask=tuple(conversation.mask) if conversation else (),
            logprobs=tuple(conversation.logprobs) if conversation else (),
            reward=sum(turn.reward for turn in self.turns),
            score=self.score,
            success=self.success,
            feedback="\n".join(dict.fromkeys(turn.feedback for turn in self.turns if turn.feedback)),
            stop_reason=reason,
            error=error,
            model=plan.engine.model,
            checkpoint=plan.engine.checkpoint,
            knowledge=plan.knowledge_id,
            sampling=plan.sampling,
            started_at=self.started_at,
            seconds=time.perf_counter() - self.clock,
        )
