"""EMMET's hyper-parameters: every key of the authors' and EasyEdit's files."""

from __future__ import annotations

from dataclasses import dataclass

from easyeditor.methods.locate.spread_hparams import SpreadHyperParams


@dataclass(kw_only=True)
class EMMETHyperParams(SpreadHyperParams):
    """EMMET (Gupta et al. 2024). λ (`mom2_update_weight`) is 1000 (GPT2-XL) or 1 in the authors' files, 10,000 or
    100,000 in EasyEdit's: `emmet_lambda` weighs against it, so the two are different methods."""

    alg_name: str = "EMMET"
    emmet_lambda: float = 0.1
    """Added to the diagonal of the equality constraints, which several similar keys cannot meet at once."""
    emmet_lambda_single: bool = False
    """Add it for a single request too, as EasyEdit does; the authors do not."""
    update_norm_lambda: float = 0.0
    """Multiple of the identity added to λC."""

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_nonnegative(where, "emmet_lambda", "update_norm_lambda")
