"""Requests shared out over processes that torchrun started: who does what, and one journal of all in the end.

The processes talk through the run folder only, so one that dies takes no other with it, and torchrun may start them
again, all or some, at any time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.errors import ConfigError
from easyeditor.files import discard, write_text
from easyeditor.runs.journal import read_raw

RESULTS = "results.jsonl"
MOST_RANKS = 1_000_000
POLL = 0.2  # seconds between two looks at the run folder


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among `world` ones, `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

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
    """The rank torchrun's environment gives; alone without it.

    Raises:
        ConfigError: a variable that is no such number, or some of torchrun's variables without the others.
    """
    world = _number(env, "WORLD_SIZE", 1, range(1, MOST_RANKS))
    if world > 1 and "RANK" not in env:
        raise ConfigError(f"WORLD_SIZE is {world} and RANK is not set; start with torchrun, or unset WORLD_SIZE")
    return Rank(
        rank=_number(env, "RANK", 0, range(world)),
        world=world,
        local=_number(env, "LOCAL_RANK", 0, range(world)),
    )


def _number(env: Mapping[str, str], name: str, default: int, allowed: range) -> int:
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) in allowed):
        numbers = f"{allowed.start} to {allowed.stop - 1}"
        raise ConfigError(f"{name} is {text!r}; allowed: {numbers}, as torchrun sets it; unset it to run alone")
    return int(text)


@contextmanager
def process_group(rank: Rank) -> Iterator[None]:
    """torch's process group around the block when there are several processes.

    Raises:
        ConfigError: the processes do not find each other (MASTER_ADDR, MASTER_PORT).
    """
    if rank.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"the {rank.world} processes cannot form a group ({error}); start with torchrun") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for(path: Path) -> None:
    """Wait until the first rank has written `path`."""
    while not path.exists():
        time.sleep(POLL)


def wait_for_all(folder: Path, count: int) -> None:
    """Wait until all ranks together have recorded `count` requests."""
    while True:
        started = time.perf_counter()
        if sum(1 for line in recorded(folder) if line["kind"] != "evaluation") >= count:
            return
        time.sleep(max(POLL, 10 * (time.perf_counter() - started)))  # reading thousands of lines takes a while


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
