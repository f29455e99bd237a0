"""`.ulx` games. What the interpreter can do wrong is done by a stand-in, under any TextWorld."""

import os
import shutil
import signal
import stat
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

from envs import games, registry
from envs.base import Split, Task
from envs.errors import BadTaskError, EnvFailedError, UsageError
from envs.games import check_story, glulx_interpreter

STAND_IN = """#!{python}
import os, socket, struct, sys, time
assert sys.argv[2:] == ["-g", "s", "-q"]
if b"stillborn" in open(sys.argv[1], "rb").read():
    sys.exit("*** fatal error: stillborn ***")
talk = socket.socket(socket.AF_UNIX)
talk.connect("s")
said = b"A cell\\xe9. \\x1cOut!\\x1d\\n\\n>"
while True:
    talk.sendall(struct.pack(">I", len(said)) + said)
    (length,) = struct.unpack(">I", talk.recv(4, socket.MSG_WAITALL))
    command = talk.recv(length, socket.MSG_WAITALL).decode("latin-1")
    said = f"{{command}}?\\n\\n>".encode("latin-1")
    if command == "hang":
        time.sleep(600)
    elif command == "crash":
        sys.exit("*** fatal error: stack overflow ***")
    elif command == "end":
        talk.sendall(b"\\x7f\\x10+++EXIT\\x10\\0")
        sys.exit()
    elif command == "babble":
        talk.sendall(b"\\xff" * 4)
    elif command == "write":
        open("written", "w").write("x")
    elif command == "win":
        said = b"    *** You have won ***\\n\\nIn that game you scored 7 out of a possible 10, in 3 turns."
"""


def story(text=b""):
    """A file that looks like a Glulx story, and is none."""
    body = bytearray(b"Glul" + struct.pack(">II", 0x00030102, 256) + struct.pack(">I", 256) + bytes(240))
    body[64 : 64 + len(text)] = text
    body[32:36] = (sum(struct.unpack(">64I", body)) % 2**32).to_bytes(4, "big")
    return bytes(body)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    import envs.textworld

    program = tmp_path / "interpreter"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(envs.textworld, "glulx_interpreter", lambda: program)
    file = tmp_path / "mine.ulx"
    file.write_bytes(story())
    return file


def env_of(file, **options):
    return registry.make(registry.world("textworld", {"path": str(file), **options}).tasks(Split.TEST, 1)[0])


def running(env):
    return env._game.unwrapped._interpreter if hasattr(env._game, "unwrapped") else env._game._interpreter


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_stand_in_plays(stand_in):
    env = env_of(stand_in)
    first = env.reset()
    assert first.text == "A cellé. “Out!”"  # its Latin-1, and what the interpreter cuts from quotes
    assert first.admissible is None
    assert env.step("déjà vu").observation.text == "déjà vu?"
    interpreter = running(env)
    step = env.step("win")
    assert step.done
    assert env.success
    assert (env.score, step.reward) == (0.7, 0.7)
    assert step.feedback == "You won. Score: 7 of 10."
    env.close()
    env.close()
    assert gone(interpreter.process.pid)
    assert not interpreter._folder.exists()


def test_what_a_game_writes_goes_with_it(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    env = env_of(stand_in)
    env.reset()
    env.step("write")
    folder = running(env)._folder
    assert (folder / "written").exists()
    env.close()
    assert not folder.exists()
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("hang", "did not answer within 0.5 seconds"),
        ("crash", "stack overflow"),
        ("babble", "announced 4294967295 bytes"),
    ],
)
def test_a_hang_or_a_crash_costs_one_episode(stand_in, monkeypatch, command, words):
    from envs import glulx

    lost, kept = env_of(stand_in), env_of(stand_in)
    lost.reset(), kept.reset()
    interpreter = running(lost)
    monkeypatch.setattr(glulx, "PATIENCE", 0.5)
    with pytest.raises(EnvFailedError, match=f"crashed at '{command}'.*{words}"):
        lost.step(command)
    assert gone(interpreter.process.pid)
    with pytest.raises(EnvFailedError, match="not being played"):
        lost.step("look")
    monkeypatch.undo()
    assert kept.step("look").observation.text == "look?"
    kept.close()
    lost.close()


def test_a_story_that_ends_by_itself_ends_the_episode(stand_in):
    env = env_of(stand_in)
    env.reset()
    step = env.step("end")
    assert step.done
    assert not env.success
    assert step.feedback == "You lost."


def test_a_story_that_does_not_start(stand_in):
    stand_in.write_bytes(story(b"stillborn"))
    before = time.monotonic()
    with pytest.raises(EnvFailedError, match=r"does not start.*fatal error: stillborn"):
        env_of(stand_in).reset()
    assert time.monotonic() - before < 10


def test_an_env_that_is_dropped_ends_its_interpreter(stand_in):
    env = env_of(stand_in)
    env.reset()
    pid = running(env).process.pid
    del env
    assert gone(pid)


def test_resetting_starts_anew(stand_in):
    env = env_of(stand_in)
    first = env.reset()
    pid = running(env).process.pid
    env.step("look")
    assert env.reset() == first
    assert gone(pid)
    env.close()


def test_damaged_stories_are_refused(tmp_path):
    file = tmp_path / "mine.ulx"
    file.write_bytes(story())
    check_story(file)
    for bad, words in (
        (b"", "no Glulx story"),
        (b"Glux" + story()[4:], "no Glulx story"),
        (story()[:12] + struct.pack(">I", 512) + story()[16:], "cut short"),
        (story()[:-1] + b"\1", "damaged"),
    ):
        file.write_bytes(bad)
        with pytest.raises(BadTaskError, match=words):
            check_story(file)


def test_without_an_interpreter_the_error_says_what_to_do(tmp_path, monkeypatch):
    import envs.textworld

    monkeypatch.setattr(envs.textworld, "glulx_interpreter", lambda: None)
    file = tmp_path / "mine.ulx"
    file.write_bytes(story())
    with pytest.raises(UsageError, match=r"plays no Glulx games; compile the game to .z8"):
        registry.world("textworld", {"path": file})
    task = Task.create("textworld", Split.TEST, 0, {"path": str(file), "max_turns": 3})
    with pytest.raises(BadTaskError, match="plays no Glulx games"):
        registry.make(task).reset()


def test_the_interpreter_comes_with_textworld_before_1_7():
    assert (glulx_interpreter() is not None) == (version("textworld") < "1.7")


@pytest.mark.skipif(version("textworld") >= "1.7", reason="TextWorld 1.7 and later bring no Glulx interpreter")
def test_a_glulx_game_made_by_textworld_plays_to_the_end(tmp_path):
    import textworld

    file = tmp_path / "game.ulx"
    games._generate("cooking", {"recipe": 1, "take": 1, "go": 1, "recipe_seed": 0, "split": "train"}, 7, file)
    made = textworld.start(str(file), textworld.EnvInfos(policy_commands=True))
    commands = made.reset().policy_commands
    made.close()
    assert len(commands) > 2
    lone = tmp_path / "lone.ulx"
    shutil.copy(file, lone)

    def play(path):
        env = env_of(path, max_turns="20")
        said = [env.reset().text]
        assert (env._commands is None) == (path is lone)
        for command in commands:
            if path is file:
                assert command in env._commands
            step = env.step(command)
            said.append((step.observation.text, step.reward, step.done))
        env.close()
        assert env.success
        assert env.score == 1
        assert step.done
        assert step.feedback.startswith("You won. Score: ")
        return said

    alone = [play(file), play(lone)]
    assert "$" not in alone[1][0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(play, [file, lone] * 4)) == alone * 4

    first, second = env_of(file), env_of(file)
    first.reset(), second.reset()
    assert first.step("save").observation.text.startswith("That is not a command")
    os.kill(running(first).process.pid, signal.SIGKILL)
    with pytest.raises(EnvFailedError, match="crashed at 'look'"):
        first.step("look")
    assert second.step("look").observation.text
    second.close()
