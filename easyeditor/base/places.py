"""Which flags of a command name places: each says whether it is read there or written; `outputs.py` goes by it."""

from __future__ import annotations

from argparse import ArgumentParser


def declare(p: ArgumentParser, *reads: str, **writes: str) -> None:
    """Say which flags of `p`, by attribute, name files, folders or models that are read, and which name what is written
    (a key of `outputs.KINDS`). `places` of the parsed flags has (attribute, kind) by flag; "" for what is read."""
    names = {a.dest: (a.option_strings or [str(a.metavar)])[0] for a in p._actions}
    kinds = {**dict.fromkeys(reads, ""), **writes}
    p.set_defaults(places=(p.get_default("places") or {}) | {names[dest]: (dest, kind) for dest, kind in kinds.items()})
