"""ROME's hyper-parameters: every key of the upstream YAML files, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from easyeditor.errors import ConfigError
from easyeditor.methods.locate.hparams import LocateHyperParams


@dataclass(kw_only=True)
class ROMEHyperParams(LocateHyperParams):
    """ROME (Meng et al. 2022) and C-ROME (Yang et al. 2024)."""

    alg_name: Literal["ROME"] = "ROME"
    if_c_rome: bool = False
    """C-ROME: the mean key over contexts everywhere, which removes the collapse."""
    if_prefix: bool | Literal["all"] = False
    """Test-time prefix: evaluate the rewrite prompt behind one of the contexts; `all`: rephrase prompts too."""
    save_keys: bool = False
    """Upstream's key dumps; the keys are in every result's trace instead."""
    save_keys_path: str = "./save_keys_path"
    """Folder of upstream's key dumps."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.save_keys:
            raise ConfigError(
                f"{where}: save_keys: true is not supported; every edit keeps its keys in result.trace[layer].vectors"
            )
