"""FT: fine-tuning of a few weights on the requests, the baseline of the papers; FT-L with a norm constraint; FT-M and
LocFT-BF."""

from __future__ import annotations

import difflib
import random
import time
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import Row
from easyeditor.lm.weights import difference, frozen, trainable
from easyeditor.methods.fine_tuning import Batch, FineTuning, Labels, Training, fine_tune, watching
from easyeditor.methods.ft.hparams import FTHyperParams
from easyeditor.values.edit import EditRequest, EditResult


class FT(FineTuning[FTHyperParams]):
    """Adam on copies of the chosen layers' weights, all requests together; the delta is what the copies moved by.

    `prompt_last` scores every target token at the prompt's last token (EasyEdit's first objective), `target_new` each
    at its own position (FT-M). LocFT-BF (arXiv 2509.22072) goes breadth first: batches over all requests, in a new
    order in every epoch, targets with their EOS. Each row's own length counts, whatever the batch; a BOS is never among
    the targets, a pad never scored.
    """

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
        made = self.training_rows(requests, h.objective_optimization)
        with frozen(self.model):
            copies = trainable(self.model, self.weight_names)
            orders = self._orders(len(made))
            fixed = list(self._batches(made, orders[0])) if all(order == orders[0] for order in orders) else None
            settings = Training(num_steps=h.num_steps, lr=h.lr, weight_decay=h.weight_decay, bound=h.bound)
            epochs = fine_tune(
                copies, fixed or (lambda n: self._batches(made, orders[n - 1])), settings, watching(progress)
            )
            deltas = tuple(difference(self.model, copies))
        norms = {delta.name: float(delta.dense().norm()) for delta in deltas}
        by_request = [dict(zip(order, losses, strict=True)) for losses, order in zip(epochs, orders, strict=False)]
        traces = [self.trained_trace(norms, [losses[n] for losses in by_request]) for n in range(len(requests))]
        return self.result(requests, deltas, traces, time.perf_counter() - started)

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
        return (self.batch([made[n] for n in order[i : i + size]]) for i in range(0, len(order), size))

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
