"""Single-question world: a question in, one reply out, the answer checked.

With a `convention` an answer counts only in that form, which the prompt does not mention and the feedback does: what
is to be learned is known from experience alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from envs.answers import Convention, find_answer, plain_number
from envs.base import Env, Observation, Split, Step, Task, World
from envs.errors import BadTaskError, EnvFailedError, UsageError
from envs.generators import Question, draw
from envs.options import Options, comma_list, is_file, storable
from envs.splits import content_number, split_of
from envs.verify import shared_checker

_Names = Annotated[tuple[str, ...], BeforeValidator(comma_list), Field(min_length=1)]
#: Draws without a new question after which a generator counts as exhausted.
_PATIENCE = 50_000
#: Characters of the model's own answer that the feedback repeats.
_SHOWN = 80


class MathOptions(Options):
    """Options of the `math` world."""

    generators: _Names = ("sums",)
    """Presets (`sums`, `differences`, `chains`) or reasoning-gym dataset names, drawn in turn."""
    difficulty: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Generator parameters by generator: `difficulty='{"sums": {"min_digits": 3}}'` or `sums.min_digits=3`."""
    data: Path | None = None
    """A JSONL or Parquet file of questions, instead of the generators."""
    question_key: str = "question"
    answer_key: str = "answer"
    convention: Convention = Convention.NONE
    """The only form in which an answer counts; out-of-distribution tasks have none."""
    ood_generators: _Names = ("differences", "products", "chains")
    """Generators of the `ood` split. The defaults are what a 0.5B model answers in part."""
    system: str = ""
    """The system message; "" is none, which leaves the prompt to the question alone."""

    @field_validator("difficulty", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value


class _Parameters(BaseModel):
    """What a `math` task holds."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    convention: Convention = Convention.NONE
    source: str = ""
    system: str = ""


class MathEnv(Env):
    """One question, one reply. Score 1 when the answer counts and is right, else 0."""

    max_turns = 1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        try:
            self._parameters = _Parameters.model_validate(dict(task.parameters))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadTaskError(f"task {task.id}: parameter {first['loc'][0]!r}: {first['msg']}") from error
        self.system = self._parameters.system
        self._score = 0.0
        self._done = False

    def reset(self) -> Observation:
        """Ask the question."""
        return Observation(self._parameters.question)

    def step(self, text: str) -> Step:
        """Judge the reply; the episode is then over.

        Raises:
            EnvFailedError: a second reply to the one question, or the answer checker does not start.
        """
        if self._done:
            raise EnvFailedError(f"task {self.task.id} was already answered")
        self._done = True
        expected, convention = self._parameters.answer, self._parameters.convention
        answer = find_answer(text, convention, numeric=plain_number(expected) is not None)
        if answer is None:
            feedback = "Not counted. No answer was found."
            if convention.example:
                feedback += f" An answer is only read in this form: {convention.example}"
        elif shared_checker().equal(answer, expected):
            self._score = 1.0
            feedback = "Counted. Correct."
        else:
            shown = " ".join(answer[: 4 * _SHOWN].split())
            shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
            feedback = f"Wrong. Your answer was {shown}."
        return Step(Observation(""), self._score, done=True, feedback=feedback)

    @property
    def score(self) -> float:
        """1 for a right answer in the form that counts, else 0."""
        return self._score


class MathWorld(World):
    """Questions from reasoning-gym's generators or from a file; see `MathOptions`."""

    name: ClassVar[str] = "math"
    isolated: ClassVar[bool] = False

    def __init__(self, options: MathOptions) -> None:
        self.options = options

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> MathWorld:
        """Build from options; `<generator>.<parameter>=value` sets one generator parameter.

        Raises:
            UsageError: an option, a generator or a generator's parameter is unknown or out of range.
        """
        plain = {key: value for key, value in options.items() if "." not in key}
        parsed = MathOptions.parse(cls.name, plain)
        difficulty = {name: dict(values) for name, values in parsed.difficulty.items()}
        for key, value in options.items():
            generator, dot, parameter = key.partition(".")
            if dot:
                difficulty.setdefault(generator, {})[parameter] = value
        used = {*parsed.generators, *parsed.ood_generators}
        for generator in difficulty:
            if generator not in used:
                raise UsageError(f"difficulty is set for {generator!r}, which is none of {', '.join(sorted(used))}")
        if parsed.data is not None and not is_file(parsed.data):
            raise UsageError(f"env 'math', option data={str(parsed.data)!r}: no such file")
        return cls(parsed.model_copy(update={"difficulty": difficulty}))

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        """Distinct questions of a split; the question's text alone decides its split.

        Raises:
            UsageError: the split holds fewer distinct questions, or a generator or the data file does not fit.
        """
        questions = list(islice(self._distinct(split, seed), count))
        if len(questions) < count:
            generated = self.options.data is None or split is Split.OOD
            fix = "widen the generators or their `difficulty`" if generated else f"give more than {self.options.data}"
            raise UsageError(
                f"env 'math' has {len(questions)} tasks in split {split.value!r}, {count} were asked for; "
                f"ask for fewer or {fix}"
            )
        return [self._task(question, split) for question in questions]

    @classmethod
    def make(cls, task: Task) -> MathEnv:
        """Build the env of a task.

        Raises:
            BadTaskError: the task lacks a question or an answer.
        """
        return MathEnv(task)

    def _distinct(self, split: Split, seed: int) -> Iterator[Question]:
        """The split's questions, each once, ending where nothing new comes."""
        options = self.options
        in_file = options.data is not None
        taken: set[str] = set()
        if in_file and split is Split.OOD:
            taken |= {question.text for question in self._rows()}
        misses = 0
        for question in self._source(split, seed):
            if question.text in taken:
                misses += 1
                if misses >= _PATIENCE:
                    return
                continue
            misses = 0
            taken.add(question.text)
            if in_file:
                belongs = split is Split.OOD or split_of(question.text) is split
            else:
                belongs = split_of(question.text, reserve_ood=True) is split
            if belongs:
                yield question

    def _source(self, split: Split, seed: int) -> Iterable[Question]:
        if split is Split.OOD:
            return draw(self.options.ood_generators, self.options.difficulty, seed)
        if self.options.data is None:
            return draw(self.options.generators, self.options.difficulty, seed)
        return sorted(self._rows(), key=lambda question: content_number(f"{seed}/{question.text}", 63))

    def _rows(self) -> list[Question]:
        path, options = self.options.data, self.options
        if path is None:
            return []
        questions = []
        for number, row in enumerate(_read_rows(path, [options.question_key, options.answer_key]), 1):
            if not isinstance(row, Mapping):
                raise UsageError(f"{path}: row {number} is no object with keys but {str(row)[:_SHOWN]!r}")
            text, answer = (_cell(path, number, row, key) for key in (options.question_key, options.answer_key))
            questions.append(Question(text, answer, path.name))
        return questions

    def _task(self, question: Question, split: Split) -> Task:
        convention = Convention.NONE if split is Split.OOD else self.options.convention
        parameters = _Parameters(
            question=question.text,
            answer=question.answer,
            convention=convention,
            source=question.source,
            system=self.options.system,
        )
        return Task.create(self.name, split, content_number(question.text), parameters.model_dump(mode="json"))


def _cell(path: Path, number: int, row: Mapping[str, Any], key: str) -> str:
    """A question or an answer as text: a string or a number, nothing that would only be printed as one."""
    if key not in row:
        has = ", ".join(map(str, row)) or "no keys"
        raise UsageError(f"{path}: row {number} lacks {key!r}; it has {has} (see question_key, answer_key)")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise UsageError(f"{path}: row {number}, {key!r} is {str(value)[:_SHOWN]!r}, neither text nor a number")
    text = str(value).strip()
    if not text or not storable(text):
        raise UsageError(f"{path}: row {number}, {key!r} is {'not UTF-8 text' if text else 'empty'}")
    return text


def _read_rows(path: Path, keys: list[str]) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            names = parquet.read_schema(path).names
            columns = [key for key in keys if key in names] or names
            yield from parquet.read_table(path, columns=columns).to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise UsageError(f"{path}: not a readable Parquet file: {error}") from error
        return
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # A byte order mark, as some editors write, may stand before the first line.
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}: line {number} is not UTF-8: {error}") from error
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}: line {number} is not JSON: {error}") from error
