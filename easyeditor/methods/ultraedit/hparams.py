"""UltraEdit's hyper-parameters: the keys of the upstream files that mean something here."""

from __future__ import annotations

from dataclasses import dataclass

from easyeditor.base.hparams import require
from easyeditor.methods.hparams import ModuleHyperParams


@dataclass(kw_only=True)
class UltraEditHyperParams(ModuleHyperParams):
    """UltraEdit (Gu et al. 2025): one closed-form step along normalised gradients."""

    alg_name: str = "UltraEdit"
    inner_params: list[str]
    """Linear (or Conv1D) modules that are edited, with or without `.weight`."""
    lr: float = 1e-6
    """Size of the step; the update grows in proportion."""
    batch_size: int = 10
    """Requests whose gradient is that of one mean loss, where `batch_size_once` is not given."""
    batch_size_once: int | None = None
    """The same under EasyEdit's name; EasyEdit's `batch_size` is then the number of edits in a batch edit."""

    @property
    def together(self) -> int:
        """Requests whose gradient is that of one mean loss."""
        return self.batch_size_once or self.batch_size

    def validate(self, where: str) -> None:
        super().validate(where)
        names = [name.removesuffix(".weight") for name in self.inner_params]
        require(len(set(names)) == len(names) > 0, where, "inner_params", self.inner_params, "each module once")
        self.need_positive(where, "lr")
        self.need_positive(where, "batch_size", allowed="1 or more")
        self.need_positive(where, "batch_size_once", allowed="1 or more, or null")
