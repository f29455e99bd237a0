"""Adapters beside the base weights, in a process of its own that ends without closing its engine: one start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("vllm", exc_type=(ImportError, RuntimeError))

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from agent.engines.transformers import TransformersEngine
from agent.engines.vllm import VllmEngine
from agent.episode import Message, SamplingParams
from agent.errors import CheckpointError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model, out = Path(sys.argv[1]), Path(sys.argv[2])
def adapter(name, seed, rank=4):
    torch.manual_seed(seed)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for key, parameter in network.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(out / name)
    return out / name

engine = VllmEngine(
    model, name="m", dtype="float32", max_context=512, max_batch=4, cache_bytes=2**27, adapters="beside", lora_rank=8
)
prompt = engine.renderer.prompt([Message(role="user", content="Name a colour.")])
greedy = SamplingParams(temperature=0.0, max_tokens=8)
said = {}
def say(name, folder):
    engine.load(folder)
    completion = engine.generate([prompt], [greedy])[0]
    said[name] = [completion.token_ids, completion.logprobs]
say("base", None)
one, two = adapter("one", 1), adapter("two", 2)
say("one", one)
say("two", two)
say("one again", one)
say("base again", None)
adapter("one", 3)
say("another in one's folder", one)
try:
    engine.load(adapter("wide", 4, rank=16))
except CheckpointError as error:
    said["wide"] = str(error)
say("base at last", None)
reference = TransformersEngine(model, name="m", dtype="float32")
for name, folder in (("base", None), ("two", two), ("another in one's folder", one)):
    reference.load(folder)
    completion = reference.generate([prompt], [greedy])[0]
    said[f"transformers: {name}"] = [completion.token_ids, completion.logprobs]
(out / "said.json").write_text(json.dumps(said))
"""


def test_adapters_come_and_go_beside_the_weights(smollm2: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(smollm2), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate(timeout=1100)
    assert process.returncode == 0, errors[-3000:]
    left = [p.pid for p in psutil.process_iter() if _session(p.pid) == process.pid]
    assert left == []  # it ended without closing its engine, and nothing is left of it
    said = json.loads((tmp_path / "said.json").read_text())
    for name, again in (("base", "base again"), ("base", "base at last"), ("one", "one again")):
        assert said[name][0] == said[again][0]
        assert said[name][1] == pytest.approx(said[again][1], abs=1e-3)
    firsts = [said[name][1][0] for name in ("base", "one", "two", "another in one's folder")]
    assert min(abs(a - b) for a, b in combinations(firsts, 2)) > 0.01
    for name in ("base", "two", "another in one's folder"):
        ids, logprobs = said[f"transformers: {name}"]
        assert said[name][0] == ids
        assert said[name][1] == pytest.approx(logprobs, abs=5e-3)
    assert "rank" in said["wide"]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1
