"""Requests shared out over processes that torchrun started: who does what, and how they wait for each other.

The processes talk through the run folder only, so one that dies takes no other with it, and torchrun may start them
again, all or some, at any time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams
from easyeditor.results.lines import EvaluationLine
from easyeditor.results.run import RANKS, RESULTS, recorded

MOST_RANKS = 1_000_000
PATIENCE = timedelta(hours=24)  # a process waits this long for one that has more to do; torchrun ends all if one dies
POLL = 0.2  # seconds between two looks at the run folder

H = TypeVar("H", bound=HyperParams)


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
        return RESULTS if self.world == 1 else RANKS.replace("*", str(self.rank))

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


def own_device(rank: Rank, device: int | str, *, flag: bool = False, model_parallel: bool = False) -> int | str:
    """Where this process computes. Of several each takes the card of its local rank, whatever card `device` names; what
    is no card (`cpu`) stays.

    Raises:
        ConfigError: several processes, and a model spread over all cards, or one card for all of them by --device
            (`flag`).
    """
    if rank.world == 1:
        return device
    if model_parallel:
        raise ConfigError(
            f"model_parallel with {rank.world} processes: each would spread its model over all cards; start one, "
            "or leave model_parallel out"
        )
    if not (str(device).isdigit() or str(device).startswith("cuda")):
        return device
    if flag and device != "cuda":
        raise ConfigError(
            f"--device {device} with {rank.world} processes: all would compute there; leave it out, and each takes the "
            "card of its local rank (CUDA_VISIBLE_DEVICES chooses the cards)"
        )
    return rank.local


def placed(hparams: H, rank: Rank, *, flag: bool = False) -> H:
    """The hyper-parameters with this process's `own_device`; `flag`: --device was given. Raises ConfigError as that."""
    device = own_device(rank, hparams.device, flag=flag, model_parallel=hparams.model_parallel)
    return hparams if device == hparams.device else hparams.override([f"device={device}"])


@contextmanager
def process_group(rank: Rank) -> Iterator[None]:
    """torch's process group around the block when there are several processes; on GPUs each takes the card of its
    local rank, and what lies on the CPU (objects, counts) travels by gloo.

    Raises:
        ConfigError: more processes than cards, or they do not find each other (MASTER_ADDR, MASTER_PORT).
    """
    if rank.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    cards = torch.cuda.device_count() if torch.cuda.is_available() else rank.world
    if rank.local >= cards:
        raise ConfigError(
            f"process {rank.local + 1} of this machine, which has {cards} cards; start torchrun with "
            f"--nproc-per-node {cards}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    try:
        if torch.cuda.is_available():
            card = torch.device("cuda", rank.local)
            torch.cuda.set_device(card)  # else whatever names no device lands on card 0, every process's
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=card, timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
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
        if sum(1 for line in recorded(folder) if not isinstance(line, EvaluationLine)) >= count:
            return
        time.sleep(max(POLL, 10 * (time.perf_counter() - started)))  # reading thousands of lines takes a while
