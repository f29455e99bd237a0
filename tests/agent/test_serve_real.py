"""The server engine and a real vLLM server: the same tokens as here, adapters at run time, and a SIGKILL half-way.

Needs vLLM: on the PATH, or ENGRAIN_TEST_VLLM names the `vllm` of another environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.engines.server import ServerEngine
from agent.episode import FinishReason, Message, SamplingParams, StopReason
from agent.errors import CheckpointError, ServerRefusedError
from agent.rollout import play
from envs.base import Env, Observation, Split, Step, Task

VLLM = os.environ.get("ENGRAIN_TEST_VLLM") or shutil.which("vllm")

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(VLLM is None, reason="vLLM is not installed; ENGRAIN_TEST_VLLM may name its program"),
]

TEXTS = (
    "Name three colours.",
    "What is 17 + 25?",
    "Write one line about the sea.",
    "Translate 'good morning' into French.",
    "List the first five prime numbers.",
    "Why is the sky blue?",
)
CLEAR = 0.05  # nats between the two likeliest tokens; closer ones may change places by rounding
CLOSE = 0.02  # nats between two computations of one log-probability in float32


class Supervised:
    """`vllm serve`, started again whenever it dies."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.starts = 0
        self._folder, self._log = folder, log
        self._over = threading.Event()
        self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        # The module is what `vllm serve` runs; the CPU build's own `vllm` program does not find its version.
        command = [str(Path(str(VLLM)).parent / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self._folder), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", "smollm2-135m", "--dtype", "float32", "--max-model-len", "1024"]
        command += ["--enable-lora", "--max-lora-rank", "8", "--max-num-seqs", "16", "--enforce-eager"]
        command += ["--enable-prompt-tokens-details", "--no-enable-chunked-prefill"]
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONPATH": "",
        }
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True, cwd=self._log.parent
            )
        self.starts += 1

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            if self._process.poll() is not None:
                self._start()

    def kill(self) -> None:
        """SIGKILL to the server and everything it started."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    supervised = Supervised(smollm2, log)
    try:
        deadline = time.monotonic() + 900
        while True:
            try:
                socket.create_connection(("127.0.0.1", supervised.port), timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                assert supervised.starts == 1, log.read_text()[-3000:]
                time.sleep(1.0)
        yield supervised
    finally:
        supervised.close()


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def engine(server: Supervised, tokenizer: Any) -> Iterator[ServerEngine]:
    engine = ServerEngine([server.url], tokenizer, name="smollm2-135m", patience=900.0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random weights that changes what the model says."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    peft.save_pretrained(folder)
    return folder


def prompts_of(engine: ServerEngine) -> list[list[int]]:
    return [engine.renderer.prompt([Message(role="user", content=text)]) for text in TEXTS]


def scores(model: Any, prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities `[len(ids), vocabulary]` at every sampled position, from one forward pass."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.float().log_softmax(-1)


def assert_agrees(model: Any, engine: ServerEngine, sampling: SamplingParams) -> int:
    """Every sampled token has our log-probability, and greedy ones are our likeliest; the number compared."""
    prompts = prompts_of(engine)
    compared = 0
    for prompt, completion in zip(prompts, engine.generate(prompts, [sampling] * len(prompts)), strict=True):
        assert completion.exact
        logprobs_TV = scores(model, prompt, completion.token_ids)
        ids = torch.tensor(completion.token_ids)
        ours = logprobs_TV.gather(1, ids.unsqueeze(1)).squeeze(1)
        assert torch.tensor(completion.logprobs).sub(ours).abs().max() < CLOSE
        if sampling.temperature == 0:
            best, second = logprobs_TV.topk(2).values.unbind(-1)
            clear = best - second > CLEAR
            assert torch.equal(logprobs_TV.argmax(-1)[clear], ids[clear])
            compared += int(clear.sum())
        else:
            compared += len(ids)
        stopped = completion.token_ids[-1] in engine.renderer.stop_ids
        assert completion.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    return compared


GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def test_the_server_says_what_it_is(engine: ServerEngine, server: Supervised, tokenizer: Any) -> None:
    assert engine.exact
    assert engine.max_context == 1024
    with pytest.raises(ServerRefusedError, match="serves smollm2-135m, not qwen"):
        ServerEngine([server.url], tokenizer, name="qwen")
    with pytest.raises(ServerRefusedError, match="usually ends in /v1"):
        ServerEngine([server.url.removesuffix("/v1")], tokenizer, name="smollm2-135m")


def test_greedy_tokens_and_log_probabilities_are_ours(engine: ServerEngine, model: Any) -> None:
    assert assert_agrees(model, engine, GREEDY) > 80


def test_log_probabilities_are_those_of_the_untempered_model(engine: ServerEngine, model: Any) -> None:
    sampling = SamplingParams(temperature=0.6, top_p=0.9, top_k=40, max_tokens=24, seed=2**63 - 1)
    assert assert_agrees(model, engine, sampling) > 80
    prompts = prompts_of(engine)
    again = [engine.generate([prompt], [sampling])[0].token_ids for prompt in prompts[:2]]
    assert again == [engine.generate([prompt], [sampling])[0].token_ids for prompt in prompts[:2]]


def test_seeded_prompts_of_more_tokens_than_one_pass_takes(engine: ServerEngine) -> None:
    texts = (f"{number} and then " * 130 for number in range(6))
    prompts = [engine.renderer.prompt([Message(role="user", content=text)]) for text in texts]
    assert sum(map(len, prompts)) > 2500  # vLLM's own limit of a pass is 2048 tokens
    completions = engine.generate(prompts, [SamplingParams(max_tokens=2, seed=seed) for seed in range(6)])
    assert all(completion.token_ids for completion in completions)


def test_a_second_turn_finds_its_first_in_the_cache(engine: ServerEngine) -> None:
    prompt = engine.renderer.prompt([Message(role="user", content="Count. " * 60)])
    (first,) = engine.generate([prompt], [GREEDY])
    (second,) = engine.generate([[*prompt, *first.token_ids, *prompt[-20:]]], [GREEDY])
    assert second.cached_tokens >= len(prompt) * 0.7


def test_replies_can_be_restricted(engine: ServerEngine) -> None:
    choices = ("open the fridge", "take the red apple", "go north")
    prompts = prompts_of(engine)
    params = [SamplingParams(max_tokens=16, seed=n, choices=choices) for n in range(len(prompts))]
    for completion in engine.generate(prompts, params):
        assert engine.renderer.decode(completion.token_ids) in choices
        assert completion.finish_reason is FinishReason.STOP


def test_adapters_come_and_go_while_it_runs(engine: ServerEngine, model: Any, adapter: Path, smollm2: Path) -> None:
    bare = [c.token_ids for c in engine.generate(prompts_of(engine), [GREEDY] * len(TEXTS))]
    engine.load(adapter)
    assert engine.checkpoint == "trained"
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert assert_agrees(tuned, engine, GREEDY) > 20
    assert [c.token_ids for c in engine.generate(prompts_of(engine), [GREEDY] * len(TEXTS))] != bare
    with pytest.raises(CheckpointError, match="does not exist"):
        engine.load(adapter / "nowhere")
    wide = adapter.parent / "wide"
    if not wide.exists():
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
            LoraConfig(r=64, target_modules=["q_proj"]),
        ).save_pretrained(wide)
    with pytest.raises(CheckpointError, match=r"(?i)rank.*--max-lora-rank"):
        engine.load(wide)
    assert assert_agrees(tuned, engine, GREEDY) > 20
    engine.load(None)
    assert assert_agrees(model, engine, GREEDY) > 80


class Talk(Env):
    """Says a line a turn for three turns."""

    system = "Answer in one short sentence."
    max_turns = 3
    turn = 0

    def reset(self) -> Observation:
        return Observation(TEXTS[self.task.seed % len(TEXTS)])

    def step(self, text: str) -> Step:
        self.turn += 1
        return Step(Observation("Say it in other words."), 0.0, self.turn >= 3)

    @property
    def score(self) -> float:
        return float(self.turn >= 3)


def test_a_killed_server_costs_no_episode(engine: ServerEngine, server: Supervised, adapter: Path, model: Any) -> None:
    """SIGKILL half-way, with an adapter loaded: a supervisor starts the server anew, and the play goes on."""
    engine.load(adapter)
    tasks = [Task.create("talk", Split.TRAIN, seed, {}) for seed in range(24)]
    seen: list[str] = []
    before = server.starts

    def kill() -> None:
        while len(seen) < 6:
            time.sleep(0.05)
        server.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    episodes = play(
        tasks,
        engine,
        sampling=SamplingParams(temperature=0.7, max_tokens=16),
        namespace="kill",
        make_env=Talk,
        batch=6,
        on_episode=lambda episode: seen.append(episode.id),
    )
    killer.join()
    assert server.starts == before + 1
    assert Counter(seen) == Counter(episode.id for episode in episodes)
    assert [episode.task for episode in episodes] == tasks
    assert set(Counter(seen).values()) == {1}
    for episode in episodes:
        assert episode.stop_reason in (StopReason.DONE, StopReason.MAX_TURNS), episode.error
        assert len(episode.turns) == 3
        assert episode.exact
        assert episode.checkpoint == "trained"
    # What was sampled after the restart came from the adapter, too.
    base = PeftModel.from_pretrained(model, str(adapter)).eval()
    for episode in episodes[-3:]:
        ids, start = episode.token_ids, episode.turns[0].start
        ours = scores(base, list(ids[:start]), ids[start:]).gather(1, torch.tensor(ids[start:]).unsqueeze(1)).squeeze(1)
        mask = torch.tensor(episode.loss_mask[start:])
        assert torch.tensor(episode.logprobs[start:])[mask].sub(ours[mask]).abs().max() < CLOSE
    base.unload()
