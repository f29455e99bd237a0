"""`engrain improve` under `accelerate launch`: a round on two processes ends as on one, and both sample all along.

This file is also the script that is launched: the real command line, and a count of what each process was asked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engrain.config import ImproveConfig
from memory.render import render_knowledge
from tests.engrain import mimic
from tests.launching import begin, launch

STEPS = 4


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any
) -> tuple[Path, dict[str, str]]:
    """A folder with a round's settings, and the environment in which its world is found."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_model(initializer_range=0.2).save_pretrained(folder / "tiny")
    tiny_tokenizer.save_pretrained(folder / "tiny")
    environment = mimic.install(folder, folder / "tiny")
    (folder / "knowledge.txt").write_text(render_knowledge([mimic.ITEM]))
    settings = mimic.settings(folder / "tiny", STEPS) | {"knowledge": str(folder / "knowledge.txt")}
    settings["evaluation"]["looks"] = 1
    config = ImproveConfig.model_validate(settings)
    (folder / "config.json").write_text(config.model_dump_json())
    return folder, environment


def arguments(folder: Path, home: Path) -> list[str]:
    return [__file__, str(home), "improve", "--config", str(folder / "config.json"), "--json"]


def prompts(home: Path) -> list[int]:
    """How many prompts each process was asked."""
    return [int(file.read_text()) for file in sorted(home.glob("prompts-*"))]


def test_a_round_on_two_processes_ends_as_on_one(bench: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, environment = bench
    alone, home = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, *arguments(folder, alone)]
    one = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    two = launch("fsdp2", *arguments(folder, home), environment=environment)
    assert two.returncode == 0, two.stderr[-4000:]

    theirs, ours = json.loads(one.stdout), json.loads(two.stdout)
    assert ours["in_context"]["accuracy"] == 1.0
    own = {"seconds", "checkpoint"}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert ours["validation"].keys() == {"0", "2", "4"}
    (whole,) = prompts(alone)
    halves = prompts(home)
    assert sum(halves) == whole  # nothing is sampled twice
    assert abs(halves[0] - halves[1]) <= whole // 10


def test_ctrl_c_leaves_as_it_does_alone(bench: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, environment = bench
    settings = json.loads((folder / "config.json").read_text())
    settings["distill"] |= {"steps": 10_000, "save_every": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    home = tmp_path / "home"
    command = arguments(tmp_path, home)
    with begin("ddp", *command, environment=environment, start_new_session=True) as process:
        try:
            while not list((home / "runs").glob("*/step-*")):  # it trains
                time.sleep(0.1)
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "stopped: interrupted; run the same command again to go on" in err
    assert "[rank" not in err  # what torch puts before a process's traceback


if __name__ == "__main__":
    os.environ["ENGRAIN_HOME"] = sys.argv[1]
    from agent.engines.transformers import TransformersEngine
    from engrain.cli import main

    asked, generate = [0], TransformersEngine.generate

    def counted(self: TransformersEngine, given: Any, sampling: Any) -> Any:
        asked[0] += len(given)
        return generate(self, given, sampling)

    TransformersEngine.generate = counted  # type: ignore[method-assign]
    sys.argv = ["engrain", *sys.argv[2:]]
    try:
        main()
    finally:
        home = Path(os.environ["ENGRAIN_HOME"])
        home.mkdir(exist_ok=True)
        (home / f"prompts-{os.environ.get('RANK', 0)}").write_text(str(asked[0]))
