"""What is written never costs what was there: private scratch, nothing half-made, no target on an input or another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build, tokenizer

from easyeditor.errors import OutputError
from easyeditor.files import whole_file, write_json, write_tensors, write_text
from easyeditor.lm.loading import save

WRITERS = [
    pytest.param(lambda place: write_text(place, "x"), id="text"),
    pytest.param(lambda place: write_tensors(place, {"a": torch.ones(1)}), id="tensors"),
    pytest.param(lambda place: save(build("llama"), tokenizer(), place), id="model"),
]


def content(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes by its place below `root`; None for a folder."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


# Scratch


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("theirs", ["new.part", "new.part/mine", "new.tmp"])
def test_a_neighbour_with_a_likely_name_stays(tmp_path: Path, theirs: str, write: Callable[[Path], None]) -> None:
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("mine")
    before = content(tmp_path)
    write(tmp_path / "new")
    assert {name: value for name, value in content(tmp_path).items() if name.split("/")[0] != "new"} == before


STOPS = [(KeyboardInterrupt(), KeyboardInterrupt), (TypeError("x"), TypeError), (OSError("full"), OutputError)]


@pytest.mark.parametrize(("stop", "seen"), STOPS)
def test_whatever_ends_a_write_leaves_nothing(tmp_path: Path, stop: BaseException, seen: type[BaseException]) -> None:
    def write() -> None:
        with whole_file(tmp_path / "new") as part:
            part.write_text("half")
            raise stop

    with pytest.raises(seen):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_not_unicode_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "new", {"key": "\ud800"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "seen"), STOPS)
def test_whatever_ends_the_saving_of_a_model_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, seen: type[BaseException]
) -> None:
    tok = tokenizer()

    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(tok, "save_pretrained", fail)
    with pytest.raises(seen):
        save(build("llama"), tok, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_saved_model_is_as_readable_as_other_files(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/file").write_text("x")
        save(build("llama"), tokenizer(), tmp_path / "new")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "new").iterdir()} == {(tmp_path / "folder/file").stat().st_mode}
