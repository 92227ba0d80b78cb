"""IKE: the request's own fact behind demonstrations of what a new fact changes, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.dataset.sets import demonstration_facts
from easyeditor.lm.joining import joined
from easyeditor.lm.recall import Asked
from easyeditor.methods.in_context.hparams import IKEHyperParams
from easyeditor.methods.in_context.method import NEW_FACT, Fact, InContext
from easyeditor.methods.in_context.retriever import retriever
from easyeditor.values.edit import EditRequest


@dataclass(frozen=True)
class Demonstration:
    """A question and its answer behind the fact of another request, as text."""

    request: EditRequest
    question: str
    text: str


class IKE(InContext[IKEHyperParams]):
    """Can We Edit Factual Knowledge by In-Context Learning? (Zheng et al. 2023, arXiv 2305.12740), as EasyEdit has it.

    Each of the facts to learn from gives up to three demonstrations behind its own fact: copy (its prompt), update (a
    paraphrase), both with the new answer, and retain (a neighbour with its own). The `k` nearest to the request's
    fact come before it, the nearest first. None is of the request's own subject, or asks the question that is asked.
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: IKEHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self._retriever = retriever(hparams.retriever, model, tok, self.budget)
        self._orders: dict[str, list[int]] = {}  # by fact, the demonstrations by nearness

    @cached_property
    def demonstrations(self) -> list[Demonstration]:
        """All there are to choose from."""
        h = self.hparams
        learnt = demonstration_facts(h.demonstrations, h.demonstration_facts, h.seed)
        return [made for request in learnt for made in self._of(request)]

    def put(self, question: str, found: Fact | None) -> Asked:
        if found is None:
            return self.behind(question, found)
        near = [one for one in self._ranked(found) if one.question != question][: self.hparams.k]
        return self.behind(question, found, before="".join(one.text for one in near))

    def _ranked(self, found: Fact) -> Sequence[Demonstration]:
        """The demonstrations of other subjects, by nearness to a fact."""
        request, fact = found
        if fact not in self._orders:
            every = self.demonstrations
            (order,) = self._retriever.ranked([one.text for one in every], [NEW_FACT.format(fact) + fact])
            self._orders[fact] = order
        ranked = (self.demonstrations[place] for place in self._orders[fact])
        return [one for one in ranked if one.request.prompt != request.prompt and not _same_subject(one, request)]

    def _of(self, request: EditRequest) -> list[Demonstration]:
        asked = [(prompt, request.target_new) for prompt in (request.prompt, *request.rephrase_prompts[:1])]
        near = [
            (p, a) for probe in request.locality.values() for p, a in zip(probe.prompts, probe.answers, strict=True)
        ]
        head = NEW_FACT.format(self.fact(request))
        return [
            Demonstration(request, prompt, head + "".join(joined(prompt, answer, self.prompting.space)) + "\n\n")
            for prompt, answer in (*asked, *near[:1])
        ]


def _same_subject(one: Demonstration, request: EditRequest) -> bool:
    return bool(request.subject) and one.request.subject == request.subject
