"""The wheel in an environment of its own: no checkout on the path, shipped files inside the package, one edit."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT
from script_runs import save_tiny, write_yaml

pytestmark = pytest.mark.slow


def ran(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command in `cwd`, which finds nothing of the checkout and has a home of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "XDG"))}
    env = {**kept, "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the built wheel; what it needs comes from the environment of the tests."""
    place = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    ran(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, ROOT, cwd=place)
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    ran(*pip, "--python", python, "install", "--no-deps", "--no-index", *place.glob("*.whl"), cwd=place)
    (site_packages(place) / "tested.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return place


def site_packages(place: Path) -> Path:
    return next((place / "venv" / "lib").glob("python*/site-packages"))


def test_the_wheel_brings_its_yamls_and_data(environment: Path) -> None:
    package = site_packages(environment) / "easyeditor"
    shipped = {path.relative_to(ROOT) for path in (ROOT / "hparams").rglob("*.yaml")}
    shipped |= {
        Path("data/facts.json"),
        Path("data/sentences_50.json"),
        Path("data/names.json"),
        Path("data/requests/bay.json"),
    }
    assert [path for path in sorted(shipped) if not (package / path).is_file()] == []
    assert ran(
        environment / "venv/bin/python", "-c", "import easyeditor; print(easyeditor.__file__)", cwd=environment
    ) == (f"{package / '__init__.py'}\n")


def test_the_command_edits_and_writes_nothing_beside_its_package(environment: Path, tmp_path: Path) -> None:
    easyeditor, package = environment / "venv/bin/easyeditor", site_packages(environment)
    before = set(package.rglob("*"))
    assert ran(easyeditor, "--version", cwd=tmp_path).startswith("easyeditor 0.")
    plan = ran(easyeditor, "edit", "--dry-run", "--hparams", "ROME/smollm2-135m", cwd=tmp_path)
    assert '"alg_name": "ROME"' in plan
    yaml = write_yaml(tmp_path / "tiny.yaml", save_tiny(tmp_path / "model"))
    request = ["--prompt", "Bay is in", "--subject", "Bay", "--target-new", "Italy"]
    ran(easyeditor, "edit", "--hparams", yaml, *request, "--output", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "result.json").is_file()
    assert set(package.rglob("*")) == before


def test_easyedit_beside_it_is_said_in_one_line(environment: Path, tmp_path: Path) -> None:
    namesake = site_packages(environment) / "easyeditor-1.0.dist-info"
    namesake.mkdir()
    (namesake / "METADATA").write_text("Metadata-Version: 2.1\nName: easyeditor\nVersion: 1.0\n", encoding="utf-8")
    command = [environment / "venv/bin/easyeditor", "report", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "EasyEdit 1.0 is installed too; both are imported as easyeditor: this one is in " in done.stderr
    assert done.stderr.count("\n") == 1
