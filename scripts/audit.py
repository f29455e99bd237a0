"""Asks PyPI's advisories about every installed package, and first whether they can be asked at all.

pip-audit counts a package that its source does not know as skipped and ends well, so behind a mirror that carries no
advisories it would always find nothing. Here it has to find a vulnerability that is known to be there first.

    python scripts/audit.py PIP_AUDIT SITE_PACKAGES

Exit code: 0 nothing was found; 1 vulnerabilities, printed; 75 the advisories cannot be reached, nothing was checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KNOWN = "jinja2==3.1.2"  # CVE-2024-22195 and others, fixed long ago
UNREACHABLE = 75


def ask(pip_audit: str, *words: str) -> list[dict[str, Any]] | None:
    """What pip-audit says about each package; None if it could not work."""
    command = [pip_audit, "--format=json", "--progress-spinner=off", "--vulnerability-service=pypi", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the tool we are given
    try:
        return list(json.loads(ended.stdout)["dependencies"])
    except (ValueError, KeyError):
        print(ended.stderr.strip()[-2000:], file=sys.stderr)
        return None


def main(pip_audit: str, site_packages: str) -> int:
    """Try the source on a package that is known to be vulnerable, then audit the installed ones."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "requirements.txt"
        known.write_text(KNOWN + "\n")
        found = ask(pip_audit, "--no-deps", "--disable-pip", "-r", str(known))
    if not found or not found[0].get("vulns"):
        print(f"not audited: PyPI's advisories cannot be reached from here (they say nothing of {KNOWN})")
        return UNREACHABLE
    packages = ask(pip_audit, "--skip-editable", "--path", site_packages)
    if packages is None:
        print("not audited: pip-audit failed")
        return UNREACHABLE
    skipped = [package for package in packages if "skip_reason" in package]
    wrong = [(package, vuln) for package in packages for vuln in package.get("vulns", ())]
    for package, vuln in wrong:
        fixed = ", ".join(vuln["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {vuln['id']}, fixed in {fixed}")
    for package in skipped:
        print(f"not audited: {package['name']}: {package['skip_reason']}")
    checked = len(packages) - len(skipped)
    print(f"{len(wrong)} known vulnerabilities in {checked} packages; {len(skipped)} packages not audited")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
