"""Facts in the prompt: what ICE, IKE and SCR share, and ICE. Nothing is written, so weights stay bit-equal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import max_positions
from easyeditor.lm.joining import joined
from easyeditor.lm.recall import Asked, Question
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import check_length, encode, whole
from easyeditor.methods.in_context.hparams import InContextHyperParams
from easyeditor.methods.recalled import Recalled
from easyeditor.values.edit import EditRequest, EditResult

C = TypeVar("C", bound=InContextHyperParams)

Fact = tuple[EditRequest, str]
"""A request and its text."""

NEW_FACT = "New Fact: {}\nPrompt: "
"""What comes before a question, as in EasyEdit."""


class InContext(Recalled[C], Generic[C]):
    """An edit is its facts as texts, `prompt target_new`; a question is asked behind its own request's, an oracle."""

    def edit(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> EditResult:
        started = time.perf_counter()
        facts = tuple(self.fact(request) for request in requests)
        result = self.result(requests, (), [{} for _ in requests], time.perf_counter() - started)
        return replace(result, facts=facts)

    def check(self, request: EditRequest) -> None:
        asked = self.put(request.prompt, (request, self.fact(request)))
        row = line(self.tok, asked.prompt, request.target_new, self.prompting)
        check_length([row.ids], max_positions(self.model), lambda _: f"{whole(request)} behind its own fact")

    def fact(self, request: EditRequest) -> str:
        """The text of a request."""
        return "".join(joined(request.prompt, request.target_new, self.prompting.space))

    def own(self, facts: Sequence[Fact], request: EditRequest | None) -> Fact | None:
        """The oracle: the fact of the request that is asked for, if it is in force; the latest for a text that somebody
        typed."""
        return next((f for f in reversed(facts) if request is None or f[0].place == request.place), None)

    def put(self, question: str, found: Fact | None) -> Asked:
        """A question as the method puts it behind a fact."""
        return self.behind(question, found)

    def behind(self, question: str, found: Fact | None, before: str = "", beside: int = 0) -> Asked:
        """A question behind a fact, and behind what comes `before` that; as it is where no fact was found."""
        if found is None:
            return Asked(prompt=question, beside=beside)
        prompt = before + NEW_FACT.format(found[1]) + question
        longer = len(encode(self.tok, prompt, self.prompting)) - len(encode(self.tok, question, self.prompting))
        return Asked(prompt=prompt, fact=found[0], before=longer, beside=beside, among=found[:1])

    def asked(self, questions: Sequence[Question]) -> list[Asked]:
        facts = self.facts
        return [self.put(question, self.own(facts, request)) for question, request in questions]


class ICE(InContext[InContextHyperParams]):
    """In-context editing by an oracle: before every question that is asked for a request, its own fact."""
