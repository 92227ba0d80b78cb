"""Where shipped files are: `hparams/` and `data/` at the top of a checkout, inside the package of an installed copy."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "hparams").is_dir() else None
"""The folder of a checkout; None for an installed copy."""
SHIPPED = CHECKOUT or _PACKAGE
"""The folder that holds `hparams/` and `data/`. Nothing is written below it where the package is installed."""


def cache_folder() -> Path:
    """Where fetched models and corpora are kept: the checkout; of an installed copy `$XDG_CACHE_HOME/easyeditor`, or
    `~/.cache/easyeditor`."""
    if CHECKOUT is not None:
        return CHECKOUT
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyeditor"
