"""FT: fine-tuning of a few weights on the requests, the baseline of the papers; FT-L with a norm constraint; FT-M and
LocFT-BF."""

from __future__ import annotations

import difflib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy, max_positions
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import Row, check_length, whole
from easyeditor.lm.tuned import TunedForward
from easyeditor.lm.weights import difference, frozen, trainable
from easyeditor.methods.base import EditMethod, MemoryNeeds
from easyeditor.methods.fine_tuning import BYTES_TRAINED, Batch, Labels, Training, fine_tune, training_row
from easyeditor.methods.ft.hparams import FTHyperParams
from easyeditor.values.edit import EditRequest, EditResult, LayerTrace


class FT(EditMethod[FTHyperParams]):
    """Adam on copies of the chosen layers' weights, all requests together; the delta is what the copies moved by.

    `prompt_last` scores every target token at the prompt's last token (EasyEdit's first objective), `target_new` each
    at its own position (FT-M). LocFT-BF (arXiv 2509.22072) goes breadth first: batches over all requests, in a new
    order in every epoch, targets with their EOS. Each row's own length counts, whatever the batch; a BOS is never among
    the targets, a pad never scored.
    """

    @classmethod
    def memory(cls, hparams: FTHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        return MemoryNeeds(of_edited=BYTES_TRAINED)

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: FTHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self.parts.check_layers(hparams.layers)
        self._names = {layer: self._names_at(layer) for layer in hparams.layers}

    def find_parts(self) -> Anatomy:
        names = self.hparams.templates
        rewrite = names["rewrite"]
        named = dict(self.model.named_modules())
        if rewrite is not None and (rewrite.format(0) not in named or any(named[rewrite.format(0)].children())):
            names["rewrite"] = (
                None  # part of a name, or a module of several: good as a filter, no projection to look at
            )
        return anatomy(self.model, **names)

    @property
    def title(self) -> str:
        return super().title + ("" if self.hparams.bound is None else "-L")

    @property
    def layers(self) -> list[int]:
        return list(self.hparams.layers)

    @property
    def weight_names(self) -> list[str]:
        return [name for names in self._names.values() for name in names]

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        """One dense delta per trained weight, for all `requests` at once."""
        started = time.perf_counter()
        h = self.hparams
        made = [training_row(self.tok, request, h.objective_optimization, self.prompting) for request in requests]
        check_length([row.ids for row, _ in made], max_positions(self.model), lambda i: whole(requests[i]))

        def watch(epoch: int, epochs: int, loss: float) -> None:
            if progress is not None:
                progress(epoch, epochs, f"loss {loss:.3f}")

        with frozen(self.model):
            copies = trainable(self.model, self.weight_names)
            orders = self._orders(len(made))
            fixed = list(self._batches(made, orders[0])) if all(order == orders[0] for order in orders) else None
            settings = Training(num_steps=h.num_steps, lr=h.lr, weight_decay=h.weight_decay, bound=h.bound)
            epochs = fine_tune(copies, fixed or (lambda n: self._batches(made, orders[n - 1])), settings, watch)
            deltas = tuple(difference(self.model, copies))
        norms = {delta.name: float(delta.dense().norm()) for delta in deltas}
        by_request = [dict(zip(order, losses, strict=True)) for losses, order in zip(epochs, orders, strict=False)]
        return EditResult(
            method=h.alg_name,
            requests=tuple(requests),
            deltas=deltas,
            traces=tuple(self._trace([losses[n] for losses in by_request], norms) for n in range(len(requests))),
            seconds=time.perf_counter() - started,
        )

    def _orders(self, count: int) -> list[list[int]]:
        """The order of the requests in each epoch; where one batch holds them all, always the same."""
        order = list(range(count))
        if not self.hparams.shuffle or count <= self.hparams.batch_size:
            return [order] * self.hparams.num_steps
        orders, draw = [], random.Random(self.hparams.seed)
        for _ in range(self.hparams.num_steps):
            draw.shuffle(order)  # LocFT's own: what the epoch before left is shuffled
            orders.append(list(order))
        return orders

    def _batches(self, made: Sequence[tuple[Row, Labels]], order: Sequence[int]) -> Iterator[Batch]:
        size = self.hparams.batch_size
        return (self._batch([made[n] for n in order[i : i + size]]) for i in range(0, len(order), size))

    def _batch(self, made: Sequence[tuple[Row, Labels]]) -> Batch:
        rows = [row for row, _ in made]
        forward = TunedForward(self.parts, rows, first=min(self.layers), replay=bool(self.hparams.replay))
        return Batch(forward=forward, labels=tuple(labels for _, labels in made))

    def _trace(self, losses: Sequence[float], norms: Mapping[str, float]) -> dict[int, LayerTrace]:
        """One request's losses, and how far each layer's weights moved (for all requests together)."""
        return {
            layer: LayerTrace.without_keys(
                before=losses[0],
                after=losses[-1],
                steps=len(losses),
                delta_norm=math.hypot(*(norms[name] for name in names)),
                losses=losses,
            )
            for layer, names in self._names.items()
        }

    def _names_at(self, layer: int) -> list[str]:
        """Parameters whose name contains the template: for "….c_proj" its weight and its bias.

        Raises:
            ConfigError: none does, or one of another layer. ModelError: one holds no floating-point numbers.
        """
        template = self.hparams.rewrite_module_tmp or self.parts.architecture.rewrite
        part, kind = template.format(layer), type(self.model).__name__
        named = dict(self.model.named_parameters())
        found = [name for name in named if part in name]
        if not found:
            near = difflib.get_close_matches(part, named, n=1, cutoff=0.3)
            hint = f"; near: {near[0].replace(f'.{layer}.', '.{}.', 1)!r}" if near else ""
            raise ConfigError(f"rewrite_module_tmp: {template!r} is part of no parameter's name in {kind}{hint}")
        for name in found:
            if self.parts.layer_of(name) != layer:
                raise ConfigError(f"rewrite_module_tmp: {part!r} also names {name!r}, which is not in layer {layer}")
            if not named[name].is_floating_point():
                raise ModelError(f"{name} holds {named[name].dtype}, which cannot be trained; load unquantised weights")
        return found
