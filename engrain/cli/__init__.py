"""The command line: one module a noun, loaded only when it is asked for."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from engrain.cli.faults import explain
from engrain.terminal import printable


@dataclass(frozen=True)
class _Entry:
    """Where a command lives: `module:app` for a noun with subcommands, `module:command` for a plain function."""

    target: str
    help: str


#: Every command, in the order of `engrain --help`.
COMMANDS: dict[str, _Entry] = {
    "improve": _Entry("engrain.cli.improve:command", "Learn a world: play, extract, distil, and keep what is better."),
    "eval": _Entry("engrain.cli.eval:command", "Measure a model on a world, with or without knowledge."),
    "distill": _Entry("engrain.cli.distill:command", "Bake a knowledge text into the weights."),
    "play": _Entry("engrain.cli.play:command", "Watch the agent play a world, or play it yourself."),
    "memory": _Entry("engrain.cli.memory:app", "Read what was remembered: episodes, items, knowledge, rounds."),
    "report": _Entry("engrain.cli.report:command", "Write a round as one HTML file to send to somebody."),
    "ui": _Entry("engrain.cli.ui:command", "Show rounds, items, knowledge and episodes in the browser."),
    "checkpoints": _Entry("engrain.cli.checkpoints:app", "List what training left on disk, and remove what may go."),
    "rollback": _Entry("engrain.cli.rollback:command", "Go back to an earlier promoted checkpoint."),
    "model": _Entry("engrain.cli.model:app", "Fetch, list, show and remove language models."),
    "doctor": _Entry("engrain.cli.doctor:command", "Check that this machine can play, remember and train."),
}


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is run, not to list it; turns our errors into one line."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """All command names, in the table's order."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command itself, or for the help page only its name and its line of help."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        if self._listing:
            return TyperCommand(cmd_name, help=entry.help)
        return _load(cmd_name, entry)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page without importing the commands."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; the names in the table count for "did you mean"."""
        if args and args[0] not in COMMANDS:
            self.commands = {**{name: TyperCommand(name, hidden=True) for name in COMMANDS}, **self.commands}
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what a user can act on is said in one line on stderr."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on", 130, "stopped")
        except Exception as error:
            fault = explain(error)
            if fault is None or _debugging():
                raise
            _fail(*fault)


app = typer.Typer(
    name="engrain",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"engrain {version('engrain')}")
        except PackageNotFoundError:
            typer.echo("engrain, run from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Agents that learn from their own episodes: play, distil experience into text, bake it into the weights."""


def main() -> None:
    """Run the command line: quiet libraries, one-line errors, and clean ends on Ctrl-C and SIGTERM."""
    _quiet()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except SystemExit as ended:
        raise SystemExit(_flushed(ended.code)) from None


def _load(name: str, entry: _Entry) -> Any:
    module, attribute = entry.target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        command = typer.main.get_group(target)
        command.name = name
        return command
    wrapper = typer.Typer(add_completion=False)
    wrapper.command(name)(target)
    return typer.main.get_command(wrapper)


def _quiet() -> None:
    """Keep the libraries' notes off the terminal; anything set by the user stands."""
    for variable, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(variable, value)
    if not _debugging():
        warnings.simplefilter("ignore")
        for library in ("transformers", "huggingface_hub", "alembic", "textworld", "peft"):
            logging.getLogger(library).setLevel(logging.ERROR)


def _flushed(code: str | int | None) -> str | int | None:
    """Write out what was printed: a disk that is full behind it shows here. A reader who left early is no fault."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter tries once more at its end, and complains in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code and (fault := explain(error)):
            _say(fault[0])
        return code or 1
    return code


def _debugging() -> bool:
    return os.environ.get("ENGRAIN_DEBUG", "").lower() in {"1", "true", "yes", "on"}


def _terminated(signum: int, frame: object) -> NoReturn:
    """End by unwinding, so that half-made files are removed; exit code as the shell expects it."""
    print("stopped: terminated; run the same command again to go on", file=sys.stderr)
    raise SystemExit(128 + signum)


def _fail(message: str, code: int, label: str = "error") -> NoReturn:
    _say(message, label)
    raise typer.Exit(code)


def _say(message: str, label: str = "error") -> None:
    line = Text.assemble((f"{label}:", "bold red"), " ", printable(" ".join(message.split())))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
