"""LoRA: fine-tuning through low-rank adapters, the baseline that people reach for; the adapters become the edit."""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.progress import Progress
from easyeditor.lm.adapters import AdapterSettings, adapted
from easyeditor.lm.architectures import weight_is_transposed
from easyeditor.lm.weights import frozen
from easyeditor.methods.fine_tuning import FineTuning, Training, fine_tune, watching
from easyeditor.methods.lora.hparams import LoRAHyperParams
from easyeditor.values.edit import EditRequest, EditResult


class LoRA(FineTuning[LoRAHyperParams]):
    """LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685), by `peft`.

    Each edit trains fresh adapters on the model as it is, all requests together, with each target token (and an EOS) at
    its own position; the delta is scale * B A, exactly. As FT it takes no step below a loss of 0.01.
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: LoRAHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self.parts.check_layers(hparams.layers)
        self._paths = self._found()
        self.parts.check_dense(self.layers)

    @property
    def layers(self) -> list[int]:
        return sorted(set(self._paths.values()))

    @property
    def weight_names(self) -> list[str]:
        return [f"{path}.weight" for path in self._paths]

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """One delta of rank `rank` per adapted module, for all `requests` at once."""
        started = time.perf_counter()
        h = self.hparams
        made = self.training_rows(requests, "target_new")
        settings = AdapterSettings(rank=h.rank, alpha=h.lora_alpha, dropout=h.lora_dropout)
        with frozen(self.model), adapted(self.model, list(self._paths), settings, h.seed) as adapters:
            parts = [made[i : i + h.batch_size] for i in range(0, len(made), h.batch_size)]
            batches = [self.batch(part, in_place=True) for part in parts]
            training = Training(num_steps=h.num_steps, lr=h.lr, weight_decay=h.weight_decay, bound=None)
            epochs = fine_tune(adapters.trained(), batches, training, watching(progress))
            deltas = adapters.deltas()
        norms = {delta.name: delta.norm() for delta in deltas}
        traces = [self.trained_trace(norms, [losses[n] for losses in epochs]) for n in range(len(requests))]
        return self.result(requests, deltas, traces, time.perf_counter() - started)

    def _found(self) -> dict[str, int]:
        """The adapted modules' paths and blocks. Raises ConfigError where one of `target_modules` is none."""
        found: dict[str, int] = {}
        for end in self.hparams.target_modules:
            ours = [path for path, _ in self.model.named_modules() if f".{path}".endswith(f".{end}")]
            inside = {path: layer for path in ours if (layer := self.parts.layer_of(f"{path}.weight")) is not None}
            chosen = {p: n for p, n in inside.items() if not self.hparams.layers or n in self.hparams.layers}
            if not chosen:
                near = self.parts.rewrite_name(0).rpartition(".")[2]
                where = f" in layers {self.hparams.layers}" if self.hparams.layers else ""
                raise ConfigError(
                    f"target_modules: {end!r} ends no module's path in the blocks of {type(self.model).__name__}{where}"
                    f"; it has for example {near!r}"
                )
            for path in chosen:
                weight_is_transposed(self.model.get_submodule(path))
            found |= chosen
        return found
