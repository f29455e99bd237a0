"""Bad input of every kind: one line on standard error that names it and the fix, exit code 2, and nothing is changed.

Faults of the world (exit code 1) stand in test_world_faults.py, the memory's commands in test_bad_input_memory.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner, Result

import engrain.cli as shell
from memory.store import Store

LONG = "x" * 300
TINY = ("-m", "{here}/tiny")
EVAL = ("eval", "math", "-n", "1", *TINY)
PLAY = ("play", "math", *TINY)
IMPROVE = ("improve", "math", *TINY)
DISTILL = ("distill", "math", "-k", "{here}/text.txt", "--out", "{new}/run", *TINY, "-n", "1", "--batch-size", "1")
DISTILL = (*DISTILL, "--validation", "0", "--steps", "1")

WORLDS = [
    (("eval", "chess"), "unknown env 'chess'; known envs: frozenlake"),
    (("eval", ""), "unknown env ''"),
    (("play", "chess"), "unknown env 'chess'"),
    (("improve", "chess"), "unknown env 'chess'"),
    (("distill", "chess", *DISTILL[2:]), "unknown env 'chess'"),
    (("eval", "math", "-o", "convention"), "-o 'convention' is not key=value; write for instance"),
    (("play", "math", "-o", "convention"), "-o 'convention' is not key=value"),
    (("eval", "math", "-o", "=x"), "-o '=x' is not key=value"),
    (("eval", "math", "-o", "convention=xml"), "convention='xml': Input should be 'none', 'answer_tag', 'json'"),
    (("eval", "math", "-o", "colour=red"), "unknown option 'colour' for env 'math'; known options:"),
    (("eval", "math", "-o", "generators=nonesuch"), "unknown generator 'nonesuch'"),
    (("eval", "math", "-o", "generators="), "generators=''"),
    (("eval", "math", "-o", "sums.nonesuch=3"), "'sums' has no parameter 'nonesuch'; it has:"),
    (("eval", "math", "-o", "sums.min_digits=-1"), "min_digits must be positive"),
    (("eval", "math", "-o", "sums.min_digits=x"), "difficulty of generator 'sums'"),
    (("eval", "math", "-o", "difficulty={"), "difficulty='{'"),
    (("eval", "frozenlake", "-o", "holes=-1"), "holes='-1'"),
    (("eval", "frozenlake", "-o", "size=nan"), "size='nan': Input should be a valid integer"),
    (("eval", "sokoban", "-o", "boxes=99"), "boxes='99'"),
    (("eval", "frozenlake"), "boards in split 'test', 64 were asked for"),
    (("improve", "frozenlake"), "12 "),
    (("eval", "textworld", "-o", "recipe=x"), "recipe='x'"),
    (("eval", "textworld", "-o", "path={here}/game.ulx"), "Glulx"),
    (("eval", "textworld", "-o", "path={here}/game.z8"), "cut short"),
    (("eval", "textworld", "-o", "path={here}/nope.z8"), "nope.z8': no such file"),
    (("eval", "textworld", "--seed", "1000"), "seed=1000"),
]
DATA = [
    (("eval", "math", "-o", f"data={LONG}"), "no such file"),
    (("eval", "math", "-o", "data={here}/empty-folder"), "empty-folder': no such file"),
    (("eval", "math", "-o", "data={here}/latin.jsonl"), "line 1 is not UTF-8"),
    (
        ("eval", "math", "-o", "data={here}/empty.jsonl"),
        "has 0 tasks in split 'test', 64 were asked for; ask for",
    ),
    (("eval", "math", "-o", "data={here}/array.jsonl"), "row 1 is no object"),
    (("eval", "math", "-o", "data={here}/prose.jsonl"), "line 1 is not JSON"),
    (("eval", "math", "-o", "data={here}/cell.jsonl"), "row 1, 'answer' is '[1]', neither text nor a number"),
    (("eval", "math", "-o", "data={here}/key.jsonl"), "row 1 lacks 'question'; it has frage, answer (see question_key"),
    (("eval", "math", "-o", "data={here}/bad.parquet"), "not a readable Parquet file"),
]
MODELS = [
    (("eval", "math", "-m", "nope"), "unknown model 'nope': known names: smollm2-135m"),
    (("eval", "math", "-m", ""), "unknown model ''"),
    (("eval", "math", "-m", "smollm2-135"), "did you mean 'smollm2-135m'?"),
    (("eval", "math", "-m", LONG), "unknown model"),
    (("play", "math", "-m", "nope"), "unknown model 'nope'"),
    (("improve", "math", "-m", "nope"), "unknown model 'nope'"),
    (("model", "show", "nope"), "unknown model 'nope'"),
    (("model", "rm", "nope"), "unknown model 'nope'"),
    (("model", "rm", "smollm2-135m", "-y"), "not cached: there is nothing to remove"),
    (("model", "fetch", "{here}/empty-folder"), "without config.json"),
    (("eval", "math", "-m", "{here}/empty-folder"), "without config.json"),
    (("eval", "math", "-m", "{here}/broken"), "broken cannot be loaded"),
    (("eval", "math", "-m", "{here}/half"), "no file named model.safetensors"),
    (("eval", "math", "-m", "{here}/pickled"), "no file named model.safetensors"),
    (("eval", "math", "-m", "{here}/no-header"), "Error while deserializing header"),
    (("eval", "math", "-m", "{here}/cut-weights"), "Error while deserializing header: incomplete metadata"),
    (("eval", "math", "-m", "{here}/contradiction"), "`num_hidden_layers` (3) must be equal to the number of"),
    (("eval", "math", "-m", "{here}/other-sizes"), "weights are missing, model.layers.2."),
    (("eval", "math", "-m", "{here}/unknown-kind"), "model type `nonesuch`"),
    (("eval", "math", "-m", "{here}/own-code"), "code of its own, which Engrain never runs; use a model"),
    (("eval", "math", "-m", "{here}/no-vocabulary"), "reads text as no tokens at all; its tokenizer.json is missing"),
    (("eval", "math", "-m", "{here}/bad-tokenizer"), "bad-tokenizer cannot be loaded"),
    (("eval", "math", "-m", "{here}/odd-tokenizer"), "odd-tokenizer cannot be loaded"),
    (("eval", "math", "-m", "{here}/odd-tokenizer", "--base-url", "{server}/page"), "tokenizer of"),
    (("eval", "math", "-m", "{here}/no-template"), "no chat template; use an instruction-tuned model"),
    (("eval", "math", "-m", "{here}/bad-template", "-n", "1"), "the chat template refuses messages of roles"),
    (("eval", "math", "-m", "{here}/no-end", "-n", "1"), "no end-of-turn token after an assistant's text"),
    ((*EVAL, "--engine", "vllm", "--base-url", "http://x/v1"), "leave out --engine vllm"),
    ((*EVAL, "--ray", "local", "--base-url", "http://x/v1"), "leave out --base-url"),
    ((*EVAL, "--base-url", "nonsense"), "'nonsense' is no server URL; write for instance"),
    ((*EVAL, "--base-url", ""), "'' is no server URL"),
    ((*EVAL, "--base-url", "ftp://x/y"), "'ftp://x/y' is no server URL"),
    ((*EVAL, "--base-url", "{server}/page"), "gives no list of models"),
    ((*EVAL, "--base-url", "{server}/locked"), "put its key in ENGRAIN_API_KEY"),
    ((*EVAL, "--base-url", "{server}/other"), "serves somebody-else, not"),
]
TEXTS = [
    ((*EVAL, "--temperature", "inf"), "temperature: Input should be a finite number"),
    ((*EVAL, "--knowledge", "nope"), "no knowledge 'nope'"),
    ((*EVAL, "--knowledge", ""), "no knowledge ''"),
    ((*EVAL, "--knowledge", LONG), "no knowledge"),
    ((*EVAL, "--knowledge", "~no-such-user-at-all/x"), "no knowledge"),
    ((*EVAL, "--knowledge", "{here}/empty-folder"), "is a folder; name a text file"),
    ((*EVAL, "--knowledge", "{here}/empty.txt"), "is empty"),
    ((*EVAL, "--knowledge", "{here}/latin.txt"), "cannot be read"),
    ((*EVAL, "--knowledge", "{here}/long.txt"), "holds 4096; shorten the text"),
    ((*DISTILL, "-k", "{here}/long.txt"), "the model's context holds 4096; use a smaller knowledge budget"),
    ((*EVAL, "--checkpoint", "nope"), "no checkpoint 'nope'"),
    ((*EVAL, "--checkpoint", ""), "no checkpoint ''"),
    ((*EVAL, "--checkpoint", LONG), "no checkpoint"),
    ((*EVAL, "--checkpoint", "{here}/empty-folder"), "manifest.json cannot be read"),
    ((*EVAL, "--checkpoint", "{here}/adapter"), "manifest.json is wrong (Input should be an object)"),
    ((*PLAY, "--knowledge", "77"), "no knowledge '77'"),
    ((*PLAY, "--checkpoint", "nope"), "no checkpoint 'nope'"),
]
STORES = [
    (
        (*EVAL, "--store", "{here}/newer.db"),
        "newer version of Engrain (revision r9999); upgrade Engrain or name",
    ),
    ((*EVAL, "--store", "{here}/prose.db"), "not a database"),
    ((*EVAL, "--store", "{here}/foreign.db"), "holds a table 'items' that is not Engrain's; name another database"),
    ((*EVAL, "--store", "{here}"), "cannot open the store"),
    ((*EVAL, "--store", ""), "path is empty"),
    ((*EVAL, "--store", "{here}/text.txt/x.db"), "name another with --store"),
    ((*EVAL, "--store", "mysql://x/y"), "'mysql' is no database that stores experience; use a file path"),
    ((*EVAL, "--store", "http://x/y"), "'http' is no database"),
    ((*EVAL, "--store", "postgresql://u:p@[::1/x"), "the postgresql:// URL of the store cannot be read; its form is"),
    ((*EVAL, "--store", "postgresql://u:secret@x@y/z"), "write the password's own as %40"),
]
SETTINGS = [
    (("improve",), "say what to learn"),
    (("improve", "math", "--demo"), "say what to learn"),
    (("improve", "--demo", "-o", "convention=json"), "world of its own"),
    (("improve", "--config", "{here}/typo.json", "--seed", "3"), "--config holds"),
    (("improve", "--config", "{here}/missing.json"), "cannot be read"),
    (("improve", "--config", "{here}/empty-folder"), "cannot be read"),
    (("improve", "--config", "{here}/latin.txt"), "cannot be read"),
    (("improve", "--config", "{here}/cut.json"), "Invalid JSON"),
    (("improve", "--config", "{here}/list.json"), "Input should be an object (given: [1, 2])"),
    (("improve", "--config", "{here}/seed.json"), "seed: Input should be a valid integer"),
    (("improve", "--config", "{here}/typo.json"), "sead: Extra inputs are not permitted"),
    (("improve", "--config", "{here}/deep.json"), "distill.sampling.max_token: Extra inputs are not permitted"),
    (("improve", "--config", "{here}/guard.json"), "distill.guard.warmup: Extra inputs are not permitted"),
    (("improve", "--config", "{here}/sampling.json"), "distill.sampling.max_tokens"),
    ((*IMPROVE, "--objective", "sideways"), "sideways"),
    ((*IMPROVE, "--learning-rate", "nan"), "distill.learning_rate"),
    ((*IMPROVE, "--learning-rate", "inf"), "distill.learning_rate: Input should be a finite number (given: inf)"),
    ((*IMPROVE, "--learning-rate", "-1"), "distill.learning_rate: Input should be greater than 0"),
    ((*IMPROVE, "--extraction", "magic"), "magic"),
    ((*IMPROVE, "--knowledge", "nope"), "no knowledge 'nope'"),
    ((*IMPROVE, "--knowledge", "{here}/empty.txt"), "is empty"),
    ((*IMPROVE, "--knowledge", "{here}/long.txt"), "holds 4096; shorten the text"),
    ((*IMPROVE, "--knowledge", ""), "knowledge: String should have at least 1 character"),
    ((*IMPROVE, "--knowledge", "{here}/text.txt", "--coach", "m"), "leave out --extraction and --coach"),
    ((*IMPROVE, "--knowledge", "{here}/text.txt", "--forever"), "--forever finds its own knowledge"),
    ((*IMPROVE, "--coach", ""), "extract.coach"),
    ((*IMPROVE, "--coach", "nope"), "unknown model 'nope'"),
    ((*IMPROVE, "--sync-every", "2"), "is for samples of another engine: add --engine vllm or --base-url"),
    ((*IMPROVE, "--ray", "local", "--sync-every", "2"), "leave out --sync-every"),
    ((*IMPROVE, "--track", "nonesuch"), "unknown tracker 'nonesuch'; use one of tensorboard"),
    ((*IMPROVE, "--every", "6h"), "belong to --forever: add it, or leave them out"),
    ((*IMPROVE, "--keep", "3"), "--keep and --disk-budget belong to --forever: add it, or leave them out"),
    ((*IMPROVE, "--forever", "--every", ""), "'' is no length of time"),
    ((*IMPROVE, "--forever", "--every", "soon"), "'soon' is no length of time; write for instance 90s"),
    ((*IMPROVE, "--forever", "--disk-budget", "much"), "'much' is no size; write for instance 50GB"),
    ((*IMPROVE, "--forever", "--out", "{new}/o"), "--out is one round's folder"),
    ((*IMPROVE, "--out", "{here}/text.txt"), "text.txt cannot be written: File exists; name another folder with --out"),
    ((*IMPROVE, "--metrics-port", "0", "--metrics-host", "nowhere.invalid"), "metrics cannot be served at nowhere"),
    (
        (*DISTILL, "--method", "magic"),
        "method: Input should be 'opcd', 'off_policy', 'sft' or 'mixed' (given",
    ),
    ((*DISTILL, "--method", "sft", "--objective", "forward_kl"), "do not go together"),
    ((*DISTILL, "--objective", "magic"), "magic"),
    ((*DISTILL, "--on-policy-fraction", "0.5"), "is for --method mixed, not opcd"),
    ((*DISTILL, "--method", "mixed", "--on-policy-fraction", "nan"), "on_policy_fraction"),
    ((*DISTILL, "--normalize", "magic"), "normalize: Input should be 'sequence' or 'token'"),
    ((*DISTILL, "--learning-rate", "0"), "learning_rate: Input should be greater than 0"),
    ((*DISTILL, "--learning-rate", "inf"), "learning_rate: Input should be a finite number"),
    ((*DISTILL, "--teacher-kind", "ema", "--teacher", "{here}/tiny"), "no second teacher model"),
    ((*DISTILL, "--teacher", "nope"), "unknown model 'nope'"),
    ((*DISTILL, "--parent", "nope"), "no checkpoint 'nope'"),
    ((*DISTILL, "--out", "{here}/text.txt"), "text.txt cannot be used"),
    ((*DISTILL, "--track", "nonesuch"), "unknown tracker 'nonesuch'"),
    ((*DISTILL, "--round", "3"), "add --from-episodes, or leave it out"),
    ((*DISTILL, "--from-episodes", "--method", "sft"), "samples none"),
    ((*DISTILL, "--from-episodes"), "no training episodes of math by"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Answers like a web page, like a server that wants a key, and like one of another model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/page": (200, b"<html>hello</html>"), "/lock": (401, b"no"), "/other": (200, OTHER)}
            status, body = next(answer for start, answer in known.items() if self.path.startswith(start))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


OTHER = b'{"data": [{"id": "somebody-else"}]}'


def refused(result: Result, code: int, words: str) -> None:
    """The command ended with one line that begins `error:`, below its progress at most, and with this exit code."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert words in lines[-1]
    assert all(len(line) < 1000 for line in lines)


@pytest.mark.parametrize(("arguments", "words"), [*WORLDS, *DATA, *MODELS, *TEXTS, *STORES, *SETTINGS])
def test_bad_input_is_one_line(
    here: Path, tmp_path: Path, server: str, untouched: Callable[[], bool], arguments: tuple[str, ...], words: str
) -> None:
    places = {"{here}": str(here), "{new}": str(tmp_path), "{server}": server}
    filled = [re.sub(r"\{\w+\}", lambda m: places.get(m[0], m[0]), word) for word in arguments]
    refused(CliRunner().invoke(shell.app, filled), 2, words)
    assert untouched()
    assert not list(tmp_path.glob("run/step-*"))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ENGRAIN_SERVER_PATIENCE", "soon", "ENGRAIN_SERVER_PATIENCE: Input should be a valid number"),
        ("ENGRAIN_SERVER_PATIENCE", "-3", "ENGRAIN_SERVER_PATIENCE: Input should be greater than or equal to 0"),
        ("ENGRAIN_SERVER_TIMEOUT", "nan", "ENGRAIN_SERVER_TIMEOUT: Input should be a finite number"),
        ("ENGRAIN_HOME", "~no-such-user-at-all/x", "there is no such user's home; name a folder"),
        ("ENGRAIN_STORE", "mysql://x/y", "'mysql' is no database"),
        ("ENGRAIN_UI_TOKEN", "xyzzy", "ENGRAIN_UI_TOKEN: a token is 16 or more letters"),
        ("ENGRAIN_DEBUG", "perhaps", "ENGRAIN_DEBUG: Input should be a valid boolean"),
    ],
)
def test_a_bad_variable_is_named_as_it_is_set(here: Path, variable: str, value: str, words: str) -> None:
    result = CliRunner().invoke(shell.app, [w.replace("{here}", str(here)) for w in EVAL], env={variable: value})
    refused(result, 2, words)
    assert "xyzzy" not in result.output


@pytest.mark.parametrize("with_knowledge", [False, True])
def test_a_template_without_system_role_gets_that_text_before_the_first_question(
    here: Path, with_knowledge: bool
) -> None:
    words = ["eval", "math", "-n", "1", "-m", str(here / "no-system"), "-o", "system=Be brief.", "--max-tokens", "1"]
    words += ["--knowledge", str(here / "text.txt")] * with_knowledge
    result = CliRunner().invoke(shell.app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    from transformers import AutoTokenizer

    with Store.open(str(default_store())) as store:
        (row,) = store.episode_rows()
        prompt = store.episode(row.id)
    tokenizer = AutoTokenizer.from_pretrained(here / "no-system")
    text = tokenizer.decode(prompt.token_ids[: prompt.prompt_length])
    knowledge = "Knock first.\n\n" * with_knowledge
    assert text.startswith(f"<|im_start|>user\n{knowledge}Be brief.\n\nWhat is ")
    assert "system\n" not in text


def default_store() -> Path:
    from engrain.settings import home

    return home() / "engrain.db"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("evla",),
        ("--colour",),
        ("eval",),
        ("eval", "math", "--split", "dev"),
        ("eval", "math", "-n", "0"),
        ("eval", "math", "--temperature", "-1"),
        ("eval", "math", "--temperature", "nan"),
        ("eval", "math", "--seed", "-1"),
        ("eval", "math", "--seed", "1.5"),
        ("eval", "math", "--seed", "9" * 30),
        ("eval", "math", "--colour", "red"),
        ("eval", "math", "--engine", "nonesuch"),
        ("play", "math", "--episodes", "-3"),
        ("improve", "math", "--steps", "0"),
        ("improve", "math", "--keep", "-1"),
        ("improve", "math", "--metrics-port", "70000"),
        ("distill", "math"),
        ("distill", "math", "-k", "x", "--out", "y", "--rank", "0"),
        ("distill", "math", "-k", "x", "--out", "y", "--learning-rate", "nan"),
        ("model", "fetch"),
        ("model", "nothing"),
        ("doctor", "now"),
    ],
)
def test_options_out_of_range_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(shell.app, list(arguments))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Usage: " in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr if arguments else result.output)


def test_a_round_that_cannot_be_drawn_leaves_no_round_behind(tmp_path: Path) -> None:
    url = str(tmp_path / "rounds.db")
    assert CliRunner().invoke(shell.app, ["improve", "frozenlake", "--store", url]).exit_code == 2
    assert not Path(url).exists()
