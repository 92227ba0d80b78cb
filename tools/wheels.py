"""Does every pin have a wheel for every supported Python? Asked of the package index; nothing is fetched or installed.

    python tools/wheels.py requirements*.txt

A few minutes. Prints the pins without one and exits with 1, or one line that all have one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
_VERSIONS = re.compile(r"\(from versions: (.*?)\)")


def main(files: list[str]) -> int:
    """Ask for every pin of the files under every Python; report what is missing."""
    asked = list(product(sorted(pins(files)), supported()))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: has_wheel(*pair), asked))
    for (pin, python), answer in zip(asked, answers, strict=True):
        if not answer:
            print(f"{pin}: no wheel for Python {python} on Linux x86_64")
    if not all(answers):
        return 1
    print(f"{len({pin for pin, _ in asked})} pins have wheels for Python {', '.join(supported())} on Linux x86_64")
    return 0


def supported() -> list[str]:
    """The Python releases of pyproject.toml's `requires-python`, such as 3.11."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    found = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", wanted)
    if found is None:
        raise SystemExit(f"pyproject.toml: requires-python is {wanted!r}; expected the form >=3.A,<3.B")
    return [f"3.{minor}" for minor in range(int(found[1]), int(found[2]))]


def pins(files: list[str]) -> set[str]:
    """`name==version` lines of requirement files."""
    lines = [line.strip() for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return {line for line in lines if "==" in line and not line.startswith("#")}


def has_wheel(pin: str, python: str) -> bool:
    """Whether the index offers a wheel of this version to this Python.

    pip is asked for a version that cannot exist: it then lists those that do, and downloads nothing.
    """
    name, _, version = pin.partition("==")
    platforms = [flag for tag in PLATFORMS for flag in ("--platform", f"{tag}_x86_64")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--target=unused"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--python-version", python]
    done = subprocess.run(
        [*command, *platforms, f"{name}===no-such-version"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PIP_CONSTRAINT": os.devnull},  # a constraint would answer before the index does
    )
    found = _VERSIONS.search(done.stdout)
    if found is None:
        raise SystemExit(f"{pin}: pip did not say which versions there are: {done.stdout.strip()[-300:]}")
    return version in found[1].split(", ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
