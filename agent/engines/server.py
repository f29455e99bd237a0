"""An engine on other machines: any OpenAI-compatible server, or several of the same model; `vllm serve` for one.

Requests run in an event loop in a thread of its own, so that hundreds may be under way while the caller plays.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from agent.constraint import Restriction
from agent.engines.base import Completion, check_length
from agent.engines.folders import check_folder, identity, is_adapter
from agent.engines.server_client import RejectedError
from agent.engines.server_pool import Adapter, ServerPool
from agent.engines.server_wire import Wire, check_url
from agent.episode import SamplingParams
from agent.errors import CheckpointError, ServerFailedError, ServerRefusedError
from agent.renderer import Renderer
from envs.errors import EngrainError

T = TypeVar("T")

_FALLBACK_CONTEXT = 4096


class ServerEngine:
    """Samples from servers. See `agent.engines.base.StreamingEngine` for the contract.

    A server that dies is waited for: its requests are sent again, to another server or to the same one when it is
    back. A checkpoint is loaded on vLLM at run time; a server that comes back without it gets it again.

    Args:
        urls: base URLs, such as `http://127.0.0.1:8000/v1`; requests go where the least work is outstanding.
        tokenizer: the served model's own.
        name: the base model's name as the user gave it.
        aliases: other names or paths under which a server may list that model.
        api_key: sent to every server; never logged.
        in_flight: the most requests under way on one server.
        timeout: seconds one completion may take before it is asked for again.
        patience: seconds that a failed request is tried again.
        seed: of the jitter in waiting times.

    Raises:
        ServerRefusedError: a URL is none, or its server serves another model, reads text as other token ids, reports
            tempered log-probabilities, or wants a key.
        ServerFailedError: no server can be reached.
        ChatTemplateError: the tokenizer has no usable chat template.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Any,
        *,
        name: str,
        aliases: Sequence[str] = (),
        api_key: str = "",
        in_flight: int = 64,
        timeout: float = 600.0,
        patience: float = 300.0,
        seed: int = 0,
    ) -> None:
        self.model = name
        self.checkpoint: str | None = None
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self._wire = Wire(self.renderer)
        checked = list(dict.fromkeys(map(check_url, urls)))
        if not checked:
            raise ServerRefusedError("no server URL was given; give for instance http://127.0.0.1:8000/v1")
        self._numbers = 0
        self._running: dict[int, concurrent.futures.Future[Completion]] = {}
        self._finished: SimpleQueue[int] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        try:
            self._pool = self._wait(
                _opened(
                    checked,
                    name=name,
                    aliases=aliases,
                    wire=self._wire,
                    api_key=api_key,
                    in_flight=in_flight,
                    timeout=timeout,
                    patience=patience,
                    seed=seed,
                )
            )
        except BaseException:
            self._stop()
            raise

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens: the shortest that a server reports, else the tokenizer's."""
        known = [server.max_context for server in self._pool.servers if server.max_context]
        length = int(self.tokenizer.model_max_length)  # a huge number stands for none
        return min(known, default=length if length < 10_000_000 else _FALLBACK_CONTEXT)

    @property
    def exact(self) -> bool:
        """Whether all servers met so far take and give token ids."""
        return all(server.dialect.exact for server in self._pool.servers if server.dialect)

    @property
    def pending(self) -> int:
        """Requests submitted whose results `poll` has not returned yet."""
        return len(self._running)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            ContextLengthError: a prompt plus its max_tokens exceeds max_context.
            ConstraintError: a prompt's choices cannot be written with the model's tokens.
            ServerFailedError: no server answered for `patience` seconds.
            EngrainError: one of the requests failed; the others are given up.
        """
        for prompt, params in zip(prompts, sampling, strict=True):
            self._check(prompt, params)
        futures = [self._start(self._pool.complete(p, s)) for p, s in zip(prompts, sampling, strict=True)]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> int:
        """Send one more request without waiting for it; the number that `poll` will name it by.

        Raises:
            ContextLengthError: the prompt plus its max_tokens exceeds max_context.
            ConstraintError: the choices cannot be written with the model's tokens.
        """
        self._check(prompt, sampling)
        self._numbers += 1
        number = self._numbers
        future = self._start(self._pool.complete(list(prompt), sampling))
        self._running[number] = future
        future.add_done_callback(lambda _: self._finished.put(number))
        return number

    def poll(self, timeout: float = 0.0) -> list[tuple[int, Completion | EngrainError]]:
        """Everything that has finished; waits up to `timeout` seconds for the first.

        Raises:
            ServerFailedError: no server answered for `patience` seconds.
            ServerRefusedError: a server serves another model by now, or wants another key.
        """
        done: list[tuple[int, Completion | EngrainError]] = []
        deadline = time.perf_counter() + timeout
        while self._running:
            left = 0.0 if done else max(0.0, deadline - time.perf_counter())
            try:
                number = self._finished.get(timeout=left) if left else self._finished.get_nowait()
            except Empty:
                break
            future = self._running.pop(number, None)
            if future is None:  # was given up
                continue
            error = future.exception()
            if error is None:
                done.append((number, future.result()))
            elif isinstance(error, EngrainError) and not isinstance(error, ServerFailedError | ServerRefusedError):
                done.append((number, error))
            else:
                raise error
        return done

    def cancel(self, requests: Sequence[int]) -> None:
        """Give requests up; the server stops working on them. Finished and unknown ones are ignored."""
        for number in requests:
            future = self._running.pop(number, None)
            if future is not None:
                future.cancel()

    def load(self, checkpoint: Path | None) -> None:
        """Sample from this LoRA checkpoint from now on; None is the base model.

        Every server must see the folder under the same path.

        Raises:
            CheckpointError: the folder is no LoRA adapter, a server cannot load it, or requests are under way.
            ServerFailedError: no server answered for `patience` seconds.
        """
        if self._running:
            raise CheckpointError(f"{self.pending} requests are under way; a checkpoint is loaded between requests")
        adapter = None
        if checkpoint is not None:
            check_folder(checkpoint)
            if not is_adapter(checkpoint):
                raise CheckpointError(
                    f"{checkpoint} holds full weights, which a running server cannot load; "
                    f"start one with `vllm serve {checkpoint}`"
                )
            adapter = Adapter(_fingerprint(checkpoint), checkpoint.resolve())
        try:
            self._wait(self._pool.use(adapter))
        except RejectedError as error:
            raise CheckpointError(
                f"a server cannot load checkpoint {checkpoint}: {error}. It must see that path, and vLLM must run with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank not below the adapter's"
            ) from error
        self.checkpoint = identity(checkpoint) if checkpoint else None

    def close(self) -> None:
        """Give up what is under way, unload our adapters from the servers, and end the thread."""
        if self._loop.is_closed():
            return
        self.cancel(list(self._running))
        self._wait(self._pool.close())
        self._stop()

    def _check(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        check_length(self, prompt, sampling.max_tokens)
        if sampling.choices:
            Restriction(self._wire.vocabulary, sampling.choices)

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        self._wait(_cancelled())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancelled() -> None:
    """Cancel whatever still runs in this loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _opened(urls: Sequence[str], **options: Any) -> ServerPool:
    pool = ServerPool(urls, **options)
    try:
        await pool.open()
    except BaseException:
        await pool.close()
        raise
    return pool


def _fingerprint(folder: Path) -> str:
    """A name for an adapter that follows from its content: the same on all servers, another one after training."""
    digest = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    for file in sorted(folder.glob("adapter_model*.safetensors")):
        digest.update(file.read_bytes())
    return f"engrain-{digest.hexdigest()[:16]}"
