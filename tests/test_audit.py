"""The audit of dependencies says when it could not look, and every dependency has a lower and an upper bound."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = {"name": "jinja2", "version": "3.1.2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.3"]}]}
FINE = {"name": "rich", "version": "14.0.0", "vulns": []}
BAD = {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}
ABSENT = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("known", "installed", "code", "words"),
    [
        ([KNOWN], [FINE], 0, "0 known vulnerabilities in 1 packages; 0 packages not audited"),
        ([KNOWN], [FINE, ABSENT], 0, "not audited: torch: Dependency not found on PyPI"),
        ([KNOWN], [FINE, BAD], 1, "old 1.0: PYSEC-2, fixed in no version yet"),
        ([{"name": "jinja2", "skip_reason": "Dependency not found on PyPI"}], [], 75, "cannot be reached"),
        ([{**KNOWN, "vulns": []}], [FINE], 75, "not audited: PyPI's advisories cannot be reached"),
        (None, [FINE], 75, "cannot be reached"),
        ([KNOWN], None, 75, "not audited: pip-audit failed"),
    ],
)
def test_the_audit_looks_or_says_that_it_did_not(
    known: list[Any] | None, installed: list[Any] | None, code: int, words: str, tmp_path: Path
) -> None:
    said = [None if found is None else json.dumps({"dependencies": found}) for found in (known, installed)]
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint({said!r}['--path' in sys.argv])\n")
    tool.chmod(0o755)
    script = str(ROOT / "scripts" / "audit.py")
    ended = subprocess.run([sys.executable, script, str(tool), "site-packages"], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stdout


def unbounded(requirements: list[str]) -> list[str]:
    """Those that could bring in a version nobody tried, or one that is too old."""
    from packaging.requirements import Requirement

    found = []
    for text in requirements:
        specifiers = list(Requirement(text).specifier)
        exact = any(s.operator == "==" for s in specifiers)
        lower = any(s.operator in (">=", "~=") for s in specifiers)
        upper = any(s.operator in ("<", "<=", "~=") for s in specifiers)
        if not (exact or (lower and upper)):
            found.append(text)
    return found


def test_every_direct_dependency_has_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for group in project["optional-dependencies"].values() for requirement in group]
    assert unbounded([*project["dependencies"], *extras]) == []
    assert unbounded(["a", "a>=1", "a<2", "a>=1,<2", "a==1.*", "a~=1.2"]) == ["a", "a>=1", "a<2"]
