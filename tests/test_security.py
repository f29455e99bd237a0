"""Code of ours that must not exist. Most of it is ruff's to find; here stands that nobody switched that off."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agent", "memory", "distill", "envs", "engrain")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

#: Rules of ruff's that may be waived in a line, and how often at most. assert; a subprocess without a shell; random
#: numbers that are no secrets; a text that looks like a password; SQL from constants of ours, such as table names;
#: markup that is a file of ours or was escaped.
WAIVED = {"S101": 40, "S603": 8, "S311": 10, "S105": 3, "S608": 8, "S704": 2}

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
#: The same by another door: templates that are not confined, archives that choose where they unpack, parsers that eval.
FORBIDDEN_METHODS = {
    "extractall", "read_pickle", "full_load", "unsafe_load", "sympify", "parse_expr", "parse_latex", "Template",
    "from_string", "render_template_string", "load_extension", "enable_load_extension",
}  # fmt: skip
#: SQLAlchemy's ways around bound parameters; constants may pass.
RAW_SQL = {"text", "exec_driver_sql", "execute", "executescript", "literal_column"}


def test_ruff_looks_for_dangerous_calls_in_all_packages() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert not [rule for rule in lint["ignore"] if rule.startswith("S") and rule[1:].isdigit()]
    assert not [
        path
        for path, rules in lint["per-file-ignores"].items()
        if path.split("/")[0] in PACKAGES and any(rule.startswith("S") for rule in rules)
    ]


def test_waived_rules_are_few_and_harmless() -> None:
    found = Counter(
        rule
        for file in FILES
        for waived in re.findall(r"# noqa: ([A-Z0-9, ]+)", file.read_text())
        for rule in re.findall(r"\bS\d+", waived)
    )
    assert set(found) <= set(WAIVED), found
    assert all(count <= WAIVED[rule] for rule, count in found.items()), found
    assert not [file for file in FILES if re.search(r"# noqa(?!:)|ruff: noqa", file.read_text())]


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def put_together(words: ast.expr) -> bool:
    """Whether a text is made of parts other than constants of ours, which are written in capitals."""
    if isinstance(words, ast.JoinedStr):
        values = [part.value for part in words.values if isinstance(part, ast.FormattedValue)]
        return not all(ast.unparse(value).isupper() for value in values)
    if isinstance(words, ast.Call) and ast.unparse(words.func).endswith(".format"):
        return True
    return isinstance(words, ast.BinOp) and isinstance(words.op, (ast.Add, ast.Mod))


def faults(source: str) -> list[str]:
    """What stands in a module that may let a file or a text run as code."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
    for call in calls(tree):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(name)
        if name == "yaml.load":
            found.append("yaml.load instead of yaml.safe_load")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append("numpy.load of pickles")
        loader = given.get("loader", "").partition("(")[0].rpartition(".")[2]  # templates are files of ours
        if name.rpartition(".")[2] == "Environment" and (
            given.get("autoescape") != "True" or loader not in ("FileSystemLoader", "PackageLoader")
        ):
            found.append("templates that are not ours, or do not escape")
        if given.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if given.get("shell", "False") != "False" or name == "os.system":
            found.append("a shell")
        if (
            name.endswith("from_pretrained")
            and name.split(".")[0].startswith("Auto")
            and "trust_remote_code" not in given
        ):
            found.append(f"{name} without trust_remote_code=False")
        if name.rpartition(".")[2] in RAW_SQL and call.args and put_together(call.args[0]):
            found.append(f"SQL put together: {ast.unparse(call.args[0])}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_text_or_file_is_run_as_code(package: str) -> None:
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in FILES
        if file.is_relative_to(ROOT / package) and "versions" not in file.parts and (wrong := faults(file.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "eval(text)", "torch.load(path)",
        "torch.load(p, weights_only=False)",
        "AutoTokenizer.from_pretrained(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "subprocess.run(text, shell=True)", "sa.text('DELETE FROM ' + name)", "sa.text(f'DELETE FROM {name}')",
        "np.load(p, allow_pickle=True)", "yaml.load(text)", "archive.extractall(folder)", "sympy.sympify(text)",
        "jinja2.Template(text)", "jinja2.Environment()", "Environment(loader=FileSystemLoader(here))",
        "Environment(loader=DictLoader(texts), autoescape=True)", "environment.from_string(text)",
        "connection.exec_driver_sql(f'DROP TABLE {name}')",
        "connection.execute('SELECT ' + name)", "connection.execute('SELECT %s' % name)",
        "connection.execute('SELECT {}'.format(name))", "sa.literal_column(f'{name}')",
        "connection.enable_load_extension(1)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert faults(source)


def test_every_file_that_the_security_notes_name_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
