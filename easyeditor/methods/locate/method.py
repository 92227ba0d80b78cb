"""What ROME, MEMIT and their variants share: parts, contexts, statistics, deltas.

Axes: K key width, D model width, r rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import Anatomy, attention_reach, longest, weight_is_transposed
from easyeditor.lm.budget import Budget, free_bytes, tokens_for
from easyeditor.lm.discover import anatomy, replay_checked
from easyeditor.lm.recording import SharedStarts
from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT, Row, begins_texts_with_bos, check_length, encode, whole
from easyeditor.lm.weights import fingerprint, frozen, snapshot
from easyeditor.methods.base import EditMethod, MemoryNeeds
from easyeditor.methods.locate.contexts import generated_contexts, given_contexts
from easyeditor.methods.locate.filters import FILTERS, NEED_ORIGINALS
from easyeditor.methods.locate.hparams import LocateHyperParams
from easyeditor.methods.locate.rows import kl_row, target_rows
from easyeditor.methods.locate.search_cache import SearchCache
from easyeditor.methods.locate.statistics import Statistics
from easyeditor.methods.locate.value_search import Begun, Found, RowLabels, Search, Watch, search_values
from easyeditor.stats.factored import Factored
from easyeditor.values.edit import EditRequest, WeightDelta

LOG = logging.getLogger(__name__)

TURNS = 2  # batches of a search that a group of mode single fills on a GPU, so that some wait for places
LOOKED_AT = 64  # requests whose rows say how many a batch holds

L = TypeVar("L", bound=LocateHyperParams)


class LocateMethod(EditMethod[L], Generic[L]):
    """A method that rewrites the MLP's output projection at given layers, by keys and values at a lookup token."""

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: L) -> None:
        super().__init__(model, tok, hparams)
        self.parts.check_layers(hparams.layers)
        self.parts.check_range([hparams.v_loss_layer], "v_loss_layer")
        last = len(self.parts.blocks) - 1
        if hparams.v_loss_layer != last:
            where = f"{type(model).__name__}'s last layer gives the loss"
            raise ConfigError(f"v_loss_layer is {hparams.v_loss_layer}; allowed: {last}, because {where}")
        given = hparams.context_templates
        self._groups = None if given is None else given_contexts(given)
        self.statistics = Statistics(self.parts, tok, hparams)
        self._originals = snapshot(model, self.weight_names) if NEED_ORIGINALS & {*hparams.filters} else {}
        self._starts: tuple[tuple[str, ...], SharedStarts] | None = None
        self._warned = False

    @classmethod
    def memory(cls, hparams: L, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """C, and with `protect_first_tokens` what takes its place; both factored."""
        return MemoryNeeds(matrices=hparams.mom2_adjustment + hparams.protect_first_tokens)

    @cached_property
    def _search_budget(self) -> Budget:
        return Budget(tokens_for(self.parts, self.hparams.batch_tokens, gradients=True))

    def together(self, requests: Sequence[EditRequest]) -> int:
        """On a GPU twice what a batch of value searches holds: those that wait take the places of those that end."""
        if free_bytes(self.parts) is None:
            return super().together(requests)
        sizes = []
        for request in requests[:LOOKED_AT]:
            with suppress(DataError):  # said where its turn comes
                sizes.append(_tokens(self.search_rows(request)[0]))
        held = self._search_budget.tokens * len(sizes) // max(1, sum(sizes))
        return max(super().together(requests), TURNS * held)

    def find_parts(self) -> Anatomy:
        parts = anatomy(self.model, **self.hparams.templates)
        if self.hparams.replay == "check" and not parts.architecture.replay:
            parts, said = replay_checked(parts)
            LOG.debug("%s: %s", type(self.model).__name__, said)
        return parts

    @property
    def weight_names(self) -> list[str]:
        return [self.parts.weight_name(layer) for layer in self.layers]

    @property
    def layers(self) -> list[int]:
        return list(self.hparams.layers)

    @property
    def contexts(self) -> tuple[str, ...]:
        return tuple(text for group in self.context_groups for text in group)

    @property
    def context_groups(self) -> list[list[str]]:
        """The contexts in groups, generated on first use from the method's seeded generator."""
        if self._groups is None:
            params = self.context_lengths()
            with frozen(self.model):
                self._groups = [[t] for t in generated_contexts(self.model, self.tok, params, self.generator)]
        return self._groups

    def use_contexts(self, contexts: Sequence[str]) -> None:
        if self.hparams.context_templates is None:
            self._groups = [[text] for text in contexts]

    def prepare(self) -> None:
        """Contexts are generated and statistics read (or collected) now."""
        _ = self.context_groups
        for layer in self.layers:
            self.ready(layer)

    def ready(self, layer: int) -> None:
        """What an update at `layer` is solved with is read (or collected) now."""
        self.held(layer)

    @property
    def uses_statistics(self) -> bool:
        """Does an edit need the second moments of keys?"""
        return self.hparams.mom2_adjustment

    def take_over(self, other: EditMethod[Any]) -> None:
        if isinstance(other, LocateMethod):
            self._groups, self.statistics = other.context_groups, self.statistics.sharing(other.statistics)
            self._originals = other._originals or self._originals
            self._starts = other._starts
            self._search_budget = other._search_budget

    def context_lengths(self) -> list[tuple[int, int]]:
        """(tokens, how many) of the contexts to generate."""
        return list(self.hparams.context_template_length_params)

    def search_settings(self) -> Search:
        """The value search's settings."""
        h = self.hparams
        return Search(
            v_num_grad_steps=h.v_num_grad_steps,
            v_lr=h.v_lr,
            v_optimizer=h.v_optimizer,
            v_weight_decay=h.v_weight_decay,
            clamp_norm_factor=h.clamp_norm_factor,
            kl_factor=h.kl_factor,
            early_stop=h.early_stop,
            prob_cutoff=h.prob_cutoff,
            early_stop_rows=h.early_stop_rows,
        )

    def search_rows(
        self, request: EditRequest, contexts: Sequence[str] | None = None
    ) -> tuple[list[Row], list[list[int]]]:
        """The rows of a value search, one per context and the KL row last, and the target ids of all but the last.

        Raises:
            DataError: a row longer than `max_length` or the model's positions.
        """
        texts = self.contexts if contexts is None else contexts
        rows, labels = target_rows(self.tok, request, texts, self.hparams.fact_token, self.prompting)
        rows.append(kl_row(self.tok, request, self.hparams.fact_token, self.prompting))
        limit = longest(self.model, self.hparams.max_length)
        check_length([row.ids for row in rows], limit, lambda _: f"{whole(request)}, behind its longest context,")
        return rows, labels

    def check(self, request: EditRequest) -> None:
        self.search_rows(request)

    @property
    def starts_from_mean(self) -> bool:
        """Does the value search start from the mean output over contexts? Else from that in the first context."""
        return False

    def values(
        self,
        requests: Sequence[EditRequest],
        module: nn.Module,
        layer: int,
        progress: Progress | None = None,
        *,
        bare: bool = False,
        norms: Sequence[float] | None = None,
        steps: Mapping[str, Any] | None = None,
        read: int | None = None,
    ) -> list[Found]:
        """The value searches of `requests`, batched under the token budget; where one ends, the next takes its place.
        The answers are those of one at a time.

        They bring the keys at layer `read` along, which costs no forward; not with `targets_dir`, so that a search that
        is read and one that is made give the same bits.
        `bare` searches on the bare prompts alone; clamp and decay go by `norms`, one for each request, where given;
        `steps` are settings in place of the method's own.
        With `targets_dir`, searches saved before are read, and new ones saved.
        """
        store = self._store(module, ["bare prompt"] * bare + ["norms given"] * (norms is not None), steps)
        device = next(module.parameters()).device
        found = {n: f for n, r in enumerate(requests) if store is not None and (f := store.read(r, device)) is not None}
        todo = [n for n in range(len(requests)) if n not in found]
        made = {n: self.search_rows(requests[n], [SLOT] if bare else None) for n in todo}
        for n in todo:
            self._check_reach(requests[n], layer, made[n][0][:-1])
        longest = [_tokens(made[n][0]) for n in todo]

        read_at = None if read is None or store is not None else self.parts.rewrite(read)

        def begin(batch: list[int]) -> Begun:
            members = [todo[i] for i in batch]
            rows, replay, starts = [made[n][0] for n in members], bool(self.hparams.replay), self._shared_starts()
            forward = row_forward(self.parts, module, layer, rows, replay=replay, read=read_at, starts=starts)
            labels = RowLabels.of([made[n][1] for n in members])
            return Begun(forward, labels, None if norms is None else [norms[n] for n in members])

        def keep(place: int, result: Found) -> None:
            found[todo[place]] = result
            if store is not None:
                store.write(requests[todo[place]], result)

        settings = replace(self.search_settings(), **(steps or {}))
        watch, mean = _watch(progress, found, len(requests)), self.starts_from_mean and not bare
        self._search_budget.queue(
            longest, lambda queue: search_values(queue, begin, settings, keep, watch, mean_initial=mean)
        )
        return [found[n] for n in range(len(requests))]

    def _shared_starts(self) -> SharedStarts:
        """Keys and values of the contexts, which all requests share."""
        if self._starts is None or self._starts[0] != self.contexts:
            before = [context.split(SLOT)[0].rstrip() for context in self.contexts]  # the space belongs to what follows
            texts = [encode(self.tok, text, self.prompting) for text in before]
            self._starts = self.contexts, SharedStarts(self.parts, texts)
        return self._starts[1]

    def _check_reach(self, request: EditRequest, layer: int, rows: Sequence[Row]) -> None:
        """Warn, once, where nothing carries the value to the answer: no later layer, or windows that end before it."""
        reach = attention_reach(self.parts, layer)
        apart = min(min(row.scored) - row.lookup for row in rows)
        if apart <= reach or self._warned:
            return
        self._warned = True
        why = "is the last, and text follows the token it edits, so no attention carries the new value to the answer"
        if layer < len(self.parts.blocks) - 1:
            why = f"edits a token {apart} before the answer, further than sliding attention carries it ({reach:.0f}),"
        LOG.warning(
            "request %r: layer %d %s and the search has nothing to go by; choose a lower layer, or fact_token: last",
            request.case_id,
            layer,
            why,
        )

    def _store(
        self, module: nn.Module, how: Sequence[str] = (), steps: Mapping[str, Any] | None = None
    ) -> SearchCache | None:
        if self.hparams.targets_dir is None:
            return None
        name = next(name for name, other in self.model.named_modules() if other is module)
        bos = ["bos"] if begins_texts_with_bos(self.tok) else []
        where = [name, self.starts_from_mean, *how, *bos, *([dict(steps)] if steps else [])]
        return SearchCache(self.hparams, fingerprint(self.model), self.contexts, where)

    def held(self, layer: int) -> Factored | None:
        """What an update at `layer` holds in place, (K, K), factored; None is the identity (`Statistics.preserved`)."""
        return self.statistics.preserved(layer, with_moment=self.uses_statistics)

    def moment(self, layer: int) -> Tensor:
        """The second moment C (K, K) of the keys at `layer`, float64 (`Statistics.moment`)."""
        return self.statistics.moment(layer).matrix_KK

    def delta(self, layer: int, keys_Kr: Tensor, values_Dr: Tensor) -> tuple[WeightDelta, dict[str, float]]:
        """The update values @ keys^T as a delta in the weight's own orientation, float32 or wider: low-rank, or dense
        what `filters` leave of it. And numbers for the trace: with `filters`, the norm of the update before them."""
        name = self.parts.weight_name(layer)
        dtype = torch.promote_types(self.model.get_parameter(name).dtype, torch.float32)
        keys_Kr, values_Dr = keys_Kr.to(dtype), values_Dr.to(dtype)
        transposed = weight_is_transposed(self.parts.rewrite(layer))
        if self.hparams.filters:
            update_DK, weight = values_Dr @ keys_Kr.T, self.model.get_parameter(name).detach()
            notes = {"delta_norm_unfiltered": float(update_DK.double().norm())}
            first = self._originals.get(name, weight)
            now_DK, first_DK = (w.T if transposed else w for w in (weight.to(dtype), first.to(dtype)))
            for filter_name in self.hparams.filters:
                update_DK = FILTERS[filter_name](update_DK, now_DK, first_DK, self.hparams)
            return WeightDelta.of(name, update_DK, transposed=transposed), notes
        return WeightDelta.of(name, values_Dr, keys_Kr.T, transposed=transposed), {}


def _tokens(rows: Sequence[Row]) -> int:
    """Tokens of a request's rows in a search: each from its lookup token on, padded to the longest."""
    return len(rows) * max(len(row.ids) - row.lookup for row in rows)


def _watch(progress: Progress | None, done: Sized, of: int) -> Watch | None:
    """The search's passes as progress: of the passes for one request, of the requests for many."""
    if progress is None:
        return None

    def watch(together: int, step: int, steps: int, loss: float) -> None:
        if of == 1:
            progress(step, steps, f"loss {loss:.3f}")
        else:
            progress(len(done), of, f"{together} together, pass {step}/{steps}, loss {loss:.3f}")

    return watch
