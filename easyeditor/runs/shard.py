"""Requests shared out over processes that torchrun started: who does what, and one journal of all in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from easyeditor.files import discard, write_text
from easyeditor.runs.journal import read_raw

RESULTS = "results.jsonl"
PATIENCE = timedelta(days=30)  # ranks end at very different times; a rank that dies is torchrun's business


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among `world` ones, `local` on its machine; `restart` counts torchrun's restarts."""

    rank: int = 0
    world: int = 1
    local: int = 0
    restart: int = 0

    @property
    def first(self) -> bool:
        """Is this the process that writes what all share?"""
        return self.rank == 0

    @property
    def journal(self) -> str:
        """Name of this process's journal."""
        return RESULTS if self.world == 1 else f"results.rank{self.rank}.jsonl"

    def share(self, numbers: Sequence[int]) -> list[int]:
        """The numbers that fall to this process: number % world == rank."""
        return [number for number in numbers if number % self.world == self.rank]


def rank_of(env: Mapping[str, str]) -> Rank:
    """The rank torchrun's environment gives; alone without it."""
    return Rank(
        rank=int(env.get("RANK", "0")),
        world=int(env.get("WORLD_SIZE", "1")),
        local=int(env.get("LOCAL_RANK", "0")),
        restart=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


@contextmanager
def group(rank: Rank) -> Iterator[Barrier]:
    """A barrier for all ranks inside the block; none alone."""
    if rank.world == 1:
        yield Barrier(grouped=False)
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Barrier(grouped=True)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Barrier:
    """Calling it waits for all ranks."""

    grouped: bool

    def __call__(self) -> None:
        if self.grouped:
            import torch.distributed as dist

            dist.barrier()


def journals(folder: Path) -> list[Path]:
    """The journals in a run folder: the merged one, then the ranks'."""
    return [path for path in (folder / RESULTS, *sorted(folder.glob("results.rank*.jsonl"))) if path.exists()]


def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line recorded by any rank, each once."""
    for _, line in _lines(folder):
        yield line


def merge(folder: Path) -> None:
    """Put all ranks' lines into `results.jsonl`, in the order of the dataset, and remove the ranks' journals.

    Killed at any moment it can be done again: the merged file is whole before a rank's goes.
    """
    ranks = sorted(folder.glob("results.rank*.jsonl"))
    if not ranks:
        return
    lines = sorted(((line["index"], raw) for raw, line in _lines(folder)), key=lambda item: item[0])
    write_text(folder / RESULTS, b"".join(raw for _, raw in lines).decode())
    for path in ranks:
        discard(path)


def identity(line: Mapping[str, Any]) -> tuple[str, int]:
    """What a line is about: two lines of one identity would be work done twice."""
    kind = "evaluation" if line["kind"] == "evaluation" else "screen" if line["kind"] == "screen" else "edit"
    return kind, line["after"] if kind == "evaluation" else line["index"]


def _lines(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    seen: set[tuple[str, int]] = set()
    for path in journals(folder):
        for raw, line in read_raw(path):
            known = identity(line)
            if known not in seen:
                seen.add(known)
                yield raw, line
