"""A script's main in the test's process, on tiny checkpoints and YAMLs of their own."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CONTEXTS, build, tokenizer

from easyeditor.commands import cli

SUBJECTS = ["Bay", "Roland", "Berlin", "東京", "Oslo"]
QUICK: dict[str, Any] = {"v_num_grad_steps": 3, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 2}
LOUD = ["--set", "v_num_grad_steps=8", "clamp_norm_factor=100", "v_lr=5"]


@dataclass(frozen=True)
class Ran:
    """How a script ended and what it wrote."""

    code: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as strict JSON: one document, no NaN."""
        return strict(self.out)


def strict(text: str) -> Any:
    """Parse JSON that holds no NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def save_tiny(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """A tiny model and its tokenizer as a checkpoint folder."""
    build(kind, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_yaml(path: Path, model: Path | str, **changes: Any) -> Path:
    """ROME hyper-parameters for a tiny model: layer 1, given contexts, six short steps."""
    values = {"alg_name": "ROME", "model_name": str(model), "device": "cpu", "layers": [1], "v_num_grad_steps": 6}
    values |= {"v_lr": 0.5, "v_loss_layer": 3, "v_weight_decay": 1e-3, "clamp_norm_factor": 4.0, "kl_factor": 0.0625}
    values |= {"mom2_adjustment": False, "context_templates": CONTEXTS}
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return path


def record_of(subject: str, target: str = "Italy") -> dict[str, Any]:
    """A flat record with a rephrase and a locality prompt."""
    return {
        "prompt": f"{subject}, which is located in",
        "subject": subject,
        "target_new": target,
        "rephrase_prompt": f"Where is {subject}? In",
        "locality_prompt": "The sea is",
        "locality_ground_truth": "blue",
    }


def stand_in(path: Path, kind: str) -> None:
    """Put something else than a regular file of a bounded size at `path`."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:  # one tebibyte of which nothing is on the disk
        path.touch()
        os.truncate(path, 1 << 40)


def five_requests(root: Path) -> Path:
    """A folder with a tiny model, its YAML (`rome.yaml`) and five requests (`five.json`)."""
    write_yaml(root / "rome.yaml", save_tiny(root / "llama"), **QUICK)
    (root / "five.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    return root


def memit_yaml(place: Path) -> Path:
    """In the folder of `five_requests` a MEMIT YAML, and statistics for it."""
    width = build("llama").model.layers[0].mlp.down_proj.in_features
    folder = place / "stats" / "llama" / "own_stats"
    folder.mkdir(parents=True)
    moment = {"mom2.constructor": "x", "mom2.count": 50, "mom2.mom2": 50 * np.eye(width, dtype=np.float32)}
    for layer in (1, 2):
        path = folder / f"model.layers.{layer}.mlp.down_proj_float32_mom2_50.npz"
        np.savez(path, **moment, sample_size=50)
    changes = {"layers": [1, 2], "mom2_adjustment": True, "mom2_update_weight": 10, "mom2_n_samples": 50}
    changes |= {"alg_name": "MEMIT", "stats_dir": str(place / "stats"), "mom2_dataset": "own"}
    return write_yaml(place / "memit.yaml", place / "llama", **{**QUICK, **changes})


def call(script: Any, args: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ran:
    """Run a script's main as its `__main__` does, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *map(str, args)])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(script.main)
    return Ran(ended.value.code, *capsys.readouterr())


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond the limit: a full disk as the kernel reports it (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forked(
    script: Any,
    flags: list[str],
    *,
    first: Callable[[], object] = lambda: None,
    err: Path | str = os.devnull,
    typed: str = "",
) -> int:
    """A script's main in a process of its own that has everything imported already; returns its id.

    `first` is called there before the script begins; its standard error goes to the file `err`. `typed` is its input.
    """
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests themselves were started with
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(err, "w")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        sys.stdin = TextIOWrapper(BytesIO(typed.encode()))
        sys.argv = [script.__name__.rpartition(".")[2], *flags]
        first()
        cli.run(script.main)
    except SystemExit as stopped:
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(int(stopped.code or 0))
    finally:
        os._exit(99)


def awaited(child: int) -> int:
    """Exit status of a child (negative: by a signal), waited for."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
