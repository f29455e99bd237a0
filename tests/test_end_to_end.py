"""The real thing: SmolLM2-135M plays TextWorld, takes two OPCD steps, is killed, and goes on to the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoint import read_manifest

pytestmark = pytest.mark.model

#: Plays and trains in a process of its own, so that it can be killed for real.
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from agent.engines.transformers import TransformersEngine
    from agent.episode import SamplingParams
    from distill.config import DistillConfig, LoraSettings
    from engrain.consolidate import consolidate
    from envs import registry
    from envs.base import Split
    from memory.records import Knowledge
    from memory.render import render_knowledge
    from memory.store import Store

    model, folder, store, after = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    text = render_knowledge(["Take the ingredient that the cookbook names, then prepare and eat the meal."])
    tasks = registry.world("textworld", {"game": "coin_collector", "level": 1, "max_turns": 1}).tasks(
        Split.TRAIN, 2, 0
    )
    engine = TransformersEngine(model, name="smollm2-135m", device="cpu")
    before = {k: v.clone() for k, v in engine.network.state_dict().items()}
    config = DistillConfig(
        steps=2, batch_size=2, learning_rate=1e-3, save_every=1, micro_batch_tokens=1500,
        lora=LoraSettings(rank=4), sampling=SamplingParams(temperature=1.0, max_tokens=8),
    )
    def step(metrics):
        print(f"step {metrics.step}", flush=True)
        if metrics.step == int(after):  # stand still here, so that the test can kill us before the checkpoint
            import time; time.sleep(600)
    with Store.open(store) as book:
        knowledge = Knowledge(id="k", items=(), text=text, tokens=0)
        fit = consolidate(
            engine, tasks, knowledge, config, folder, on_step=step,
            on_episode=lambda episode: book.add_episodes([episode], stage="train"),
        )
    now = engine.network.state_dict()
    print(json.dumps({
        "history": [m.model_dump() for m in fit.history],
        "last": str(fit.last),
        "base_unchanged": all((now[k] == v).all().item() for k, v in before.items()) and len(now) == len(before),
    }))
    """
)


def start(smollm2: Path, folder: Path, home: Path, after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(smollm2), str(folder), str(folder.with_suffix(".db")), str(after)]
    environment = {**os.environ, "ENGRAIN_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def test_two_real_steps_survive_a_kill_and_touch_only_the_adapter(smollm2: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    unbroken = finish(start(smollm2, tmp_path / "whole", home))
    assert [m["step"] for m in unbroken["history"]] == [1, 2]
    for metrics in unbroken["history"]:
        assert math.isfinite(metrics["loss"])
        assert metrics["loss"] > 0
        assert metrics["sequences"] == 2
    assert unbroken["base_unchanged"]

    killed = start(smollm2, tmp_path / "cut", home, after=2)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("step 2"):
            break
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert sorted(p.name for p in (tmp_path / "cut").glob("step-*")) == ["step-000001"]
    resumed = finish(start(smollm2, tmp_path / "cut", home))

    whole, again = Path(unbroken["last"]), Path(resumed["last"])
    assert read_manifest(whole).id == read_manifest(again).id
    ours, theirs = load_file(whole / "adapter_model.safetensors"), load_file(again / "adapter_model.safetensors")
    assert all("lora_" in name for name in ours)
    assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "lora_B" in name)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {p.suffix for p in whole.iterdir()} == {".json", ".safetensors"}


def test_the_sampled_ids_are_the_trained_ids(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.engines.transformers import TransformersEngine
    from agent.episode import SamplingParams
    from distill.source import make_sample
    from distill.trainer import pack
    from engrain.evaluate import play_stored
    from envs import registry
    from envs.base import Split
    from memory.store import Store

    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / "home"))
    engine = TransformersEngine(smollm2, name="smollm2-135m")
    sampled: list[tuple[int, ...]] = []
    generate = engine.generate

    def spy(prompts, sampling):
        completions = generate(prompts, sampling)
        sampled.extend(completion.token_ids for completion in completions)
        return completions

    monkeypatch.setattr(engine, "generate", spy)
    tasks = registry.world("textworld", {"max_turns": 3}).tasks(Split.TRAIN, 1, 0)
    with Store.open(str(tmp_path / "book.db")) as store:
        settings = {"sampling": SamplingParams(max_tokens=8), "namespace": "x", "stage": "train"}
        (played,) = play_stored(store, tasks, engine, **settings)
        (stored,) = play_stored(store, tasks, engine, **settings)
    assert stored == store_round_trip(played)
    sample = make_sample(stored, engine.renderer, "- Eat the meal.", engine.max_context)
    packed = pack([sample.student_prompt], [sample])
    assert tuple(packed.target_R.tolist()) == tuple(token for ids in sampled for token in ids)
    assert len(stored.turns) == len(sampled)
    engine.close()


def store_round_trip(episode):
    """Log-probabilities are kept in float32."""
    exact = [torch.tensor(x, dtype=torch.float32).item() for x in episode.logprobs]
    return episode.model_copy(update={"logprobs": tuple(exact)})
