"""What flags of a command mean: which name places (read or written; `outputs.py` goes by it), which are counts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from easyeditor.base.errors import ConfigError


def declare(p: ArgumentParser, *reads: str, **writes: str) -> None:
    """Say which flags of `p`, by attribute, name files, folders or models that are read, and which name what is written
    (a key of `outputs.KINDS`). `places` of the parsed flags has (attribute, kind) by flag; "" for what is read."""
    names = {a.dest: (a.option_strings or [str(a.metavar)])[0] for a in p._actions}
    kinds = {**dict.fromkeys(reads, ""), **writes}
    p.set_defaults(places=(p.get_default("places") or {}) | {names[dest]: (dest, kind) for dest, kind in kinds.items()})


def at_least_one(args: Namespace, *flags: str) -> None:
    """Raise ConfigError for a number below 1."""
    for flag in flags:
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; allowed: 1 or more")
