"""What the evidence is measured with: instructions that code checks, a world behind a written prompt, an objective."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.objective import forward_kl, reverse_kl
from distill.registered import OBJECTIVES
from envs import registry
from envs.base import Split
from envs.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Any:
    """The modules of `benchmarks/`, which import each other by name; what they register goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.WORLDS, "_here", {})
        patch.setattr(OBJECTIVES, "_here", {})
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import evidence_worlds

        yield evidence_worlds
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


#: For each kind of instruction, by a word of its prompt's beginning: a reply that obeys, and one that does not.
REPLIES = (
    ("Blue salty water.", "Blue and salty water."),
    ("Cats sleep all day.", "Cats sleep all day and they also sleep all night."),
    ("Red", "A red one"),
    ("A lantern hung there.", "A lamp hung there."),
    ("Dogs bark.", "Dogs laze."),
    ("IT RAINS.", "It RAINS."),
    ("it blows.", "It blows."),
    ("- leek\n- carrot\n- pea", "- leek\n- carrot"),
    ("1. Oak\n2. Elm\n3. Ash", "1. Oak\n3. Elm\n2. Ash"),
    ("Yes.", "Yes, it is."),
    ("Harbour.", "Harbour it is."),
    ("The boat left at noon.", "The boat left at night."),
    ("We went, and so it goes.", "And so it goes, we said."),
    ("Slowly it comes.", "It comes slowly."),
    ('```json\n{"name": "A", "age": 3}\n```', '{"name": "A"}'),
    ('"It takes heart."', 'It takes "heart".'),
    ("They run. They eat.", "They run."),
    ("It is long and old.", "It is long, and old."),
    ("[[Home Again]]", "[Home Again]"),
    ("1, 2, 3, 4, 5", "1, 2, 3, 5"),
    ("drum drum drum", "drum drum"),
    ("It is deep.\n***\nIt is cold.", "It is deep.\n\nIt is cold."),
    ("What is beyond it?", "Space is big. What is beyond it?"),
    ("We danced! We sang! We ate!", "We danced! We sang!"),
    ("We left.\nP.S. Write soon.", "We left. P.S. Write soon."),
)


def test_a_hundred_instructions_each_obeyed_and_disobeyed(bench: Any) -> None:
    tasks = registry.world("instructions").tasks(Split.TEST, 100)
    assert len({task.parameters["prompt"] for task in tasks}) == 100
    assert len(REPLIES) == len(bench.instructions.KINDS)
    for task, replies in zip(tasks, REPLIES, strict=False):
        for reply, kept in zip(replies, (True, False), strict=True):
            env = registry.make(task)
            env.reset()
            assert env.step(reply).done
            assert env.success is kept, (task.parameters["prompt"], reply)
    for task in tasks:  # no check stumbles over anything
        for reply in ("", " \n", "…", "{", "x" * 10_000, "***", "1,2,3"):
            env = registry.make(task)
            assert env.step(reply).reward in (0.0, 1.0)
    with pytest.raises(UsageError, match="100 tasks"):
        registry.world("instructions").tasks(Split.TEST, 101)


def test_messages_of_one_split_are_of_no_other_splits_kind(bench: Any) -> None:
    world = registry.world("helpdesk")
    seen = {split: world.tasks(split, 128, 3) for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)}
    assert [t.id for t in world.tasks(Split.TEST, 128, 3)] == [t.id for t in seen[Split.TEST]]
    texts = [task.parameters["message"] for tasks in seen.values() for task in tasks]
    assert len(set(texts)) == 3 * 128
    for task in seen[Split.TEST]:
        label = task.parameters["label"]
        assert label in bench.helpdesk.PROMPT
        assert task.parameters["message"] not in bench.helpdesk.PROMPT
        for reply, right in ((label, True), (f"{label}.", True), (f"It is {label}", False), (label.lower(), False)):
            env = registry.make(task)
            env.step(reply)
            assert env.success is right


def test_the_crossing_objective_is_forward_kl_far_away_and_reverse_kl_near(bench: Any) -> None:
    near = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1), torch.tensor([[1.8, 1.2, 0.0]]).log_softmax(-1)
    far = torch.tensor([[9.0, 0.0, 0.0]]).log_softmax(-1), torch.tensor([[0.0, 9.0, 0.0]]).log_softmax(-1)
    both = tuple(torch.cat(pair) for pair in zip(near, far, strict=True))
    d_P, g_PV = bench.crossing(*both)
    for place, (one, single) in enumerate(((near, reverse_kl), (far, forward_kl))):
        d, g = single(*one)
        torch.testing.assert_close(d_P[place : place + 1], d)
        torch.testing.assert_close(g_PV[place : place + 1], g)


def test_every_arm_has_valid_settings_on_every_world(bench: Any) -> None:
    from distill.config import DistillConfig

    for place in bench.WORLDS:
        config = bench.settings_of(place, 1)
        assert config.evaluation.test_tasks == 128
        for name in bench.arms_of(place):
            arm = bench.ARMS[name]
            if arm.distill is not None:
                made = DistillConfig.model_validate({**config.distill.model_dump(), **arm.distill})
                assert (made.steps, made.batch_size) == (12, 16)  # one budget for all
    assert "opcd-unfiltered" not in bench.arms_of("helpdesk")


def test_one_arm_samples_as_many_tokens_as_off_policy_did(bench: Any, tmp_path: Path) -> None:
    import evidence

    made = evidence.Bench("sums", 3, "model", "coach", tmp_path, tmp_path, None)
    payer = bench.ARMS["opcd-tokens"].tokens_of
    with pytest.raises(UsageError, match="sums, seed 3: off_policy says how many tokens to sample; run it first"):
        made._tokens_of(payer)
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "off_policy-3.json").write_text(json.dumps({"sampled_tokens": 520}))
    assert made._tokens_of(payer) == 520


def test_what_was_measured_before_a_cut_is_not_measured_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evidence

    made = evidence.Bench("sums", 3, "model", "coach", tmp_path, tmp_path, None)
    made.engine = SimpleNamespace(checkpoint=None)
    made.tasks = SimpleNamespace(test=[SimpleNamespace(parameters={})] * 40, ood={"plain": ["a", "b"], "other": ["c"]})
    won = SimpleNamespace(success=True, stop_reason=None)
    made.work.mkdir()
    played: list[tuple[int, str | None]] = []

    def play(tasks: list[Any], text: str | None, sampling: Any) -> list[Any]:
        played.append((len(tasks), text))
        if len(played) == 3:
            raise KeyboardInterrupt
        return [won] * len(tasks)

    monkeypatch.setattr(made, "_play", play)
    monkeypatch.setattr(evidence, "monitored", lambda episodes, engine: {"n": len(episodes)})
    with pytest.raises(KeyboardInterrupt):
        made.measure("text", made.parts("bare"))
    row = made.measure("text", made.parts("bare"))
    assert [tasks for tasks, _ in played] == [32, 8, 2, 2, 1, 32]  # all of them once, and what was cut again
    assert (row["test"], row["other"], row["sampled"]) == ("1" * 40, {"plain": "11", "other": "1"}, {"n": 32})
    made.measure("another text", made.parts("bare"))
    assert played[6:] == [(tasks, "another text") for tasks in (32, 8, 2, 1, 32)]


def test_every_world_has_its_tasks(bench: Any) -> None:
    from engrain.rounds import RoundTasks

    for place in bench.WORLDS:
        tasks = RoundTasks.draw(bench.settings_of(place, 0))
        assert [len(tasks.validation), len(tasks.test)] == [32, 128]
        assert [len(found) for found in tasks.ood.values()] == [48, 100]


@pytest.mark.timeout(300)
def test_another_model_runs_through_and_its_runs_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Of random weights, so nothing is learned; a placebo is trained by force, and what has no gap is refused."""
    out = tmp_path / "evidence"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), "--world", "helpdesk", "--seed", "0",
         "--model", str(tiny_folder), "--arms", "bare", "opcd-forward_kl", "opcd-wrong",
         "--out", str(out), "--work", str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {path.stem: json.loads(path.read_text()) for path in (out / "helpdesk").glob("*.json")}
    assert runs.keys() == {"bare-0", "opcd-forward_kl-0", "opcd-wrong-0"}
    assert all(run["model"] == str(tiny_folder) and "error" not in run for run in runs.values())
    assert len(runs["bare-0"]["test"]) == len(runs["bare-0"]["groups"]) == 128
    assert runs["bare-0"]["broken"] == {}
    assert runs["opcd-forward_kl-0"]["gap_test"] == "refused"
    assert "trains nothing" in runs["opcd-forward_kl-0"]["refused"]
    assert runs["opcd-wrong-0"]["steps"] == 12
    assert not (tmp_path / "work" / "helpdesk" / "opcd-wrong-0").exists()  # weights are not kept
    assert json.loads(done.stdout.splitlines()[-1])["runs"] == 3


def test_intervals_of_outcomes_that_hang_together_are_wider(bench: Any) -> None:
    import clustered

    from engrain.gate import paired_gain, wilson

    apart = [True, False, True, True, False, True, True, False]
    alone = wilson(apart)
    assert clustered.rate(apart, range(8)) == (alone.accuracy, alone.low, alone.high)
    gain = paired_gain([False] * 8, apart)
    assert clustered.difference([False] * 8, apart, range(8)) == (gain.difference, gain.low, gain.high)
    groups = [i // 16 for i in range(128)]  # eight templates, each solved always or never
    copies = [apart[group] for group in groups]
    p, low, high = clustered.rate(copies, groups)
    assert p == alone.accuracy
    assert low <= alone.low
    assert high >= alone.high
    d, low, high = clustered.difference([False] * 128, copies, groups)
    assert (d, low < 0.25, high > 0.97) == (p, True, True)
    _, low, high = clustered.rate([True] * 128, groups)
    assert low < wilson([True] * 8).low < wilson([True] * 128).low
    same = clustered.difference([True] * 128, [True] * 128, groups)
    assert same[1] < -0.2 < 0.2 < same[2]  # eight templates that agree are no 128
    with pytest.raises(ValueError, match="not paired"):
        clustered.difference([True], [True, False], [0, 1])


def test_clustered_intervals_hold_their_level(bench: Any) -> None:
    """Simulated: twenty templates whose difficulty varies; about one interval in twenty may miss."""
    import random

    import clustered

    draw, held = random.Random(0), 0
    groups = [i % 20 for i in range(120)]
    for _ in range(300):
        levels = [draw.betavariate(0.5, 0.5) for _ in range(20)]
        outcomes = [draw.random() < levels[group] for group in groups]
        _, low, high = clustered.rate(outcomes, groups)
        held += low <= 0.5 <= high
    assert held / 300 > 0.9


def test_the_page_tells_of_every_run_also_of_those_that_failed(bench: Any, tmp_path: Path) -> None:
    import evidence_page

    sampled = {"entropy": 1.0, "distinct_2": 0.9, "response_tokens": 9.0, "leak_rate": 0.0, "n": 32}
    gap = {"difference": 0.5, "low": 0.3, "high": 0.7, "n": 32}

    def write(arm: str, seed: int, *, world: str = "sums", **row: Any) -> None:
        path = tmp_path / "evidence" / world / f"{arm}-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"world": world, "arm": arm, "seed": seed, **row}))

    for seed in (3, 4):
        for arm, test in (
            ("bare", "0000"),
            ("in-context", "1111"),
            ("off_policy", "1100"),
            ("opcd-forward_kl", "1110"),
        ):
            text = {} if arm == "bare" else {"knowledge": f"Do {seed}", "gap": gap}
            write(arm, seed, test=test, other={"plain": "10"}, sampled=sampled, sampled_tokens=100, **text)
    write("sft", 3, error="no space left")
    write("opcd-wrong", 3, refused="no gap", gap_test="refused")
    write("opcd-jsd", 3, refused="no gap", gap_test="refused")
    write("sft", 0, world="cooking", refused="no gap", gap_test="refused")
    other = {"test": "1111", "other": {"plain": "10"}, "sampled": sampled}
    write("opcd-forward_kl", 0, **other, broken={"test": 2}, stopped="enough")
    (tmp_path / "evidence" / "reading.md").write_text("What is to be seen.")
    found = evidence_page.build(tmp_path / "evidence")
    assert found["mean_recovery"] == {"sums": {"opcd-forward_kl": 0.75, "off_policy": 0.5}}
    assert (found["ours"], found["peer"], found["ratio"], found["met"], found["runs"]) == (0.75, 0.5, 1.5, False, 13)
    page = (tmp_path / "evidence.md").read_text()
    assert "What is to be seen." in page
    assert "12 of 186 planned runs have been made: 8 measured, 3 refused by the gap test, 1 failed." in page
    assert "- seed 3, no space left: SFT on the teacher's replies\n" in page
    assert "- seed 3, no gap: OPCD, JSD 0.5; OPCD by force, wrong placebo\n" in page
    assert "Nothing was measured yet.\n\n- seed 0, no gap: SFT" in page.split("## TextWorld cooking")[1]
    assert "other seeds" in page
    assert "| OPCD, forward KL (stopped) | 1.00 [0.51, 1.00] | 1.00 |" in page
    assert "seed 0: episodes without a reply or with a fault: {'test': 2}" in page
    assert found["faults"] == 1
    assert "`Do 4`" in page
    row = next(line for line in page.splitlines() if line.startswith("| OPCD, forward KL |"))
    assert "0.75 [0.41, 0.93] | 0.75 0.75 | +0.25" in row
    beside = [line for line in page.splitlines() if line.startswith("| sums |")]
    assert [line.split(" | ")[2] for line in beside] == ["knowledge in context", "off-policy context distillation"]
    assert beside[0].startswith("| sums | OPCD, forward KL | knowledge in context | 2 | -0.25 [")
    assert beside[1].startswith("| sums | OPCD, forward KL | off-policy context distillation | 2 | +0.25 [")
    assert "| +0.00 [" in beside[1]  # elsewhere
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


def test_rounds_in_a_row_are_shown_with_what_was_learned_forgotten_and_lost(bench: Any, tmp_path: Path) -> None:
    import rounds_page

    def row(number: int, family: str, learned: Mapping[str, str], *, taken: bool, entropy: float) -> dict[str, Any]:
        asked = dict.fromkeys(("sums", "products", "chains", "differences", "plain", "instructions"), "0000")
        sampled = {"entropy": entropy, "distinct_2": 0.5, "response_tokens": 10.0, "leak_rate": 0.0}
        probe = {**asked, **learned, "sampled": sampled}
        return {"round": number, "probe": probe} | ({"family": family, "taken": taken} if family else {})

    series = [
        {"gated": False, "seed": seed, "rounds": [
            row(0, "", {"plain": "1111"}, taken=False, entropy=1.0),
            row(1, "sums", {"sums": "1110", "plain": "1100"}, taken=True, entropy=2.0),
            row(2, "products", {"sums": "0000", "products": "1111", "plain": "1000"}, taken=seed == 3, entropy=3.0),
        ]}
        for seed in (3, 4)
    ]  # fmt: skip
    lines = rounds_page.section(series)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [(row[1], row[2]) for row in cells] == [("(the base model)", ""), ("sums", "2 of 2"), ("products", "1 of 2")]
    assert [row[3][:4] for row in cells] == ["", "0.75", "1.00"]
    assert [row[4][:4] for row in cells] == ["", "", "0.00"]  # sums was forgotten
    assert [row[7] for row in cells] == ["1.00", "2.00", "3.00"]
    [last] = [line for line in lines if line.startswith("Round 2 against the base model")]
    assert "plain -0.75 [" in last
    assert "With the gate" not in lines
    rounds_page.draw(series, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").stat().st_size > 10_000
    (tmp_path / "rounds.json").write_text(json.dumps({"series": series}))
    (tmp_path / "evidence" / "helpdesk").mkdir(parents=True)
    (tmp_path / "evidence" / "helpdesk" / "bare-0.json").write_text(
        json.dumps({"world": "helpdesk", "arm": "bare", "seed": 0, "error": "stopped by hand"})
    )
    from evidence_page import build

    build(tmp_path / "evidence")
    assert "## Rounds in a row" in (tmp_path / "evidence.md").read_text()
