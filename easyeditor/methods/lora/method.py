"""LoRA: fine-tuning through low-rank adapters, the baseline that people reach for; the adapters become the edit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.progress import Progress
from easyeditor.lm.adapters import AdapterSettings, adapted
from easyeditor.lm.architectures import Anatomy, max_positions, weight_is_transposed
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import Row, check_length, whole
from easyeditor.lm.tuned import TunedForward
from easyeditor.lm.weights import frozen
from easyeditor.methods.base import EditMethod, MemoryNeeds
from easyeditor.methods.fine_tuning import BYTES_TRAINED, Batch, Labels, Training, fine_tune, training_row
from easyeditor.methods.lora.hparams import LoRAHyperParams
from easyeditor.values.edit import EditRequest, EditResult, LayerTrace


class LoRA(EditMethod[LoRAHyperParams]):
    """LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685), by `peft`.

    Each edit trains fresh adapters on the model as it is, all requests together, with each target token (and an EOS) at
    its own position; the delta is scale * B A, exactly. As FT it takes no step below a loss of 0.01.
    """

    @classmethod
    def memory(cls, hparams: LoRAHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        return MemoryNeeds(of_edited=BYTES_TRAINED)

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: LoRAHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self.parts.check_layers(hparams.layers)
        self._paths = self._found()
        self.parts.check_dense(self.layers)

    def find_parts(self) -> Anatomy:
        return anatomy(self.model, **self.hparams.templates)

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
        made = [training_row(self.tok, request, "target_new", self.prompting) for request in requests]
        check_length([row.ids for row, _ in made], max_positions(self.model), lambda i: whole(requests[i]))

        def watch(epoch: int, epochs: int, loss: float) -> None:
            if progress is not None:
                progress(epoch, epochs, f"loss {loss:.3f}")

        settings = AdapterSettings(rank=h.rank, alpha=h.lora_alpha, dropout=h.lora_dropout)
        with frozen(self.model), adapted(self.model, list(self._paths), settings, h.seed) as adapters:
            batches = [self._batch(made[i : i + h.batch_size]) for i in range(0, len(made), h.batch_size)]
            training = Training(num_steps=h.num_steps, lr=h.lr, weight_decay=h.weight_decay, bound=None)
            epochs = fine_tune(adapters.trained(), batches, training, watch)
            deltas = adapters.deltas()
        norms = [delta.norm() for delta in deltas]
        return EditResult(
            method=h.alg_name,
            requests=tuple(requests),
            deltas=deltas,
            traces=tuple(self._trace([losses[n] for losses in epochs], norms) for n in range(len(requests))),
            seconds=time.perf_counter() - started,
        )

    def _batch(self, made: Sequence[tuple[Row, Labels]]) -> Batch:
        rows = [row for row, _ in made]
        forward = TunedForward(self.parts, rows, first=self.layers[0], replay=bool(self.hparams.replay))
        return Batch(forward=lambda _: forward({}), labels=tuple(labels for _, labels in made))  # adapters are in place

    def _trace(self, losses: Sequence[float], norms: Sequence[float]) -> dict[int, LayerTrace]:
        """One request's losses, and how far each layer's weights moved (for all requests together)."""
        moved = list(zip(self._paths.values(), norms, strict=True))
        return {
            layer: LayerTrace.without_keys(
                before=losses[0],
                after=losses[-1],
                steps=len(losses),
                delta_norm=math.hypot(*(norm for at, norm in moved if at == layer)),
                losses=losses,
            )
            for layer in self.layers
        }

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
