"""Text adventures: games that TextWorld generates, and any Z-machine or Glulx file by its path."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from envs.base import Env, Observation, Split, Step, Task, World
from envs.errors import BadTaskError, EnvFailedError, UsageError
from envs.games import TEXTWORLD_LOCK, check_story, game_file, glulx_interpreter
from envs.options import is_file
from envs.textworld_options import MOST_ROOMS, TextWorldOptions, coin_rooms

SYSTEM = "You are playing a text adventure game. Reply with one command and nothing else."

#: Longer lines are cut by the interpreter anyway.
_LONGEST_COMMAND = 160
#: Turns added for out-of-distribution games, which are longer.
_OOD_EXTRA_TURNS = 4
#: Commands that write files, leave the game or read its debugging output; words count to nine letters only.
_FORBIDDEN = re.compile(
    r"\s*(save|restore|restart|quit|q|(no|un)?script|transcrip\w*|recording\w*|replay|tw-\S*|actions|rules|showme)\b",
    re.IGNORECASE,
)
#: Where one line of input ends a command and begins another, and where it may.
_NEXT_COMMAND = re.compile(r"[.;!?]|\bthen\b", re.IGNORECASE)
_NEXT_PART = re.compile(r"[,.;!?]|\b(?:then|and)\b", re.IGNORECASE)
_BANNER_LINE = re.compile(r"^(?=.*[$\\]|.*__)[ $|\\/_<>]+$", re.MULTILINE)
_PROMPT_LINE = re.compile(r"\n?^>[^\n]*\Z", re.MULTILINE)
_MENU_LINE = re.compile(r"^Would you like to RESTART[^\n]*$", re.MULTILINE)
#: How Inform's library ends a story, and tells the score then: all there is to go by in a game of unknown make.
_ENDING = re.compile(r"^\s*\*\*\*\s*(.{1,80}?)\s*\*\*\*\s*$", re.MULTILINE)
_FINAL_SCORE = re.compile(r"scored (-?\d+) (?:points? )?out of a possible (\d+)")
#: TextWorld's own food splits; its out-of-distribution games use unseen food too.
_FOOD_SPLITS = {Split.TRAIN: "train", Split.VALIDATION: "valid", Split.TEST: "test", Split.OOD: "test"}


class _Parameters(BaseModel):
    """What a `textworld` task holds: the making of a game, or a file and its digest."""

    game: Literal["cooking", "coin_collector", "custom"] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    sha256: str | None = None
    max_turns: int = Field(ge=1)
    list_commands: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> _Parameters:
        if (self.game is None) == (self.path is None):
            raise ValueError("a task names either a game to make or a path")
        return self


def command_of(reply: str) -> str:
    """The command in a reply: its first line with text, without a leading `>` or surrounding quotes.

    Of several commands in that line (`look. go north`, `look then go north`) it is the first: a reply is one turn.
    Only printable Latin-1 is left, `?` standing for the rest: a NUL crashes the interpreter, and so do many emoji.
    """
    line = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    line = line.lstrip("> \t").strip("\"'`“”‘’ \t")
    line = next((part for part in _NEXT_COMMAND.split(line) if part.strip()), "").strip("\"'`“”‘’ \t")
    line = " ".join("".join(c if c.isprintable() else " " for c in line).split())[:_LONGEST_COMMAND]
    return line.encode("latin-1", "replace").decode("latin-1")


def _forbidden(command: str) -> bool:
    """Whether a command, or what `and` or a comma joins to it, is one that a player must not give."""
    return any(_FORBIDDEN.match(part) for part in _NEXT_PART.split(command))


def clean(text: str) -> str:
    """What the game said, without TextWorld's banner, the input prompt, the status line and the end menu."""
    text = _PROMPT_LINE.sub("", text.rstrip())
    text = _MENU_LINE.sub("", _BANNER_LINE.sub("", text))
    lines = [line.strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class TextWorldEnv(Env):
    """One game. The score is the game's own, divided by its highest; won games count as solved."""

    system = SYSTEM

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        try:
            self._parameters = _Parameters.model_validate(dict(task.parameters))
        except ValidationError as error:
            raise BadTaskError(f"task {task.id}: {error.errors()[0]['msg']}") from error
        self.max_turns = self._parameters.max_turns
        self._game: Any = None
        self._turn = 0
        self._points = 0
        self._best = 0
        self._won = False
        self._over = False
        self._commands: tuple[str, ...] | None = None

    def reset(self) -> Observation:
        """Make the game where it is not cached, and start it.

        Raises:
            BadTaskError: the game cannot be made, or its file is missing, not the one the task names or a `.ulx`
                that the installed TextWorld cannot play.
            EnvFailedError: the game does not start.
        """
        file = self._file()
        with TEXTWORLD_LOCK:
            import textworld
            from textworld.envs import TWInform7

            program = _interpreter_of(file)
            generated = TWInform7.compatible(str(file))
            infos = textworld.EnvInfos(score=True, max_score=True, won=True, lost=True, admissible_commands=generated)
            self.close()
            try:
                if program is None:
                    self._game = textworld.start(str(file), infos)
                else:
                    from envs import glulx

                    self._game = glulx.start(file, infos, program)
                state = self._game.reset()
            except Exception as error:
                raise EnvFailedError(f"{file} does not start: {error!r}") from error
            self._read(state)
            return self._observe(state)

    def step(self, text: str) -> Step:
        """Play one command.

        Raises:
            EnvFailedError: the game crashed, or was not started or already over.
        """
        if self._game is None or self._over:
            raise EnvFailedError(f"task {self.task.id} is not being played")
        self._turn += 1
        command = command_of(text)
        before = self.score
        with TEXTWORLD_LOCK:
            if not command or _forbidden(command):
                refusal = self._with_commands("That is not a command of this game.")
                observation = Observation(refusal, self._commands)
                ended = False
            else:
                try:
                    state, _, ended = self._game.step(command)
                except Exception as error:
                    self._over = True
                    raise EnvFailedError(
                        f"the game of task {self.task.id} crashed at {command!r}: {error!r}"
                    ) from error
                ended = self._read(state) or bool(ended)
                observation = self._observe(state)
        self._over = ended or self._turn >= self.max_turns
        feedback = self._verdict(ended) if self._over else ""
        return Step(observation, self.score - before, self._over, feedback)

    @property
    def score(self) -> float:
        """Points by the highest possible, in [0, 1]; where the game tells no highest, 1 once it is won."""
        if self._best <= 0:
            return float(self._won)
        return min(max(self._points / self._best, 0.0), 1.0)

    @property
    def success(self) -> bool:
        """Whether the game was won."""
        return self._won

    def close(self) -> None:
        """End the interpreter."""
        if self._game is not None:
            game, self._game = self._game, None
            with TEXTWORLD_LOCK:
                game.close()

    def _file(self) -> Path:
        parameters = self._parameters
        if parameters.game is not None:
            file = game_file(parameters.game, parameters.settings, self.task.seed)
            check_story(file)
            return file
        file = Path(str(parameters.path))
        if not is_file(file):
            raise BadTaskError(f"task {self.task.id}: no game file at {file}")
        if parameters.sha256 and _digest(file) != parameters.sha256:
            raise BadTaskError(f"task {self.task.id}: {file} is not the file that the task was made from")
        check_story(file)
        return file

    def _read(self, state: Any) -> bool:
        """Take over the score; whether the game says that it has ended."""
        commands = state.admissible_commands
        self._commands = tuple(commands) if commands else None
        if state.won is not None:
            self._points, self._best = int(state.score or 0), int(state.max_score or 0)
            self._won = bool(state.won)
            return self._won or bool(state.lost)
        text = state.feedback or ""
        if told := _FINAL_SCORE.search(text):
            self._points, self._best = int(told[1]), int(told[2])
        ending = _ENDING.search(text)
        self._won = ending is not None and ("won" in ending[1] or ending[1] == "The End")
        return ending is not None

    def _observe(self, state: Any) -> Observation:
        return Observation(self._with_commands(clean(state.feedback or "")), self._commands)

    def _with_commands(self, text: str) -> str:
        if not self._parameters.list_commands or not self._commands or self._won:
            return text
        return "\n".join([text, "", "Commands:", *self._commands])

    def _verdict(self, ended: bool) -> str:
        outcome = "You won." if self._won else "You lost." if ended else "You ran out of turns."
        return f"{outcome} Score: {self._points} of {self._best}." if self._best > 0 else outcome


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class TextWorldWorld(World):
    """TextWorld's cooking, coin collector and custom games, or one game file; see `TextWorldOptions`.

    Splits never share a seed. Cooking games also use TextWorld's own food splits. `ood` holds harder games of the
    same kind: one more ingredient, two more rooms to the coin, one more command to the goal.
    """

    name: ClassVar[str] = "textworld"

    def __init__(self, options: TextWorldOptions) -> None:
        self.options = options

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> TextWorldWorld:
        """Build from options.

        Raises:
            UsageError: an option is unknown or out of range, or `path` is no game file that can be played.
        """
        parsed = TextWorldOptions.parse(cls.name, options)
        if parsed.path is not None:
            _check_path(parsed.path)
        return cls(parsed)

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        """Games of a split. They are generated when they are first played, not here.

        Raises:
            UsageError: `seed` is out of range, or a game file is asked for more tasks than its one.
        """
        if self.options.path is not None:
            return self._single(self.options.path, split, count)
        if not 0 <= seed < 1000 or count > 100_000:
            raise UsageError(f"env 'textworld': seed={seed} must be 0 to 999 and count={count} at most 100000")
        order = list(Split)
        first = seed * 100_000
        return [
            Task.create(self.name, split, (first + i) * len(order) + order.index(split), self._parameters(split))
            for i in range(count)
        ]

    @classmethod
    def make(cls, task: Task) -> TextWorldEnv:
        """Build the env of a task.

        Raises:
            BadTaskError: the task names neither a game nor a path.
        """
        return TextWorldEnv(task)

    def _single(self, path: Path, split: Split, count: int) -> list[Task]:
        held = 1 if split is Split.TEST else 0
        if count > held:
            raise UsageError(
                f"env 'textworld': the file {path.name} is one task, in split 'test'; "
                f"{count} of split {split.value!r} were asked for"
            )
        parameters = _Parameters(
            path=str(path.resolve()),
            sha256=_digest(path),
            max_turns=self.options.max_turns,
            list_commands=self.options.list_commands,
        )
        task = Task.create(self.name, split, 0, parameters.model_dump(mode="json", exclude_defaults=True))
        return [task][:count]

    def _parameters(self, split: Split) -> dict[str, Any]:
        options, ood = self.options, split is Split.OOD
        settings: dict[str, Any]
        match options.game:
            case "cooking":
                more = int(ood and options.recipe < 5)
                settings = {name: getattr(options, name) for name in ("go", "open", "cook", "cut", "drop")}
                settings |= {"recipe": options.recipe + more, "take": options.take + more}
                settings |= {"recipe_seed": 0, "split": _FOOD_SPLITS[split]}
            case "coin_collector":
                level = options.level + 2 * ood
                if coin_rooms(level) > MOST_ROOMS or coin_rooms(level) < coin_rooms(options.level):
                    raise UsageError(
                        f"env 'textworld': no harder game (split 'ood') than that of level={options.level}"
                    )
                settings = {"level": level}
            case "custom":
                settings = {
                    "world_size": options.world_size,
                    "nb_objects": options.nb_objects,
                    "quest_length": options.quest_length + ood,
                }
        parameters = _Parameters(
            game=options.game,
            settings=settings,
            max_turns=options.max_turns + _OOD_EXTRA_TURNS * ood,
            list_commands=options.list_commands,
        )
        return parameters.model_dump(mode="json", exclude={"path", "sha256"})


def _check_path(path: Path) -> None:
    if not is_file(path):
        raise UsageError(f"env 'textworld', option path={str(path)!r}: no such file")
    if not re.fullmatch(r"\.(z[1-8]|ulx)", path.suffix):
        raise UsageError(f"env 'textworld', option path={path.name!r}: not a .z1 to .z8 or .ulx game file")
    _interpreter_of(path)
    check_story(path)


def _interpreter_of(file: Path) -> Path | None:
    """The program that a `.ulx` file needs; None for a Z-machine file, which TextWorld plays within this process."""
    if file.suffix != ".ulx":
        return None
    program = glulx_interpreter()
    if program is None:
        raise BadTaskError(
            f"env 'textworld', option path={file.name!r}: TextWorld {version('textworld')} plays no Glulx games; "
            "compile the game to .z8 (tw-make --format z8), or use TextWorld 1.6.2 (Python 3.11 or 3.12)"
        )
    return program
