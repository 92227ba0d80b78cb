"""The one table of methods. A new method, or a variant of one, is one row.

Texts only: what a row names is imported when it is asked for, so that reading this loads neither torch nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: where it lives (`module:Class`), and what its name stands for."""

    title: str
    """The method's name as a reader knows it."""
    hparams: str
    """Class of its hyper-parameters."""
    method: str
    """Class of its code."""
    paper: str
    """Where it is published."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters the name stands for; another value is refused."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters taken where the file does not give them."""
    spellings: tuple[str, ...] = ()
    """Other ways `alg_name` is written in the field's files."""


METHODS: dict[str, MethodRow] = {
    "ROME": MethodRow(
        title="ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2202.05262",
    ),
    "C-ROME": MethodRow(
        title="C-ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2406.11263",
        preset={"if_c_rome": True},
        defaults={"if_prefix": True},
        spellings=("C_ROME",),
    ),
    "FTP-ROME": MethodRow(
        title="FTP-ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="docs/first-token-protection.md",
        preset={"if_c_rome": True, "consistent_value": True, "protect_first_tokens": True, "both_keys": True},
    ),
    "MEMIT": MethodRow(
        title="MEMIT",
        hparams="easyeditor.methods.memit.hparams:MEMITHyperParams",
        method="easyeditor.methods.memit.method:MEMIT",
        paper="https://arxiv.org/abs/2210.07229",
    ),
    "MEND": MethodRow(
        title="MEND",
        hparams="easyeditor.methods.mend.hparams:MENDHyperParams",
        method="easyeditor.methods.mend.method:MEND",
        paper="https://arxiv.org/abs/2110.11309",
    ),
    "FT": MethodRow(
        title="FT",
        hparams="easyeditor.methods.ft.hparams:FTHyperParams",
        method="easyeditor.methods.ft.method:FT",
        paper="https://arxiv.org/abs/2012.00363",
    ),
}
