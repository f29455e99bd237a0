"""The server engine against servers that fail in every way we can think of."""

from __future__ import annotations

import gzip
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.engines import server_pool
from agent.engines.base import Completion, StreamingEngine
from agent.engines.server import ServerEngine
from agent.engines.server_wire import check_url, error_text
from agent.episode import FinishReason, SamplingParams, StopReason
from agent.errors import (
    CheckpointError,
    ContextLengthError,
    EngineFailedError,
    ServerFailedError,
    ServerRefusedError,
)
from agent.rollout import play
from envs.base import Env, Observation, Split, Step, Task
from tests.agent.fake_server import FakeServer, Fault

SAMPLING = SamplingParams(max_tokens=32, seed=5)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(server_pool, "_LONGEST_WAIT", 0.2)


@pytest.fixture
def serve(tiny_tokenizer: Any) -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def make(**options: Any) -> FakeServer:
        servers.append(FakeServer(tiny_tokenizer, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def connect(tiny_tokenizer: Any) -> Iterator[Callable[..., ServerEngine]]:
    engines: list[ServerEngine] = []

    def make(*servers: FakeServer | str, **options: Any) -> ServerEngine:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        engines.append(ServerEngine(urls, tiny_tokenizer, **{"name": "fake", "patience": 20.0, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def prompts_of(engine: ServerEngine, count: int) -> list[list[int]]:
    return [engine.renderer.tokenizer(f"say {n}", add_special_tokens=False)["input_ids"] for n in range(count)]


def adapter_folder(path: Path, content: bytes = b"weights") -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.005)


class Say(Env):
    """Listens for three turns; solved at the end."""

    system = "Talk."
    max_turns = 5
    turn = 0

    def reset(self) -> Observation:
        return Observation(f"start {self.task.seed}")

    def step(self, text: str) -> Step:
        self.turn += 1
        return Step(Observation(f"heard {text!r}"), 0.0, self.turn >= 3)

    @property
    def score(self) -> float:
        return float(self.turn >= 3)


def tasks_of(count: int) -> list[Task]:
    return [Task.create("say", Split.TRAIN, seed, {}) for seed in range(count)]


def test_ids_go_in_and_come_out_as_they_are(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    prompts = prompts_of(engine, 20)
    short = SamplingParams(temperature=0.7, top_p=0.9, top_k=3, max_tokens=4, seed=2**63 - 1)
    sampling = [short if n % 2 else SAMPLING for n in range(20)]
    for prompt, params, completion in zip(prompts, sampling, engine.generate(prompts, sampling), strict=True):
        ids, finish = server.sample(prompt, params.seed, params.max_tokens, "fake")
        assert completion.token_ids == tuple(ids)
        assert completion.logprobs == (-0.5,) * len(ids)
        assert completion.finish_reason == FinishReason(finish)
        assert completion.cached_tokens == len(prompt) // 2
        assert completion.exact
    assert engine.exact
    assert isinstance(engine, StreamingEngine)
    body = next(b for b in server.completions if b["max_tokens"] == 4)
    assert {k: body[k] for k in ("model", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "min_p")} == {
        "model": "fake",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 2**63 - 1,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
    }
    assert body["stop_token_ids"] == sorted(engine.renderer.stop_ids)


def late(answer: dict[str, Any]) -> None:
    answer["choices"][0]["finish_reason"] = "abort"


FAULTS: dict[str, Fault] = {
    "500": 500,
    "503": 503,
    "429": 429,
    "408": 408,
    "not JSON": b"<html>busy</html>",
    "cut JSON": b'{"choices": [{"tex',
    "hung up": "drop",
    "too slow": 1.5,
    "aborted": late,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_may_pass_is_tried_again(serve: Any, connect: Any, fault: Fault) -> None:
    server = serve()
    engine = connect(server, timeout=1.0 if isinstance(fault, float) else 60.0)
    server.faults = [fault, fault]
    start = time.monotonic()
    prompts = prompts_of(engine, 3)
    completions = engine.generate(prompts, [SAMPLING] * 3)
    assert [c.token_ids for c in completions] == [tuple(server.sample(p, 5, 32, "fake")[0]) for p in prompts]
    assert not server.faults
    assert len(server.completions) >= 5
    if fault == 429:
        assert time.monotonic() - start > 1.0  # as the server asked


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def apply(answer: dict[str, Any]) -> None:
        answer["choices"][0].update(fields)

    return apply


def shorten(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["token_logprobs"].pop()


def forget(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["token_logprobs"][0] = None


def double(answer: dict[str, Any]) -> None:
    answer["choices"] *= 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (change(token_ids=[1, 2]), "2 token ids and 9 log-probabilities"),
        (change(token_ids=[*range(40)], logprobs={"token_logprobs": [0.0] * 40}), "for at most 32 tokens"),
        (change(token_ids=[]), "0 token ids"),
        (change(token_ids=["a"] * 9), "not numbers"),
        (change(token_ids=[-1] * 9), "not numbers"),
        (change(token_ids=None, logprobs=None), "no token ids"),
        (change(prompt_token_ids=[1, 2, 3]), "other prompt ids"),
        (change(logprobs=None), "no log-probabilities"),
        (change(finish_reason="error"), "finish_reason 'error'"),
        (shorten, "9 token ids and 8 log-probabilities"),
        (forget, "no log-probabilities"),
        (double, "not one completion"),
        (b"[]", "not one completion"),
    ],
)
def test_a_server_that_keeps_answering_nonsense_is_named(serve: Any, connect: Any, fault: Fault, said: str) -> None:
    server = serve()
    engine = connect(server)
    server.faults = [fault] * 50
    with pytest.raises(EngineFailedError) as caught:
        engine.generate(prompts_of(engine, 1), [SAMPLING])
    assert server.url in str(caught.value)
    assert said in str(caught.value)
    assert len(server.completions) == 5


def test_ids_are_read_where_older_servers_write_them(serve: Any, connect: Any) -> None:
    server = serve()
    answer = server.answer
    server.answer = lambda body: _without(answer(body), "token_ids", "prompt_token_ids")
    engine = connect(server)
    (prompt,) = prompts_of(engine, 1)
    (completion,) = engine.generate([prompt], [SAMPLING])
    assert completion.exact
    assert completion.token_ids == tuple(server.sample(prompt, 5, 32, "fake")[0])


def _without(answer: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        del answer["choices"][0][name]
    return answer


def test_waits_double_up_to_a_limit_and_follow_from_the_seed(serve: Any, connect: Any) -> None:
    def waits(seed: int) -> list[float]:
        server = serve()
        engine = connect(server, seed=seed)
        pool = engine._pool
        found = []
        for _ in range(6):
            pool._rest(pool.servers[0], OSError(), now=0.0)
            found.append(pool.servers[0].resting_until)
        return found

    one, again, other = waits(1), waits(1), waits(2)
    assert one == again != other
    for number, wait in enumerate(one):
        longest = min(0.2, 0.02 * 2**number)
        assert longest / 2 <= wait <= longest


def test_patience_ends_in_one_line_that_names_the_server(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, patience=0.5)
    server.stop()
    start = time.monotonic()
    with pytest.raises(ServerFailedError) as caught:
        engine.generate(prompts_of(engine, 100), [SAMPLING] * 100)
    assert 0.5 <= time.monotonic() - start < 60
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    server.start()  # nothing is broken for good
    assert len(engine.generate(prompts_of(engine, 3), [SAMPLING] * 3)) == 3


def test_a_request_that_only_itself_fails_is_told_from_a_dead_server(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, patience=0.3)
    good, bad = prompts_of(engine, 2)
    complete = server.complete
    server.complete = lambda http, body: (
        server.reply(http, 500, {"error": "boom"}) if body["prompt"] == bad else complete(http, body)
    )
    number = engine.submit(bad, SAMPLING)
    found: list[Any] = []
    while not found:
        engine.generate([good], [SAMPLING])
        found = engine.poll()
    ((name, error),) = found
    assert name == number
    assert isinstance(error, EngineFailedError)
    assert "boom" in str(error)


def test_a_killed_server_costs_nothing_that_was_played(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, in_flight=4)
    seen: list[str] = []

    def kill_and_restart() -> None:
        wait_for(lambda: len(seen) >= 5)
        server.stop()
        time.sleep(0.5)
        server.start()

    thread = threading.Thread(target=kill_and_restart, daemon=True)
    thread.start()
    episodes = play(
        tasks_of(20),
        engine,
        sampling=SAMPLING,
        namespace="test",
        make_env=Say,
        on_episode=lambda episode: seen.append(episode.id),
        batch=8,
    )
    thread.join()
    assert len(seen) == 20
    assert set(Counter(seen).values()) == {1}
    assert all(e.stop_reason is StopReason.DONE and e.exact and e.sampled for e in episodes)
    calm = play(tasks_of(20), engine, sampling=SAMPLING, namespace="test", make_env=Say)
    assert [e.token_ids for e in calm] == [e.token_ids for e in episodes]


def test_the_bound_on_requests_holds_and_is_reached(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, in_flight=7)
    server.gate.clear()
    for prompt in prompts_of(engine, 40):
        engine.submit(prompt, SAMPLING)
    wait_for(lambda: server.running == 7)
    time.sleep(0.2)
    assert len(server.completions) == 7
    server.gate.set()
    while engine.pending:
        engine.poll(5.0)
    assert len(server.completions) == 40


def test_work_goes_where_least_is_outstanding(serve: Any, connect: Any) -> None:
    slow, quick = serve(), serve()
    engine = connect(slow, quick, in_flight=4)
    slow.gate.clear()
    for prompt in prompts_of(engine, 60):
        engine.submit(prompt, SAMPLING)
    while engine.pending > 4:
        engine.poll(5.0)
    assert len(slow.completions) == 4
    assert len(quick.completions) == 56
    slow.gate.set()
    while engine.pending:
        engine.poll(5.0)
    assert len(slow.completions) == 4


def test_long_requests_count_for_more(serve: Any, connect: Any) -> None:
    one, two = serve(), serve()
    engine = connect(one, two)
    one.gate.clear()
    two.gate.clear()
    (prompt,) = prompts_of(engine, 1)
    for max_tokens in [1000] + [10] * 20:
        engine.submit(prompt, SamplingParams(max_tokens=max_tokens))
    wait_for(lambda: one.running + two.running == 21)
    busy, other = sorted((one, two), key=lambda server: server.running)
    assert [body["max_tokens"] for body in busy.completions] == [1000]
    assert other.running == 20
    one.gate.set()
    two.gate.set()


def test_the_next_turn_goes_where_the_last_one_is_cached(serve: Any, connect: Any) -> None:
    one, two = serve(), serve()
    engine = connect(one, two)
    prompts = prompts_of(engine, 8)
    replies = engine.generate(prompts, [SAMPLING] * 8)
    home = {body["prompt"][-1]: server for server in (one, two) for body in server.completions}
    assert len(one.completions) == len(two.completions) == 4
    for prompt, reply in zip(prompts, replies, strict=True):
        turn = [*prompt, *reply.token_ids, 1, 2]
        engine.generate([turn], [SAMPLING])
        assert turn in [body["prompt"] for body in home[prompt[-1]].completions]


def test_what_is_known_of_homes_is_bounded() -> None:
    one, two = server_pool.Server("one"), server_pool.Server("two")
    homes = server_pool.Homes(limit=2)
    homes.put([1, 2, 3], one)
    homes.put([1, 2, 3, 4], two)
    assert homes.find([1, 2, 3, 9]) is one
    assert homes.find([1, 2, 3, 4, 5]) is two
    assert homes.find([1, 2]) is homes.find([]) is None
    homes.put([7], one)
    assert homes.find([1, 2, 3, 9]) is None
    assert homes.find([7, 8]) is one


def test_a_dead_server_of_two_is_passed_over_and_comes_back(
    serve: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = serve(), serve()
    one.stop()
    engine = connect(one, two, in_flight=2)
    assert one.url in caplog.text
    prompts = prompts_of(engine, 30)
    assert len(engine.generate(prompts, [SAMPLING] * 30)) == 30
    assert len(two.completions) == 30
    one.start()
    while not one.completions:
        engine.generate(prompts, [SAMPLING] * 30)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://a/v1",
        "http://",
        "http://a:b/v1",
        "http://a:0/v1",
        "http://a:99999/v1",
        "http://a/v1?x=1",
        "http://[::1/v1",
        "http://a b/v1",
        "not a url",
    ],
)
def test_what_is_no_url_is_refused(connect: Any, url: str) -> None:
    with pytest.raises(ServerRefusedError, match="is no server URL"):
        connect(url)


def test_urls_keep_no_password_and_no_slash() -> None:
    with pytest.raises(ServerRefusedError) as caught:
        check_url("http://me:secret@host/v1")
    assert "secret" not in str(caught.value)
    assert check_url(" http://host:8000/v1/ ") == "http://host:8000/v1"


def test_servers_that_cannot_be_worked_with_are_refused_at_once(serve: Any, connect: Any, tiny_tokenizer: Any) -> None:
    def tokens(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["prompt_token_ids"] = answer["choices"][0]["prompt_token_ids"][::-1]
        return answer

    def tempered(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["logprobs"]["top_logprobs"] = [{"token_id:1": -0.5 / body["temperature"]}]
        return answer

    with pytest.raises(ServerRefusedError, match=r"serves another, not fake; .*--served-model-name fake"):
        connect(serve(model="another"))
    odd = serve()
    answer = odd.answer
    odd.answer = lambda body: tokens(answer(body))
    with pytest.raises(ServerRefusedError, match="other tokens"):
        connect(odd)
    odd.answer = lambda body: tempered(answer(body), body)
    with pytest.raises(ServerRefusedError, match="--logprobs-mode raw_logprobs"):
        connect(odd)
    with pytest.raises(ServerRefusedError, match=r"no list of models: Not Found .*usually ends in /v1"):
        connect(odd.url.removesuffix("/v1"))
    odd.answer = answer
    odd.handle = lambda http, body: odd.reply(http, 200, b"<html>hello</html>")
    with pytest.raises(ServerRefusedError, match="no list of models: the answer is not JSON"):
        connect(odd)
    odd.stop()
    with pytest.raises(ServerFailedError, match=r"no server answers at http://127.0.0.1"):
        connect(odd)
    assert not [t for t in threading.enumerate() if t.name == "servers"]


def test_a_server_may_know_the_model_by_its_folder(serve: Any, connect: Any) -> None:
    server = serve(model="org/Fake-1B")
    assert connect(server, name="short", aliases=["/cache/models/Fake-1B"]).generate([[1, 2]], [SAMPLING])
    assert server.completions[0]["model"] == "org/Fake-1B"


def test_the_key_is_sent_and_never_told(serve: Any, connect: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve()
    server.key = "s3cr3t-k3y"
    with pytest.raises(ServerRefusedError, match="ENGRAIN_API_KEY") as caught:
        connect(server, api_key="0th3r-k3y")
    engine = connect(server, api_key="s3cr3t-k3y")
    assert engine.generate(prompts_of(engine, 1), [SAMPLING])
    told = caplog.text + str(caught.value) + repr(vars(engine)) + repr(vars(engine._pool))
    assert "k3y" not in told


def test_settings_keep_the_key_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from engrain.settings import Settings

    monkeypatch.setenv("ENGRAIN_API_KEY", "s3cr3t")
    settings = Settings()
    assert settings.api_key.get_secret_value() == "s3cr3t"
    assert "s3cr3t" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


def test_an_adapter_is_loaded_everywhere_and_again_after_a_restart(serve: Any, connect: Any, tmp_path: Path) -> None:
    one, two = serve(), serve()
    engine = connect(one, two, in_flight=2)
    prompts = prompts_of(engine, 8)
    first, second = adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", b"trained further")
    (second / "manifest.json").write_text('{"id": "ck-2"}')
    engine.load(first)
    assert engine.checkpoint == "a"
    assert one.adapters == two.adapters
    ((name, path),) = one.adapters.items()
    assert path == str(first.resolve())
    (completion, *_) = engine.generate(prompts, [SAMPLING] * 8)
    assert completion.token_ids == tuple(one.sample(prompts[0], 5, 32, name)[0])
    engine.load(second)
    assert engine.checkpoint == "ck-2"
    assert list(one.adapters) == list(two.adapters) != [name]
    (name,) = one.adapters
    one.stop()
    two.stop()
    one.start()
    completions = engine.generate(prompts, [SAMPLING] * 8)
    assert [c.token_ids for c in completions] == [tuple(one.sample(p, 5, 32, name)[0]) for p in prompts]
    assert list(one.adapters) == [name]
    engine.load(None)
    assert engine.checkpoint is None
    assert not one.adapters
    assert engine.generate(prompts, [SAMPLING] * 8)[0].token_ids == tuple(one.sample(prompts[0], 5, 32, "fake")[0])


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(serve: Any, connect: Any, tmp_path: Path) -> None:
    server = serve()
    engine = connect(server)
    good, broken = adapter_folder(tmp_path / "good"), adapter_folder(tmp_path / "broken", b"huge")
    engine.load(good)
    with pytest.raises(CheckpointError, match=r"rank 64 is greater than max_lora_rank 16.*--max-lora-rank"):
        engine.load(broken)
    assert engine.checkpoint == "good"
    (prompt,) = prompts_of(engine, 1)
    (name,) = server.adapters
    assert engine.generate([prompt], [SAMPLING])[0].token_ids == tuple(server.sample(prompt, 5, 32, name)[0])
    with pytest.raises(CheckpointError, match="does not exist"):
        engine.load(tmp_path / "nowhere")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (whole / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="vllm serve"):
        engine.load(whole)
    server.lora = False
    with pytest.raises(CheckpointError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        engine.load(broken)
    server.gate.clear()
    engine.submit(prompt, SAMPLING)
    with pytest.raises(CheckpointError, match="1 requests are under way"):
        engine.load(None)
    server.gate.set()


def test_adapters_of_ours_leave_with_us(serve: Any, connect: Any, tmp_path: Path) -> None:
    server = serve()
    server.adapters["somebody-else"] = "/there"
    engine = connect(server)
    engine.load(adapter_folder(tmp_path / "a"))
    assert len(server.adapters) == 2
    engine.close()
    engine.close()
    assert list(server.adapters) == ["somebody-else"]


def test_what_a_text_server_says_is_played_but_not_trained_on(
    serve: Any, connect: Any, caplog: pytest.LogCaptureFixture, tiny_tokenizer: Any
) -> None:
    server = serve()
    server.text_only = True
    engine = connect(server)
    assert not engine.exact
    assert "not return token ids" in caplog.text
    (episode,) = play(tasks_of(1), engine, sampling=SAMPLING, namespace="test", make_env=Say)
    assert episode.success
    assert not episode.exact
    assert episode.sampled == 0
    assert len(episode.turns) == 3
    for turn in episode.turns:
        text = tiny_tokenizer.decode(list(episode.token_ids[turn.start : turn.end]))
        assert text == f"{turn.action}<|im_end|>"
    prompt = server.completions[2]["prompt"]
    assert prompt == tiny_tokenizer.decode(list(episode.token_ids[: episode.turns[2].start]))
    assert server.completions[0]["stop"] == ["<|im_end|>"]
    with pytest.raises(ServerRefusedError, match=f"{server.url} does not know top_k"):
        engine.generate([[1]], [SamplingParams(top_k=5)])


def test_restricted_replies_are_checked(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    prompt = [1, 2]
    said, *_ = (engine.renderer.decode(server.sample(prompt, 5, 32, "fake")[0]),)
    within = SAMPLING.model_copy(update={"choices": ("north", said, "north")})
    assert engine.renderer.decode(engine.generate([prompt], [within])[0].token_ids) == said
    assert server.completions[0]["structured_outputs"] == {"choice": ["north", said]}
    without = SAMPLING.model_copy(update={"choices": ("north", "south")})
    with pytest.raises(EngineFailedError, match="not one of those it was restricted to"):
        engine.generate([prompt], [without])  # the server ignores what it does not know


def test_streaming_returns_each_request_once(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, in_flight=8)
    prompts = prompts_of(engine, 30)
    server.gate.clear()
    numbers = {engine.submit(prompt, SAMPLING): prompt for prompt in prompts}
    assert engine.poll() == engine.poll(0.01) == []
    assert engine.pending == 30
    server.gate.set()
    found: dict[int, Completion] = {}
    while engine.pending:
        for number, completion in engine.poll(5.0):
            assert number not in found
            assert isinstance(completion, Completion)
            found[number] = completion
    assert {n: c.token_ids for n, c in found.items()} == {
        n: tuple(server.sample(p, 5, 32, "fake")[0]) for n, p in numbers.items()
    }
    start = time.monotonic()
    assert engine.poll(30.0) == []  # at once: nothing is under way
    assert time.monotonic() - start < 15.0


def test_requests_that_are_given_up_do_not_come_back(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    server.gate.clear()
    one, two, three = (engine.submit(prompt, SAMPLING) for prompt in prompts_of(engine, 3))
    engine.cancel([one, three, 999])
    assert engine.pending == 1
    server.gate.set()
    engine.generate(prompts_of(engine, 1), [SAMPLING])
    assert [number for number, _ in engine.poll(30.0)] == [two]
    assert engine.poll(0.1) == []


def test_a_dead_server_ends_polling(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server, patience=0.2)
    server.stop()
    for prompt in prompts_of(engine, 5):
        engine.submit(prompt, SAMPLING)
    with pytest.raises(ServerFailedError, match=server.url):
        engine.poll(20.0)


def test_what_does_not_fit_is_refused_before_it_is_sent(serve: Any, connect: Any) -> None:
    server, small = serve(), serve()
    small.max_model_len = 64
    engine = connect(server, small)
    assert engine.max_context == 64
    with pytest.raises(ContextLengthError, match="exceeds the 64 tokens"):
        engine.submit([1] * 40, SAMPLING)
    with pytest.raises(ContextLengthError, match="empty"):
        engine.generate([[]], [SAMPLING])
    assert not server.completions + small.completions
    server.max_model_len = None
    assert connect(server).max_context == 4096


def test_a_server_may_find_a_request_too_long(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    said = {"error": {"message": "This model's maximum context length is 16 tokens.", "code": 400}}
    server.complete = lambda http, body: server.reply(http, 400, said)
    engine.submit([1], SAMPLING)
    ((_, error),) = engine.poll(10.0)
    assert isinstance(error, ContextLengthError)
    assert "maximum context length is 16" in str(error)


def test_packed_answers_that_are_broken_are_tried_again(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    reply, left = server.reply, [gzip.compress(b"{}")[:-9]]

    def packed(http: Any, status: int, content: object) -> None:
        if not left:
            return reply(http, status, content)
        data = left.pop()
        http.send_response(200)
        http.send_header("Content-Encoding", "gzip")
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        http.wfile.write(b"\0" + data[1:])
        return None

    server.reply = packed
    assert len(engine.generate(prompts_of(engine, 1), [SAMPLING])) == 1


def test_errors_are_read_in_all_their_shapes() -> None:
    assert error_text(b'{"error": {"message": "no\\nway", "code": 1}}') == "no way"
    assert error_text(b'{"detail": "Not Found"}') == "Not Found"
    assert error_text(b'{"object": "error", "message": "old shape"}') == "old shape"
    assert error_text(b'{"strange": 1}') == "{'strange': 1}"
    assert error_text(b"\xff<html>") == "\ufffd<html>"
    assert error_text(b"x" * 1000) == "x" * 300 + " …"


def test_requests_that_die_together_are_one_failure(serve: Any, connect: Any) -> None:
    server = serve()
    engine = connect(server)
    server.gate.clear()
    for prompt in prompts_of(engine, 50):
        engine.submit(prompt, SAMPLING)
    wait_for(lambda: server.running == 50)
    (known,) = engine._pool.servers
    server_pool._FIRST_WAIT = 0.5  # time to look before the next try
    server.stop()
    wait_for(lambda: known.failures)
    time.sleep(0.1)
    assert known.failures == 1
    server.gate.set()
    server.start()
    while engine.pending:
        engine.poll(20.0)
    assert known.failures == 0
    assert len(server.completions) == 100
