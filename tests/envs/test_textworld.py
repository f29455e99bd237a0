import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import games, registry
from envs.base import Split, Task
from envs.errors import BadTaskError, EnvFailedError, UsageError
from envs.games import check_story, game_file, games_folder
from envs.textworld import clean, command_of

KINDS = [{}, {"game": "coin_collector"}, {"game": "custom"}]


@cache
def _policy(file):
    import textworld

    game = textworld.start(str(file), textworld.EnvInfos(policy_commands=True))
    commands = game.reset().policy_commands
    game.close()
    return commands


def walkthrough(env):
    """The game's own `policy_commands`."""
    return _policy(env._file())


def play(env, commands):
    transcript = [env.reset().text]
    transcript += [env.step(command) for command in commands]
    return transcript


@pytest.mark.parametrize("options", KINDS)
def test_the_games_own_walkthrough_scores_one(options):
    task = registry.world("textworld", options).tasks(Split.TRAIN, 1)[0]
    env = registry.make(task)
    transcript = play(env, walkthrough(env))
    last = transcript[-1]
    assert last.done
    assert env.score == 1
    assert env.success
    assert sum(step.reward for step in transcript[1:]) == pytest.approx(1)
    assert last.feedback.startswith("You won. Score: ")
    assert "$" not in transcript[0]
    assert "\\" not in transcript[0]
    assert "\n>" not in transcript[0]
    with pytest.raises(EnvFailedError, match="not being played"):
        env.step("look")
    env.close()


def test_commands_are_listed_unless_told_not_to():
    world = registry.world("textworld")
    observation = registry.make(world.tasks(Split.TRAIN, 1)[0]).reset()
    assert observation.text.endswith("\n\nCommands:\n" + "\n".join(observation.admissible))
    plain = registry.world("textworld", {"list_commands": "false"}).tasks(Split.TRAIN, 1)[0]
    bare = registry.make(plain).reset()
    assert bare.admissible == observation.admissible
    assert observation.text.startswith(bare.text)
    assert "Commands:" not in bare.text


def test_turns_run_out_and_bad_commands_are_answered():
    task = registry.world("textworld", {"max_turns": "3"}).tasks(Split.TRAIN, 1)[0]
    env = registry.make(task)
    steps = play(env, ["xyzzy", "save", ""])[1:]
    assert [step.done for step in steps] == [False, False, True]
    assert steps[1].observation.text.startswith("That is not a command of this game.")
    assert steps[2].feedback == f"You ran out of turns. Score: 0 of {env._best}."
    assert not env.success


def test_many_at_once_play_as_alone():
    tasks = [task for options in KINDS for task in registry.world("textworld", options).tasks(Split.TRAIN, 1)]
    tasks = [tasks[i % len(tasks)] for i in range(16)]
    scripts = [walkthrough(registry.make(task))[: 1 + i % 4] + ["look"] * (i % 3) for i, task in enumerate(tasks)]
    scripts = [script[:4] for script in scripts]

    def run(task, script):
        env = registry.make(task)
        said = [env.reset().text]
        for command in script:
            step = env.step(command)
            said.append((step.observation.text, step.reward, step.done))
            if step.done:
                break
        env.close()
        return said

    alone = [run(*pair) for pair in zip(tasks, scripts, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, tasks, scripts)) == alone

    envs = [registry.make(task) for task in tasks]
    said = [[env.reset().text] for env in envs]
    for turn in range(4):
        for env, script, heard in zip(envs, scripts, said, strict=True):
            if turn < len(script) and not (len(heard) > 1 and heard[-1][2]):
                step = env.step(script[turn])
                heard.append((step.observation.text, step.reward, step.done))
    assert said == alone


def test_two_processes_make_the_same_game_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path))
    code = "from envs.games import game_file; print(game_file('coin_collector', {'level': 1}, 4242))"
    path = {"PYTHONPATH": str(Path.cwd())}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | path)
    mine = game_file("coin_collector", {"level": 1}, 4242)
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert said.strip() == str(mine)
    assert [entry.name for entry in (tmp_path / "games").iterdir()] == [mine.parent.name]


def test_the_slower_of_two_makers_keeps_the_first_ones_game(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path))

    def overtaken(kind, settings, seed, file):
        file.write_text("second")
        folder = next(iter(expected))
        folder.mkdir()
        (folder / "game.z8").write_text("first")

    monkeypatch.setattr(games, "_generate", lambda kind, settings, seed, file: file.write_text("x"))
    expected = [game_file("custom", {}, 1).parent]
    shutil.rmtree(expected[0])
    monkeypatch.setattr(games, "_generate", overtaken)
    assert game_file("custom", {}, 1).read_text() == "first"
    assert [entry.name for entry in (tmp_path / "games").iterdir()] == [expected[0].name]


def test_games_are_cached_and_failures_leave_nothing(monkeypatch):
    task = registry.world("textworld").tasks(Split.TRAIN, 1)[0]
    file = registry.make(task)._file()
    assert file.is_relative_to(games_folder())
    monkeypatch.setattr(games, "_generate", lambda *_: pytest.fail("made again"))
    assert registry.make(task)._file() == file
    monkeypatch.undo()
    with pytest.raises(BadTaskError, match="no coin_collector game"):
        game_file("coin_collector", {"level": 999}, 1)
    assert not list(games_folder().glob(".making*"))


def test_a_game_file_plays_by_its_path(tmp_path):
    made = registry.make(registry.world("textworld", {"game": "coin_collector"}).tasks(Split.TRAIN, 1)[0])
    commands = walkthrough(made)
    lone = tmp_path / "mine.z8"
    lone.write_bytes(made._file().read_bytes())
    world = registry.world("textworld", {"path": str(lone)})
    task = world.tasks(Split.TEST, 1)[0]
    env = registry.make(task)
    transcript = play(env, commands)
    assert env.success
    assert env.score == 1
    assert transcript[-1].feedback == "You won. Score: 1 of 1."
    assert "$" not in transcript[0]
    with pytest.raises(UsageError, match="one task, in split 'test'"):
        world.tasks(Split.TRAIN, 1)
    lone.write_bytes(b"other")
    with pytest.raises(BadTaskError, match="not the file"):
        registry.make(task).reset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "1", "take": "2"}, "take=2 is more than recipe=1"),
        ({"go": "7"}, "go"),
        ({"game": "chess"}, "cooking"),
        ({"path": "nowhere.z8"}, "nowhere.z8.*no such file"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        registry.world("textworld", options)


@pytest.mark.parametrize(("name", "words"), [("game.ulx", "Glulx"), ("game.txt", "not a .z1 to .z8 or .ulx")])
def test_files_that_are_no_games(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"Glul")
    with pytest.raises(UsageError, match=words):
        registry.world("textworld", {"path": tmp_path / name})


def test_a_damaged_story_is_refused_because_the_interpreter_would_end_the_process(tmp_path):
    whole = registry.make(registry.world("textworld", {"game": "coin_collector"}).tasks(Split.TRAIN, 1)[0])._file()
    story = whole.read_bytes()
    check_story(whole)
    file = tmp_path / "mine.z8"
    for bad, words in (
        (b"", "no Z-machine story"),
        (b"\x09" + story[1:], "no Z-machine story"),
        (story[:-2000], "cut short"),
        (story[:5000] + bytes([story[5000] ^ 1]) + story[5001:], "damaged"),
    ):
        file.write_bytes(bad)
        with pytest.raises(BadTaskError, match=words):
            registry.world("textworld", {"path": file})


@pytest.mark.parametrize(
    "line",
    ["look. save", "look.script", "look then transcript", "look and save", "look, script", "transcription", "noscript"],
)
def test_no_reply_makes_the_game_write_a_file(tmp_path, monkeypatch, line):
    env = registry.make(registry.world("textworld").tasks(Split.TRAIN, 1)[0])
    env.reset()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    env.step(line)
    env.step("stolen")
    env.close()
    assert set(tmp_path.rglob("*")) == before


def test_coin_collectors_that_textworld_cannot_make_are_refused_at_the_door():
    for level in ("151", "200", "234"):
        with pytest.raises(UsageError, match=f"level={level} has"):
            registry.world("textworld", {"game": "coin_collector", "level": level})
    for level in ("99", "149", "232"):
        world = registry.world("textworld", {"game": "coin_collector", "level": level})
        assert world.tasks(Split.TEST, 1)
        with pytest.raises(UsageError, match=f"no harder game .* level={level}"):
            world.tasks(Split.OOD, 1)


def test_a_crashing_game_is_an_env_failure():
    env = registry.make(registry.world("textworld").tasks(Split.TRAIN, 1)[0])
    env.reset()
    env._game.close()
    with pytest.raises(EnvFailedError, match="crashed at 'look'"):
        env.step("look")


@pytest.mark.parametrize("parameters", [{}, {"game": "cooking"}, {"game": "cooking", "path": "x", "max_turns": 1}])
def test_bad_tasks(parameters):
    with pytest.raises(BadTaskError):
        registry.make(Task.create("textworld", Split.TEST, 0, parameters))


@pytest.mark.parametrize(
    ("reply", "command"),
    [
        ("go east", "go east"),
        ("\n\n> go east\nlook", "go east"),
        ('"take coin"', "take coin"),
        ("> 'open  fridge'", "open fridge"),
        ("`look`", "look"),
        ("take knife. go north.", "take knife"),
        ("Take the knife, then go north", "Take the knife,"),
        ('"look."', "look"),
        ("...", ""),
        ("", ""),
    ],
)
def test_commands_are_read_leniently(reply, command):
    assert command_of(reply) == command


@given(st.text())
def test_any_reply_gives_one_short_line(reply):
    command = command_of(reply)
    assert len(command) <= 160
    assert len(command.splitlines()) <= 1
    assert command.isprintable()
    assert command.isascii() or command.encode("latin-1")


def test_replies_that_crash_the_interpreter_are_commands_like_any_other():
    """In a process of its own: a crash would take these tests with it."""
    script = (
        "from envs import registry\nfrom envs.base import Split\n"
        "task = registry.world('textworld', {'game': 'coin_collector'}).tasks(Split.TRAIN, 1)[0]\n"
        "for reply in ('look\\0save', '\\0', '\\U0001f600' * 160, '\\udfff', '\\x1b[A'):\n"
        "    env = registry.make(task)\n    env.reset()\n    print(ascii(env.step(reply).observation.text[:40]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 5


@given(st.text())
def test_any_text_can_be_cleaned(text):
    assert "\n\n\n" not in clean(text)
