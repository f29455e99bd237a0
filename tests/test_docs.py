"""The pages build with strict links, ask no other machine for anything, and name only commands that there are."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer

import engrain
from engrain.cli import COMMANDS, app

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches for a page: everything but the links that one may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "a":
            return
        given = dict(attrs)
        if tag != "link" or given.get("rel") not in ("canonical", "prev", "next"):
            self.found += [given[name] for name in ("src", "href", "srcset", "data", "poster") if given.get(name)]
        self.found += re.findall(r"url\(([^)]*)\)", given.get("style") or "")


def test_the_site_asks_no_other_machine(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(COMMANDS) + 10
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        away = [address for address in parser.found if re.match(r"\s*(https?:)?//", address)]
        assert not away, f"{page.name}: {away}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?\s*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
    scripts = "".join(script.read_text(encoding="utf-8") for script in site.rglob("*.js"))
    assert "unpkg.com" not in scripts


def test_the_pages_hold_the_numbers_the_commands_and_the_examples(site: Path) -> None:
    text = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert not [name for name, page in text.items() if "{{" in page or "--8&lt;--" in page]
    numbers = text["numbers.html"]
    assert all(f'href="results/{file.name}"' in numbers for file in (ROOT / "docs" / "results").glob("*.json"))
    assert "--learning-rate" in text["cli/improve.html"]
    assert "engrain memory lineage" in text["cli/memory.html"]
    assert "class ShoutWorld" in re.sub(r"<[^>]+>", "", text["extending.html"])
    assert "register_objective" in text["api.html"]
    picture = (ROOT / "docs" / "assets" / "round.svg").read_text().strip()
    assert picture in text["concepts.html"]  # whole: a paragraph inside would end it
    assert picture in text["index.html"]


def test_the_picture_is_seen(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs chromium on the PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        for name, width in (("index", 1280), ("concepts", 360)):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto((site / f"{name}.html").as_uri())
            box = page.locator("svg.round").bounding_box()
            assert box is not None
            assert box["width"] > min(600, 0.8 * width), name  # a drawing without a width of its own has none here
            assert box["x"] + box["width"] <= width
        browser.close()


def commands() -> list[tuple[str, list[str]]]:
    """Every `engrain ...` line of the pages and the README, in words."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        for block in re.findall(
            r"^```(?:console|bash)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M
        ):
            for line in block.splitlines():
                if match := re.match(r"(?:accelerate launch .*-m )?engrain (.*)", line):
                    found.append((page.name, shlex.split(match[1], comments=True)))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "-".join(value)[:60]
)
def test_a_command_in_the_pages_exists_with_its_options(page: str, words: list[str]) -> None:
    group: Any = typer.main.get_group(app)
    context, command = group.context_class(group, info_name="engrain"), group
    rest = list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        command = command.get_command(context, rest[0])
        assert command is not None, f"{page}: there is no engrain {' '.join(words)}"
        rest.pop(0)
    if hasattr(command, "commands"):  # a noun alone lists
        command = command.get_command(context, "list") or command
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if re.match(r"--?[a-z]", word):
            assert word in known, f"{page}: engrain {' '.join(words)}: there is no {word}"


def test_programs_in_the_pages_import_public_names() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)]
    programs = [ast.parse(block) for block in blocks if "--8<--" not in block]
    assert programs
    for node in (node for program in programs for node in ast.walk(program) if isinstance(node, ast.ImportFrom)):
        if node.module == "engrain":
            assert {alias.name for alias in node.names} <= set(engrain.__all__)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 25
