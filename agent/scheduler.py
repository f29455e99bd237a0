"""Keeps an engine busy with the episodes of one run while their envs step.

The engine is called in one thread. Envs are called elsewhere: those that may crash or hang in worker processes, others
in a thread pool. An engine that takes requests at any time (`StreamingEngine`) gets one as soon as an env has
answered; any other engine gets those that are ready in one call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue

from agent.engines.base import Completion, StreamingEngine
from agent.episode import Episode, SamplingParams, StopReason
from agent.errors import ConstraintError, ContextLengthError
from agent.game import Game, Plan
from agent.stats import RolloutStats
from agent.workers import RemoteEnv, Workers, forget, shared_workers
from envs import registry
from envs.base import Env, Observation, Step, Task
from envs.errors import EngrainError

#: Builds the env that plays a task.
MakeEnv = Callable[[Task], Env]

_LINGER = 0.05  # share of the last engine call's time that it may pay to wait for more envs
_LINGER_BOUNDS = (0.02, 2.0)  # seconds
_POLL_SECONDS = 0.005  # how long a streaming engine is waited for while envs may answer
_IDLE_POLL_SECONDS = 0.1  # and while none can
#: What an engine refuses one request for, not all.
_REFUSALS = (ContextLengthError, ConstraintError)


@dataclass
class _Answer:
    """What an env said: the first observation, a step, or an error."""

    game: Game
    observation: Observation | None = None
    step: Step | None = None
    seconds: float = 0.0
    error: Exception | None = None


class Scheduler:
    """Plays games of one plan; see `agent.rollout.play` for the arguments.

    `play` plays given games to their end. `serve` plays what other threads `add` until one of them calls `stop`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_end: Callable[[Game, Episode], None],
        progress: Callable[[RolloutStats], None] | None = None,
        stats: RolloutStats | None = None,
        batch: int = 64,
        threads: int = 8,
        make_env: MakeEnv | None = None,
        workers: Workers | None = None,
        turn_seconds: float = 120.0,
        lockstep: bool = False,
    ) -> None:
        self.plan = plan
        self.engine = plan.engine
        self.stats = stats if stats is not None else RolloutStats()
        self._streaming = None if lockstep or not isinstance(plan.engine, StreamingEngine) else plan.engine
        self._on_end, self._progress = on_end, progress or (lambda stats: None)
        self._batch, self._threads, self._lockstep = batch, threads, lockstep
        self._make_env, self._workers, self._turn_seconds = make_env, workers, turn_seconds
        self._answers: SimpleQueue[_Answer | None] = SimpleQueue()  # None only wakes
        self._waiting: deque[Game] = deque()
        self._open: set[Game] = set()
        self._ready: deque[tuple[Game, SamplingParams]] = deque()
        self._flying: dict[int, Game] = {}
        self._stepping = 0
        self._serving = self._stopped = False
        self._engine_call = 0.0

    def play(self, games: Iterable[Game]) -> None:
        """Play these games to their end.

        Raises:
            EngrainError: the engine failed. What an env raises costs its episode only.
        """
        self._waiting.extend(games)
        self._run()

    def serve(self) -> None:
        """Play what is added, until `stop`. Raises as `play`."""
        self._serving = True
        self._run()

    def add(self, game: Game) -> None:
        """One more game, from any thread, while `serve` runs or before."""
        self._waiting.append(game)
        self._answers.put(None)

    def stop(self) -> None:
        """Let `serve` return when the games that it has are over; from any thread, before it runs too."""
        self._stopped = True
        self._answers.put(None)

    def _run(self) -> None:
        start, before = time.perf_counter(), self.stats.wall_seconds
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="env")
        try:
            while self._next():
                self._admit()
                if self._streaming is not None:
                    self._hear_now(self._streaming)
                    self._stream(self._streaming)
                else:
                    self._hear()
                    if self._ready:
                        self._generate()
                self.stats.wall_seconds = before + time.perf_counter() - start
                self._progress(self.stats)
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            if self._streaming is not None:
                self._streaming.cancel(list(self._flying))
            forget([game.env for game in self._open if isinstance(game.env, RemoteEnv)])
            raise
        self._pool.shutdown(wait=True)
        self.stats.wall_seconds = before + time.perf_counter() - start

    def _admit(self) -> None:
        """Start envs, as many as there is room for."""
        while self._waiting and len(self._open) < 2 * self._batch:
            game = self._waiting.popleft()
            self._open.add(game)
            self._call(game, None)

    def _next(self) -> bool:
        """Whether there is something to do; waits for it while serving."""
        while not self._waiting and not self._open:
            if not self._serving or self._stopped:
                return False
            self._answers.get()
        return True

    # -- envs -------------------------------------------------------------------------------------------------------

    def _call(self, game: Game, reply: str | None) -> None:
        """Have the env started, or stepped, elsewhere."""
        self._stepping += 1
        work = partial(self._work, game, reply)
        if game.env is None and self._isolated(game.task):
            game.env = RemoteEnv(game.task, self._turn_seconds, self.plan.episode_seconds)
        if isinstance(game.env, RemoteEnv):
            self._workers = self._workers or shared_workers()
            self._workers.submit(game.env, work)
        else:
            self._pool.submit(work)

    def _isolated(self, task: Task) -> bool:
        if self._make_env is not None or self._workers is not None:
            return self._make_env is None
        try:
            return registry.isolated(task)
        except EngrainError:  # is raised again, and kept, where the env is made
            return False

    def _work(self, game: Game, reply: str | None) -> None:
        """In another thread: start the game, or step it."""
        start = time.perf_counter()
        try:
            if reply is None:
                game.started_at, game.clock = datetime.now(UTC), start
                game.env = game.env or (self._make_env or registry.make)(game.task)
                observation = game.env.reset()
                game.system, game.max_turns = game.env.system, game.env.max_turns
                answer = _Answer(game, observation=observation)
            else:
                assert game.env is not None  # noqa: S101
                step = game.env.step(reply)
                game.score, game.success = game.env.score, game.env.success
                answer = _Answer(game, step=step, seconds=time.perf_counter() - start)
        except Exception as error:  # whatever an env raises costs its episode, not the run
            answer = _Answer(game, error=error)
        self._answers.put(answer)

    def _hear(self) -> None:
        """Take in what envs answered: wait for the first, then a moment for a fuller batch."""
        if self._lockstep:
            while self._stepping:
                self._take(self._answers.get())
            self._ready = deque(sorted(self._ready, key=lambda entry: entry[0].order))
            return
        low, high = _LINGER_BOUNDS
        deadline = None
        while self._stepping and len(self._ready) < self._batch:
            timeout = None
            if self._ready:
                deadline = deadline or time.perf_counter() + min(high, max(low, _LINGER * self._engine_call))
                timeout = max(0.0, deadline - time.perf_counter())
            try:
                self._take(self._answers.get(timeout=timeout))
            except Empty:
                return

    def _hear_now(self, engine: StreamingEngine) -> None:
        """Take in what envs have answered; wait only where the engine has nothing to do."""
        while self._stepping:
            try:
                self._take(self._answers.get(block=not self._ready and not self._flying))
            except Empty:
                break
        late = {number: game for number, game in self._flying.items() if game.overdue}
        engine.cancel(list(late))
        for number, game in late.items():
            del self._flying[number]
            self._finish(game, StopReason.ERROR, game.overdue)

    def _take(self, answer: _Answer | None) -> None:
        if answer is None:
            self._admit()
            return
        self._stepping -= 1
        game = answer.game
        if answer.error is not None:
            self._finish(game, StopReason.ERROR, describe(answer.error))
            return
        if answer.step is None:
            assert answer.observation is not None  # noqa: S101
            game.begin(answer.observation)
        elif reason := game.hear(answer.step, answer.seconds):
            self._finish(game, reason)
            return
        if overdue := game.overdue:
            self._finish(game, StopReason.ERROR, overdue)
            return
        request = game.request()
        if isinstance(request, str):
            self._finish(game, StopReason.LENGTH, request)
        else:
            self._ready.append((game, request))

    # -- the engine -------------------------------------------------------------------------------------------------

    def _generate(self) -> None:
        """One engine call for the games that are ready; their envs step while the next call is prepared."""
        taken = [self._ready.popleft() for _ in range(min(self._batch, len(self._ready)))]
        prompts = [game.prompt for game, _ in taken]
        start = time.perf_counter()
        results: list[Completion | EngrainError]
        try:
            results = [*self.engine.generate(prompts, [params for _, params in taken])]
        except _REFUSALS:
            results = [self._alone(game, params) for game, params in taken]
        self._engine_call = time.perf_counter() - start
        self.stats.engine_seconds += self._engine_call
        for (game, _), result in zip(taken, results, strict=True):
            self._sent(game)
            self._sampled(game, result)

    def _alone(self, game: Game, params: SamplingParams) -> Completion | EngrainError:
        """One request by itself, or why it is refused."""
        try:
            return self.engine.generate([game.prompt], [params])[0]
        except _REFUSALS as error:
            return error

    def _stream(self, engine: StreamingEngine) -> None:
        """Hand over what is ready, and take what is finished."""
        start = time.perf_counter()
        refused: list[tuple[Game, EngrainError]] = []
        while self._ready and len(self._flying) < self._batch:
            game, params = self._ready.popleft()
            self._sent(game)
            try:
                self._flying[engine.submit(game.prompt, params)] = game
            except _REFUSALS as error:
                refused.append((game, error))
        finished = engine.poll(_POLL_SECONDS if self._stepping else _IDLE_POLL_SECONDS) if self._flying else []
        self.stats.engine_seconds += time.perf_counter() - start
        for game, refusal in refused:
            self._sampled(game, refusal)
        for number, result in finished:
            if game_or_none := self._flying.pop(number, None):
                self._sampled(game_or_none, result)

    def _sent(self, game: Game) -> None:
        self.stats.requests += 1
        self.stats.prompt_tokens += len(game.prompt)
        if game.turns:
            self.stats.later_prompt_tokens += len(game.prompt)

    def _sampled(self, game: Game, result: Completion | EngrainError) -> None:
        """Hand a reply to its env."""
        if not isinstance(result, Completion):
            reason = StopReason.LENGTH if isinstance(result, ContextLengthError) else StopReason.ERROR
            self._finish(game, reason, describe(result))
            return
        self.stats.sampled_tokens += len(result.token_ids)
        self.stats.cached_tokens += result.cached_tokens
        if game.turns:
            self.stats.later_cached_tokens += result.cached_tokens
        reply = game.say(result)
        if overdue := game.overdue:
            self._finish(game, StopReason.ERROR, overdue)
        else:
            self._call(game, reply)

    def _finish(self, game: Game, reason: StopReason, error: str | None = None) -> None:
        episode = game.episode(reason, error)
        self._open.discard(game)
        if isinstance(game.env, RemoteEnv):
            game.env.close()
        elif game.env is not None:
            self._pool.submit(forget, [game.env])
        self.stats.episodes += 1
        self.stats.successes += episode.success
        self.stats.failed += reason is StopReason.ERROR
        self._on_end(game, episode)


def describe(error: BaseException) -> str:
    """An error as one line to store: Engrain's own as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EngrainError) else f"{type(error).__name__}: {text}"
