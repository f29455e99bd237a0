"""Playing many tasks together: whichever envs wait for a reply share the next call of the engine.

The engine runs in the calling thread, envs are made, reset and stepped in a thread pool, so that an env that takes
its time never stalls the others. An episode's outcome depends on its task, its sample number and the seed only, not
on who was in the batch (up to the rounding of the model's matrix products).
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import Empty, SimpleQueue

from agent.engines.base import Completion, Engine
from agent.episode import Episode, SamplingParams, StopReason, Turn, episode_id
from agent.errors import ContextLengthError
from agent.policy import Conversation
from agent.renderer import Renderer
from envs.base import Env, Observation, Step, Task
from envs.errors import EngrainError

#: Builds the env that plays a task.
MakeEnv = Callable[[Task], Env]

_LINGER = 0.05  # share of the last engine call's time that it may pay to wait for more envs
_LINGER_BOUNDS = (0.02, 2.0)  # seconds


@dataclass
class RolloutStats:
    """What was played, and where the time went. Seconds are wall time; `prompt_tokens` counts all ids sent."""

    total: int = 0
    episodes: int = 0
    successes: int = 0
    failed: int = 0
    requests: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    engine_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of engine time; 0.0 before the first call."""
        return self.sampled_tokens / self.engine_seconds if self.engine_seconds else 0.0

    @property
    def engine_share(self) -> float:
        """Share of the wall time in which the engine was busy."""
        return self.engine_seconds / self.wall_seconds if self.wall_seconds else 0.0


@dataclass
class _Game:
    """One episode while it is played."""

    order: int
    id: str
    task: Task
    sample: int
    started_at: datetime
    clock: float
    env: Env | None = None
    conversation: Conversation | None = None
    system: str = ""
    max_turns: int = 1
    observation: str = ""
    last: Completion | None = None
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0
    success: bool = False


@dataclass
class _Answer:
    """What a worker brings back: the first observation, a step, or an error."""

    game: _Game
    observation: Observation | None = None
    step: Step | None = None
    seconds: float = 0.0
    error: Exception | None = None


def play(
    tasks: Sequence[Task],
    engine: Engine,
    *,
    sampling: SamplingParams,
    namespace: str,
    knowledge: str | None = None,
    knowledge_id: str | None = None,
    samples: int = 1,
    max_tokens_per_episode: int | None = None,
    batch: int = 64,
    workers: int = 8,
    seed: int = 0,
    make_env: MakeEnv | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    progress: Callable[[RolloutStats], None] | None = None,
    stats: RolloutStats | None = None,
    skip: Collection[str] = (),
    lockstep: bool = False,
) -> list[Episode]:
    """Play every task `samples` times; the episodes in the order of the tasks, samples of one task together.

    Args:
        tasks: what to play; a task that stands there again counts as its next sample.
        engine: who plays.
        sampling: its `seed` is ignored: every request gets its own, from `seed`, task, sample and turn.
        namespace: part of every episode's id; the same namespace, task and sample give the same id.
        knowledge: text placed first in the system message. It is not part of `Episode.messages`.
        knowledge_id: its id, as `Episode.knowledge`.
        samples: episodes a task.
        max_tokens_per_episode: the most tokens after the first prompt; None is as many as the context holds.
        batch: the most requests in one engine call; twice as many envs are open at most.
        workers: threads that make and step envs.
        seed: fixes all sampling.
        make_env: None is `envs.registry.make`.
        on_episode: called in this thread with every episode as soon as it is over, failed ones too. What it got
            before an interrupt is complete.
        progress: called in this thread after every engine call and every episode.
        stats: filled in as the play goes on.
        skip: ids of episodes that are not to be played (again); they are missing in the result.
        lockstep: before every engine call wait for all open envs, so that batches, and with them the rounding of the
            model's arithmetic, do not depend on timing: the same bits again, at the pace of the slowest env.

    Raises:
        UsageError: a sampling parameter is out of range, or the model's chat template cannot be used.
        EngrainError: the engine failed. What an env raises costs its episode only.
    """
    if make_env is None:
        from envs.registry import make

        make_env = make
    stats = stats if stats is not None else RolloutStats()
    games: deque[_Game] = deque()
    seen: Counter[str] = Counter()
    for order, task in enumerate(task for task in tasks for _ in range(samples)):
        identity = episode_id(namespace, task, seen[task.id])
        if identity not in skip:
            games.append(_Game(order, identity, task, seen[task.id], datetime.now(UTC), 0.0))
        seen[task.id] += 1
    stats.total += len(games)
    run = _Run(
        engine=engine,
        renderer=Renderer(engine.tokenizer),
        knowledge=knowledge,
        knowledge_id=knowledge_id,
        sampling=sampling.model_copy(update={"seed": seed}),
        max_new=max_tokens_per_episode,
        batch=batch,
        make_env=make_env,
        on_episode=on_episode or (lambda episode: None),
        progress=progress or (lambda stats: None),
        stats=stats,
        workers=workers,
        lockstep=lockstep,
    )
    return run.all(games)


def request_seed(seed: int, task: str, sample: int, turn: int) -> int:
    """The sampling seed of one request, in [0, 2**63). It does not depend on the episode's id: two runs of one seed
    sample alike whatever they are called."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{sample}\0{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class _Run:
    engine: Engine
    renderer: Renderer
    knowledge: str | None
    knowledge_id: str | None
    sampling: SamplingParams
    max_new: int | None
    batch: int
    workers: int
    lockstep: bool
    make_env: MakeEnv
    on_episode: Callable[[Episode], None]
    progress: Callable[[RolloutStats], None]
    stats: RolloutStats
    answers: SimpleQueue[_Answer] = field(default_factory=SimpleQueue)
    ready: deque[tuple[_Game, SamplingParams]] = field(default_factory=deque)
    finished: dict[int, Episode] = field(default_factory=dict)
    stepping: int = 0
    engine_call: float = 0.0

    def all(self, games: deque[_Game]) -> list[Episode]:
        start = time.perf_counter()
        before = self.stats.wall_seconds
        total = len(games)
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="env")
        try:
            while len(self.finished) < total:
                while games and self.stepping + len(self.ready) < 2 * self.batch:
                    game = games.popleft()
                    self._submit(game, None)
                self._collect()
                if self.ready:
                    self._generate()
                self.stats.wall_seconds = before + time.perf_counter() - start
                self.progress(self.stats)
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        self.pool.shutdown(wait=True)
        self.stats.wall_seconds = before + time.perf_counter() - start
        return [self.finished[order] for order in sorted(self.finished)]

    def _submit(self, game: _Game, reply: str | None) -> None:
        self.stepping += 1
        self.pool.submit(lambda: self.answers.put(_work(game, reply, self.make_env)))

    def _collect(self) -> None:
        """Take in what envs answered: wait for the first, then a moment for a fuller batch."""
        if self.lockstep:
            while self.stepping:
                answer = self.answers.get()
                self.stepping -= 1
                self._take(answer)
            self.ready = deque(sorted(self.ready, key=lambda entry: entry[0].order))
            return
        low, high = _LINGER_BOUNDS
        deadline = None
        while self.stepping and len(self.ready) < self.batch:
            timeout = None
            if self.ready:
                deadline = deadline or time.perf_counter() + min(high, max(low, _LINGER * self.engine_call))
                timeout = max(0.0, deadline - time.perf_counter())
            try:
                answer = self.answers.get(timeout=timeout)
            except Empty:
                return
            self.stepping -= 1
            self._take(answer)

    def _take(self, answer: _Answer) -> None:
        game = answer.game
        if answer.error is not None:
            self._finish(game, StopReason.ERROR, describe(answer.error))
            return
        if answer.step is None:
            assert answer.observation is not None  # noqa: S101
            game.observation = answer.observation.text
            game.conversation = Conversation(self.renderer, game.system, game.observation, self.knowledge)
            self._ask(game, [])
            return
        step, conversation = answer.step, game.conversation
        assert conversation is not None  # noqa: S101
        assert game.last is not None  # noqa: S101
        game.turns.append(
            Turn(
                observation=game.observation,
                action=conversation.messages[-1].content,
                start=len(conversation.ids) - len(game.last.token_ids),
                end=len(conversation.ids),
                finish_reason=game.last.finish_reason,
                reward=step.reward,
                feedback=step.feedback,
                seconds=answer.seconds,
            )
        )
        game.observation = step.observation.text
        if step.done or len(game.turns) >= game.max_turns:
            self._finish(game, StopReason.DONE if step.done else StopReason.MAX_TURNS)
        else:
            self._ask(game, conversation.bridge(game.observation))

    def _ask(self, game: _Game, bridge: list[int]) -> None:
        """Queue the next reply, if there is room for it."""
        conversation = game.conversation
        assert conversation is not None  # noqa: S101
        length = len(conversation.ids) + len(bridge)
        room = self.engine.max_context - length
        if self.max_new is not None:
            room = min(room, self.max_new - (length - conversation.prompt_length))
        if room < 1:
            limit = f"{self.engine.max_context} tokens of context"
            if self.max_new is not None:
                limit += f" and {self.max_new} tokens an episode"
            self._finish(game, StopReason.LENGTH, f"a prompt of {length} tokens leaves no room: {limit}")
            return
        if bridge:
            conversation.hear(game.observation, bridge)
        params = self.sampling.model_copy(
            update={
                "max_tokens": min(self.sampling.max_tokens, room),
                "seed": request_seed(self.sampling.seed or 0, game.task.id, game.sample, len(game.turns)),
            }
        )
        self.ready.append((game, params))

    def _generate(self) -> None:
        """One engine call for the games that are ready; their envs step while the next call is prepared."""
        taken = [self.ready.popleft() for _ in range(min(self.batch, len(self.ready)))]
        prompts = [game.conversation.ids for game, _ in taken if game.conversation is not None]
        start = time.perf_counter()
        try:
            completions: list[Completion | str] = [*self.engine.generate(prompts, [params for _, params in taken])]
        except ContextLengthError:
            completions = [self._alone(ids, params) for ids, (_, params) in zip(prompts, taken, strict=True)]
        self.engine_call = time.perf_counter() - start
        self.stats.engine_seconds += self.engine_call
        self.stats.requests += len(taken)
        self.stats.prompt_tokens += sum(map(len, prompts))
        for (game, _), completion in zip(taken, completions, strict=True):
            if isinstance(completion, str):
                self._finish(game, StopReason.LENGTH, completion)
                continue
            assert game.conversation is not None  # noqa: S101
            game.last = completion
            self.stats.sampled_tokens += len(completion.token_ids)
            self._submit(game, game.conversation.say(completion))

    def _alone(self, prompt: list[int], params: SamplingParams) -> Completion | str:
        """One request by itself, or why it is too long."""
        try:
            return self.engine.generate([prompt], [params])[0]
        except ContextLengthError as error:
            return str(error)

    def _finish(self, game: _Game, reason: StopReason, error: str | None = None) -> None:
        episode = self._episode(game, reason, error)
        if game.env is not None:
            self.pool.submit(_close, game.env)
        self.finished[game.order] = episode
        self.stats.episodes += 1
        self.stats.successes += episode.success
        self.stats.failed += reason is StopReason.ERROR
        self.on_episode(episode)

    def _episode(self, game: _Game, reason: StopReason, error: str | None) -> Episode:
        conversation = game.conversation
        messages = list(conversation.messages) if conversation else []
        if messages and messages[-1].role == "assistant" and reason is not StopReason.ERROR and game.observation:
            messages.append(messages[0].model_copy(update={"role": "user", "content": game.observation}))
        return Episode(
            id=game.id,
            task=game.task,
            messages=tuple(messages),
            turns=tuple(game.turns),
            token_ids=tuple(conversation.ids) if conversation else (),
            prompt_length=conversation.prompt_length if conversation else 0,
            loss_mask=tuple(conversation.mask) if conversation else (),
            logprobs=tuple(conversation.logprobs) if conversation else (),
            reward=sum(turn.reward for turn in game.turns),
            score=game.score,
            success=game.success,
            feedback="\n".join(dict.fromkeys(turn.feedback for turn in game.turns if turn.feedback)),
            stop_reason=reason,
            error=error,
            model=self.engine.model,
            checkpoint=self.engine.checkpoint,
            knowledge=self.knowledge_id,
            sampling=self.sampling,
            started_at=game.started_at,
            seconds=time.perf_counter() - game.clock,
        )


def describe(error: BaseException) -> str:
    """An error as one line to store: Engrain's own as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EngrainError) else f"{type(error).__name__}: {text}"


def _work(game: _Game, reply: str | None, make_env: MakeEnv) -> _Answer:
    """In a worker: start the game, or step it."""
    start = time.perf_counter()
    try:
        if game.env is None:
            game.started_at, game.clock = datetime.now(UTC), start
            game.env = make_env(game.task)
            observation = game.env.reset()
            game.system, game.max_turns = game.env.system, game.env.max_turns
            return _Answer(game, observation=observation)
        step = game.env.step(reply or "")
        seconds = time.perf_counter() - start
        game.score, game.success = game.env.score, game.env.success
        return _Answer(game, step=step, seconds=seconds)
    except Exception as error:  # whatever an env raises costs its episode, not the run
        return _Answer(game, error=error)


def _close(env: Env) -> None:
    with contextlib.suppress(Exception):  # the episode is over and stored
        env.close()
