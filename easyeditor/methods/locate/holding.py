"""MEMIT's kind: what is held in place besides C. Axes: N requests, K key width, r rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import read_json_list
from easyeditor.lm.architectures import Anatomy
from easyeditor.methods.base import EditMethod, MemoryNeeds
from easyeditor.methods.locate.held import check_columns
from easyeditor.methods.locate.own_templates import OwnTemplates, Sums
from easyeditor.methods.locate.spread import SpreadMethod
from easyeditor.methods.locate.spread_hparams import SpreadHyperParams
from easyeditor.methods.locate.updates import answering
from easyeditor.methods.locate.value_search import Found
from easyeditor.methods.memory import Memory
from easyeditor.stats.factored import Factored
from easyeditor.stats.first_token import later_tokens
from easyeditor.values.edit import EditRequest, EditResult

S = TypeVar("S", bound=SpreadHyperParams)


class HoldingMethod(SpreadMethod[S], Generic[S]):
    """What is held in place before an edit is

        H = lambda C + gamma I + w_S S + w_P P + w_P M_own + K_p K_p^T,

    S and P the second moments of short sentences and of listed prompts, M_own the mean over edits of that of their own
    prompts with other names in them. `mom2_update_weight` 0 leaves C out. Source: docs/methods.md.
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: S) -> None:
        super().__init__(model, tok, hparams)
        h = hparams
        if h.held_short_weight:
            self.statistics.texts.append((h.held_short_weight / h.scale, later_tokens(tok)))
        if h.held_prompts is not None:
            texts = later_tokens(tok, prompts_of(Path(h.held_prompts)))
            self.statistics.texts.append((h.held_prompt_weight / h.scale, texts))
        self._own = OwnTemplates(self, h) if h.held_own_templates else None
        self._sums: Memory[Sums] = Memory(Sums(), self._after)
        self._now = Sums()
        self.own_moments: Mapping[str, Tensor] = {}
        """M_own of the edit that is being computed, `own.<layer>` -> F (K, r), M_own = F F^T."""

    @classmethod
    def memory(cls, hparams: S, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """C, and the sum that takes its place; with own templates K_p K_p^T, the sum of M_own and what is solved."""
        h, needs = hparams, super().memory(hparams, parts)
        texts = h.held_short_weight > 0 or h.held_prompts is not None
        return replace(needs, matrices=needs.matrices + texts + 3 * (h.held_own_templates > 0))

    @property
    def ridge(self) -> float:
        """gamma."""
        return 0.0

    @property
    def uses_statistics(self) -> bool:
        return self.hparams.mom2_update_weight > 0

    def raised(self, layer: int) -> Factored:
        """lambda C + gamma I + w_S S + w_P P, divided by `scale`."""
        ridge = self.ridge / self.hparams.scale
        return self.statistics.raised(layer, ridge, with_moment=self.uses_statistics)

    def unedited(self, layer: int, keys_KN: Tensor) -> Tensor:
        return self.raised(layer).solve(keys_KN) / self.hparams.scale

    def unedited_inverse(self, layer: int) -> Tensor:
        return self.raised(layer).inverse() / self.hparams.scale

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        if self._own is None:
            return super().solve(layer, keys_KN, residual_DN)
        return residual_DN, answering(keys_KN, self.whitened(layer, keys_KN), 1.0).T

    def whitened(self, layer: int, keys_KN: Tensor) -> Tensor:
        """H^-1 K, without K_p where there are no own templates (`inverse` has it)."""
        if self._own is None:
            return self.unedited(layer, keys_KN)
        return Factored(self._with_own(layer)).solve(keys_KN)

    def _with_own(self, layer: int) -> Tensor:
        """H, made anew for every edit: M_own is a mean, so each edit changes all of it."""
        held_KK = self.raised(layer).matrix_KK * self.hparams.scale
        weight = self.hparams.held_prompt_weight / max(1, self._now.edits)
        for factor, sum_KK in ((weight, self._now.own.get(layer)), (1.0, self._now.keys.get(layer))):
            if sum_KK is not None:
                held_KK = held_KK + factor * sum_KK.to(held_KK)
        return held_KK

    def _written(self, requests: Sequence[EditRequest], found: list[Found], started: float) -> EditResult:
        if self._own is not None:
            self.own_moments = self._own.read(requests)
            self._now = self._sums.state.after(self.own_moments)
        return super()._written(requests, found, started)

    def _after(self, sums: Sums, memory: Mapping[str, Tensor]) -> Sums:
        for name, columns in memory.items():
            check_columns(name, columns, self.parts.key_width(int(name.rpartition(".")[2])))
        return sums.after(memory)

    def check(self, request: EditRequest) -> None:
        super().check(request)
        if self._own is not None:
            self._own.rows([request])

    def committed(self, result: EditResult) -> None:
        (self._earlier if self._own is None else self._sums).committed(result)

    def reverted(self, result: EditResult | None) -> None:
        (self._earlier if self._own is None else self._sums).reverted(result)

    def take_over(self, other: EditMethod[Any]) -> None:
        super().take_over(other)
        if isinstance(other, HoldingMethod):
            self._sums = other._sums


def prompts_of(path: Path) -> list[str]:
    """The texts of a JSON list. Raises ConfigError: not such a list, or an empty one."""
    found = read_json_list(path, "held_prompts")
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ConfigError(f"{path}: held_prompts must be a list of texts, none of them empty")
    return found
