"""Game files that TextWorld generates, cached by their parameters.

A game's files are made in a temporary folder and moved into place in one step: two processes that make the same game
at once both end with one whole game.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import threading
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from envs.errors import BadTaskError, EnvFailedError
from envs.home import engrain_home

#: TextWorld keeps parsers and knowledge bases in module state: one thread at a time may be inside it. It is pure
#: Python between calls of the interpreter that take microseconds, so nothing is lost by it.
TEXTWORLD_LOCK = threading.RLock()

#: Bytes that the length in a story's header counts in, by the story's version (Z-Machine Standard 1.1, 11.1.6).
_LENGTH_UNITS = {1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 8, 7: 8, 8: 8}


def games_folder() -> Path:
    """Where games are kept. The folder may not exist yet."""
    return engrain_home() / "games"


def game_file(kind: str, settings: Mapping[str, Any], seed: int) -> Path:
    """The `.z8` file of a game, generated (one to four seconds) where it is not cached.

    Args:
        kind: `cooking`, `coin_collector` or `custom`.
        settings: what `tw-make` takes for that kind.
        seed: decides everything that the settings leave open.

    Raises:
        BadTaskError: TextWorld cannot make a game of these settings.
        EnvFailedError: the cache folder cannot be written or the game does not compile.
    """
    content = json.dumps([kind, dict(settings), seed, _version()], sort_keys=True)
    folder = games_folder() / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"
    file = folder / "game.z8"
    if file.is_file():
        return file
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise EnvFailedError(f"cannot write games to {folder.parent}: {error}; set ENGRAIN_HOME") from error
    try:
        _generate(kind, settings, seed, made / "game.z8")
        try:
            made.replace(folder)
        except OSError:
            if not file.is_file():  # another process may have been first; anything else is a fault
                raise
    except OSError as error:
        raise EnvFailedError(f"cannot write games to {folder.parent}: {error}; set ENGRAIN_HOME") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return file


def check_story(file: Path) -> None:
    """Refuse a damaged story file: the Z-machine's interpreter does not report one, it ends the whole process.

    Raises:
        BadTaskError: the file is no Z-machine (`.ulx`: no Glulx) story, is cut short, or its checksum is wrong.
    """
    try:
        story = file.read_bytes()
    except OSError as error:
        raise BadTaskError(f"game file {file} cannot be read: {error.strerror}") from error
    if file.suffix == ".ulx":
        length, whole = _check_glulx(file, story)
    else:
        length, whole = _check_z_machine(file, story)
    if length > len(story):
        raise BadTaskError(f"game file {file} is cut short: {len(story)} of {length} bytes")
    if not whole:
        raise BadTaskError(f"game file {file} is damaged: its checksum is wrong")


def glulx_interpreter() -> Path | None:
    """The program that plays `.ulx` files, which TextWorld has brought along until 1.6; None where it does not."""
    spec = find_spec("textworld")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(folder) / "thirdparty" / "glulx" / "Git-Glulx" / "git-glulx-ml"
        if program.is_file() and os.access(program, os.X_OK):
            return program
    return None


def _check_z_machine(file: Path, story: bytes) -> tuple[int, bool]:
    """The length that a story's header names, and whether its checksum is right."""
    if len(story) < 64 or story[0] not in _LENGTH_UNITS:
        raise BadTaskError(f"game file {file} is no Z-machine story")
    length = int.from_bytes(story[0x1A:0x1C], "big") * _LENGTH_UNITS[story[0]]
    checksum = int.from_bytes(story[0x1C:0x1E], "big")  # 0 where a compiler wrote none
    return length, not (length and checksum) or sum(story[0x40:length]) % 0x10000 == checksum


def _check_glulx(file: Path, story: bytes) -> tuple[int, bool]:
    """The same of a Glulx story (Glulx specification, "The Header"): its checksum adds 32-bit words."""
    if len(story) < 256 or story[:4] != b"Glul":
        raise BadTaskError(f"game file {file} is no Glulx story")
    length, checksum = (int.from_bytes(story[at : at + 4], "big") for at in (12, 32))
    count = min(length, len(story)) // 4
    return length, (sum(struct.unpack(f">{count}I", story[: 4 * count])) - checksum) % (1 << 32) == checksum


def _version() -> str:
    from importlib.metadata import version

    return version("textworld")


def _int(value: Any) -> int:
    """What `int` was to TextWorld 1.6: it converts an array of one number, which NumPy refuses since 2.4."""
    return int(value.item() if hasattr(value, "item") else value)


def _generate(kind: str, settings: Mapping[str, Any], seed: int, file: Path) -> None:
    with TEXTWORLD_LOCK:
        warnings.filterwarnings("ignore", module=r"(textworld|tatsu|jericho)")
        import textworld
        from textworld.challenges import CHALLENGES
        from textworld.challenges.tw_cooking import cooking
        from textworld.generator import compile_game, make_game
        from textworld.generator.inform7 import CouldNotCompileGameError

        cooking.int = _int
        options = textworld.GameOptions()
        options.seeds = seed
        options.path = str(file)
        options.file_ext = file.suffix
        try:
            if kind == "custom":
                options.nb_rooms = settings["world_size"]
                options.nb_objects = settings["nb_objects"]
                length = settings["quest_length"]
                options.chaining.min_length = options.chaining.max_length = length
                options.chaining.max_depth = length
                game = make_game(options)
            else:
                _, make, _ = CHALLENGES[f"tw-{kind}"]
                game = make(dict(settings), options)
        except Exception as error:
            raise BadTaskError(f"TextWorld makes no {kind} game of {dict(settings)}: {error!r}") from error
        try:
            compile_game(game, options)
        except (CouldNotCompileGameError, AssertionError) as error:
            raise EnvFailedError(f"a {kind} game of seed {seed} does not compile: {error}") from error
