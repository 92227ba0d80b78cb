"""Causal tracing (Meng et al. 2022, ROME, section 2): a subject's embeddings are corrupted, clean states put back.

Axes: S noise samples, P restored places, B rows (S x P), T tokens, L layers, D model width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from easyeditor.evaluate.scoring import score
from easyeditor.lm.architectures import Anatomy, attention_of
from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import Passage, captured, resumed, selected_head, tapped, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.prompting import PLAIN
from easyeditor.lm.tokens import encode, lookup_index, model_inputs, target_ids
from easyeditor.lm.weights import frozen
from easyeditor.values.edit import EditRequest

KINDS = ("state", "mlp", "attention")
"""What is put back: one block's output, or the outputs of a window of MLPs or of attentions."""
LAST = "last subject token"
ROLES = ("first subject token", "middle subject tokens", LAST, "first subsequent token", "further tokens", "last token")
SIGMAS = 3.0  # the noise's standard deviation, in those of subjects' embeddings
PAPER_WINDOW = 10 / 48  # the paper restores 10 of GPT2-XL's 48 layers
ASKED_TOGETHER = 64  # facts scored at once while known ones are looked for


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A prompt whose answer the model knows: ids, the subject's first and last token, the answer's first token."""

    request: EditRequest
    ids: tuple[int, ...]
    first: int
    last: int
    answer: int

    @property
    def places(self) -> dict[int, str]:
        """The tokens that can have an effect, from the subject on, with their role (paper, figure 1)."""
        last = len(self.ids) - 1
        roles = {at: ROLES[1] if at > self.first else ROLES[0] for at in range(self.first, self.last)}
        roles |= {self.last: LAST, **dict.fromkeys(range(self.last + 1, last), ROLES[4])}
        return roles | ({self.last + 1: ROLES[3], last: ROLES[5]} if last > self.last else {})


@dataclass(frozen=True, kw_only=True)
class Traced:
    """P(answer) clean and corrupted (mean over samples), and by kind what putting back gains: (places, L)."""

    clean: float
    corrupted: float
    effects: Mapping[str, np.ndarray[Any, Any]]


def fact_of(tok: Any, request: EditRequest) -> Fact:
    """The tokens of a request that has a `ground_truth`."""
    assert request.ground_truth is not None
    parts = (request.before, request.subject, request.after)
    return Fact(
        request=request,
        ids=tuple(encode(tok, request.prompt, PLAIN)),
        first=lookup_index(tok, *parts, "subject_first"),
        last=lookup_index(tok, *parts, "subject_last"),
        answer=target_ids(tok, request.prompt, request.ground_truth)[0],
    )


def known_facts(
    parts: Anatomy, tok: Any, requests: Sequence[EditRequest], limit: int, seed: int, most: int = 2000
) -> tuple[list[Fact], int]:
    """At most `limit` facts whose whole true answer is the model's first choice, in an order drawn by the seed; and how
    many were asked. At most `most` are, and each subject counts once."""
    order = [request for request in requests if request.subject and request.ground_truth]
    random.Random(seed).shuffle(order)
    found: dict[str, Fact] = {}
    asked = 0
    for start in range(0, min(most, len(order)), ASKED_TOGETHER):
        chunk = order[start : start + ASKED_TOGETHER]
        with frozen(parts.model):
            scored = score(parts.model, tok, [(r.prompt, str(r.ground_truth)) for r in chunk])
        for request, one in zip(chunk, scored, strict=True):
            asked += 1
            if one.accuracy == 1 and request.subject not in found:
                found[request.subject] = fact_of(tok, request)
            if len(found) == limit:
                return list(found.values()), asked
    return list(found.values()), asked


@torch.no_grad()
def noise_of(parts: Anatomy, tok: Any, requests: Sequence[EditRequest]) -> float:
    """The paper's noise: three standard deviations of all numbers in the embeddings of the requests' subjects."""
    subjects = dict.fromkeys(request.subject for request in requests if request.subject)
    ids = [i for subject in subjects for i in tok(subject, add_special_tokens=False)["input_ids"]]
    embedding = parts.model.get_input_embeddings()
    return SIGMAS * float(embedding(torch.tensor([ids], device=input_device(parts.model))).double().std())


class Tracer:
    """Traces facts of one model; every fact's noise is drawn anew from the seed, so facts do not see each other."""

    def __init__(
        self,
        parts: Anatomy,
        noise: float,
        *,
        samples: int,
        window: int | None = None,
        seed: int = 0,
        replay: bool = True,
        batch_tokens: int = 8192,
    ) -> None:
        """`noise` is a standard deviation; `window` the layers that "mlp" and "attention" restore, centred (None: as
        many of the model's as the paper's 10 of 48)."""
        self._parts, self._noise, self._samples, self._seed = parts, noise, samples, seed
        self.window = window or max(1, round(PAPER_WINDOW * len(parts.blocks)))
        self._replay = replay and parts.architecture.replay
        self._budget = Budget(batch_tokens)

    def modules(self, kind: str) -> list[nn.Module]:
        """The modules whose outputs a kind puts back, by layer; empty where a model has none."""
        layers = range(len(self._parts.blocks))
        if kind == "state":
            return self._parts.blocks
        if kind == "mlp":
            return [self._parts.mlp(layer) for layer in layers]
        found = [module for layer in layers if (module := attention_of(self._parts, layer)) is not None]
        return found if len(found) == len(layers) else []

    def layers(self, kind: str, layer: int) -> range:
        """The layers restored for `layer`: itself, or the window around it (cut at the ends)."""
        if kind == "state":
            return range(layer, layer + 1)
        return range(max(0, layer - self.window // 2), min(len(self._parts.blocks), layer - (-self.window // 2)))

    @torch.no_grad()
    def trace(self, fact: Fact, kinds: Sequence[str] = KINDS, places: Sequence[int] | None = None) -> Traced:
        """What each kind gains at each place (default: all of the fact's) and layer."""
        places = list(fact.places) if places is None else list(places)
        with frozen(self._parts.model):
            noise_STD = self._noise_of(fact)
            modules = {kind: found for kind in kinds if (found := self.modules(kind))}
            states, (clean,), _ = self._run(fact, torch.zeros_like(noise_STD[:1]), modules)
            _, corrupted, passages = self._run(fact, noise_STD, {})
            base = float(np.mean(corrupted))
            effects = {}
            for kind, own in modules.items():
                gained = np.zeros((len(places), len(own)))
                for layer in range(len(own)):
                    put_back = {own[at]: states[kind, at] for at in self.layers(kind, layer)}
                    first = self.layers(kind, layer).start
                    gained[:, layer] = self._restored(fact, noise_STD, passages, first, put_back, places) - base
                effects[kind] = gained
        return Traced(clean=clean, corrupted=base, effects=effects)

    def _noise_of(self, fact: Fact) -> Tensor:
        """Noise (S, T, D) to add to the embeddings, zero outside the subject."""
        width = self._parts.model.get_input_embeddings().weight.shape[1]
        made = np.zeros((self._samples, len(fact.ids), width))
        own = fact.last + 1 - fact.first
        made[:, fact.first : fact.last + 1] = np.random.default_rng(self._seed).standard_normal(
            (self._samples, own, width)
        )
        return torch.from_numpy(made * self._noise)

    def _run(
        self, fact: Fact, noise_STD: Tensor, modules: Mapping[str, Sequence[nn.Module]]
    ) -> tuple[dict[tuple[str, int], Tensor], list[float], list[Passage]]:
        """One forward of all samples: outputs (T, D) of `modules` by (kind, layer), P(answer) by sample, what each
        block was given."""
        seen: dict[tuple[str, int], Any] = {}
        passages: list[list[Passage]] = []
        with ExitStack() as stack:
            for kind, own in modules.items():
                for layer, module in enumerate(own):
                    seen[kind, layer] = stack.enter_context(captured(module))
            if self._replay:
                passages = [stack.enter_context(watched(block)) for block in self._parts.blocks]
            stack.enter_context(self._corrupted(noise_STD))
            chances = self._chances(fact, len(noise_STD))
        return {key: one.gave[0] for key, one in seen.items()}, chances, [own[0] for own in passages]

    def _restored(
        self,
        fact: Fact,
        noise_STD: Tensor,
        passages: Sequence[Passage],
        first: int,
        put_back: Mapping[nn.Module, Tensor],
        places: Sequence[int],
    ) -> np.ndarray[Any, Any]:
        """Mean P(answer) over samples (P) with the clean outputs in `put_back` at each place, on the corrupted run."""
        rows = [(sample, place) for place in places for sample in range(len(noise_STD))]
        chances = np.zeros(len(rows))

        def ask(numbers: list[int]) -> None:
            sample_B = torch.tensor([rows[n][0] for n in numbers])
            place_B = torch.tensor([rows[n][1] for n in numbers])
            with ExitStack() as stack:
                for module, clean_TD in put_back.items():
                    stack.enter_context(tapped(module, on_output=partial(_put, place_B, clean_TD)))
                if self._replay:
                    hidden = passages[first].hidden_BTD
                    own = Passage(hidden[sample_B.to(hidden.device)], passages[first].tuple_output)
                    stack.enter_context(resumed(self._parts.blocks, first, own))
                else:
                    stack.enter_context(self._corrupted(noise_STD[sample_B]))
                chances[numbers] = self._chances(fact, len(numbers))

        self._budget.each([len(fact.ids)] * len(rows), ask)
        return chances.reshape(len(places), -1).mean(1)

    @contextmanager
    def _corrupted(self, noise_BTD: Tensor) -> Iterator[None]:
        def add(states_BTD: Tensor) -> Tensor:
            return states_BTD + noise_BTD.to(states_BTD)

        with tapped(self._parts.model.get_input_embeddings(), on_output=add):
            yield

    def _chances(self, fact: Fact, rows: int) -> list[float]:
        """P(answer) after the prompt in each row of one forward, under whatever taps are set."""
        model = self._parts.model
        inputs = model_inputs([fact.ids] * rows, input_device(model))
        with selected_head(model, torch.arange(rows), torch.full((rows,), len(fact.ids) - 1)):
            logits_1BV: Tensor = model(**inputs, use_cache=False).logits
        return logits_1BV[0].double().softmax(1)[:, fact.answer].tolist()


def _put(place_B: Tensor, clean_TD: Tensor, output_BTD: Tensor) -> Tensor:
    """A module's output with the clean one at one place of each row."""
    device = output_BTD.device
    changed, at_B = output_BTD.clone(), place_B.to(device)
    changed[torch.arange(len(at_B), device=device), at_B] = clean_TD.to(output_BTD)[at_B]
    return changed


def by_role(fact_places: Mapping[int, str], gained: np.ndarray[Any, Any]) -> dict[str, list[float]]:
    """A fact's effects (places, L) averaged over the places of each role."""
    roles = list(fact_places.values())
    return {
        role: gained[[n for n, own in enumerate(roles) if own == role]].mean(0).tolist()
        for role in ROLES
        if role in roles
    }
