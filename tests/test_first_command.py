"""The first command: which Pythons it takes, and what it says to the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import wheels


def test_one_range_of_pythons_everywhere() -> None:
    first, *_, last = wheels.supported()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^SUPPORTED := (.*)$", makefile, re.MULTILINE) == [" ".join(wheels.supported())]
    assert f"Python {first} to {last}" in makefile
    assert f"Python {first} to {last}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {first} to {last}" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{first.replace(".", "")}"' in project
    assert f'python_version = "{first}"' in project


@pytest.mark.parametrize(("found", "named"), [("3.10", "Python 3.10"), ("3.15", "Python 3.15"), ("", "no Python")])
def test_make_refuses_other_pythons_in_one_line(tmp_path: Path, found: str, named: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {found}\n" if found else "#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, "edit", f"PYTHON={python}", f"VENV={tmp_path / 'env'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{python} is {named}" in line
    assert "needs Python 3.11 to 3.14" in line
    assert "PYTHON=python3.12 make edit" in line
    assert not (tmp_path / "env").exists()
