"""ROME's hyper-parameters: every key of the upstream YAML files, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from easyeditor.base.errors import ConfigError
from easyeditor.methods.locate.hparams import LocateHyperParams


@dataclass(kw_only=True)
class ROMEHyperParams(LocateHyperParams):
    """ROME (Meng et al. 2022) and C-ROME (Yang et al. 2024)."""

    alg_name: str = "ROME"
    if_c_rome: bool = False
    """C-ROME: the mean key over contexts everywhere, which removes the collapse."""
    if_prefix: bool | Literal["all"] = False
    """Test-time prefix: evaluate the rewrite prompt behind one of the contexts; `all`: rephrase prompts too."""
    consistent_value: bool = False
    """Take the initial value v0 as the mean over contexts too, not from the bare prompt; needs `if_c_rome: true`."""
    both_keys: bool = False
    """For a subject that is the text's first token: an offset of its own for the bare prompt, found on it alone, and
    both written by one update of rank two; needs `consistent_value: true`."""
    bare_v_lr: float | None = None
    """Adam step size of the bare prompt's search with `both_keys`; null: `v_lr`. Small steps find a shorter offset."""
    bare_num_grad_steps: int | None = None
    """Most forward passes of that search; null: `v_num_grad_steps`."""
    save_keys: bool = False
    """Write the keys of every edit as upstream does: `C_keys_with_prefix/`, `keys_without_prefix/` and
    `keys_with_prefix/` below `save_keys_path`, `keyN.npy` in each."""
    save_keys_path: str = "./save_keys_path"
    """Folder of the key dumps."""

    def reads(self) -> dict[str, Any]:
        return {**super().reads(), "save_keys_path": self.save_keys_path if self.save_keys else None}

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "bare_v_lr", allowed="a number above 0, or null")
        self.need_positive(where, "bare_num_grad_steps", allowed="1 or more, or null")
        if self.bare_v_lr is not None and self.v_optimizer != "adam":
            raise ConfigError(f"{where}: bare_v_lr is a step size of Adam, and v_optimizer is {self.v_optimizer}")
        if self.both_keys and not self.consistent_value:
            raise ConfigError(f"{where}: both_keys: true needs if_c_rome: true and consistent_value: true")
        if self.consistent_value and not self.if_c_rome:
            raise ConfigError(
                f"{where}: consistent_value: true needs if_c_rome: true; a mean value with the bare prompt's key is "
                "neither ROME nor C-ROME"
            )
