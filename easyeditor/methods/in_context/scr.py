"""SCR: the facts nearest to a question are looked for among all in force, and the model says which fits, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.architectures import max_positions
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.recall import Asked, Question
from easyeditor.lm.tokens import encode
from easyeditor.methods.in_context.hparams import SCRHyperParams
from easyeditor.methods.in_context.method import Fact, InContext
from easyeditor.methods.in_context.retriever import retriever

CHOICE = """Facts:
{}
Which fact answers the question? If none does, write: no relevant fact.
Question: {}
Fact:"""
"""What the model is asked before the question itself."""
NONE = ("no relevant fact", "no relevant information", "false")
"""A reply that holds one of these names no fact."""
MORE = 8
"""Tokens of a reply beyond those of the longest fact."""


class SCR(InContext[SCRHyperParams]):
    """Knowledge Updating? No More Model Editing! Just Selective Contextual Reasoning (He et al. 2025, 2503.05212).

    Whatever a question is asked for, the `k` nearest facts of all in force are listed, and the model is asked which one
    answers it. The question is put behind the fact that its greedy reply repeats; as it is where it repeats none.
    """

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: SCRHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self._retriever = retriever(hparams.retriever, model, tok, self.budget)

    def asked(self, questions: Sequence[Question]) -> list[Asked]:
        facts, texts = self.facts, list(dict.fromkeys(question for question, _ in questions))
        orders = self._retriever.ranked([fact for _, fact in facts], texts)
        limit = MORE + max(len(encode(self.tok, fact)) for _, fact in facts)  # of every reply, whatever it replies to
        near = {
            text: self._fitting(text, [facts[place] for place in order[: self.hparams.k]], limit)
            for text, order in zip(texts, orders, strict=True)
        }
        choices = {text: choice(text, listed) for text, listed in near.items() if listed}
        decoding = Decoding(tokens=limit, stops=("newline",), prompting=self.prompting)
        replies = generate(self.model, self.tok, list(choices.values()), decoding, budget=self.budget)
        put = {text: self.behind(text, None) for text in texts}
        for (text, asked), reply in zip(choices.items(), replies, strict=True):
            tokens = len(self._ids(asked)) + reply.tokens
            found = self.behind(text, named(reply.text, near[text]), beside=tokens)
            put[text] = replace(found, among=tuple(request for request, _ in near[text]))
        return [put[question] for question, _ in questions]

    def _ids(self, text: str) -> list[int]:
        return encode(self.tok, text, self.prompting)

    def _fitting(self, question: str, facts: Sequence[Fact], reply: int) -> Sequence[Fact]:
        """As many of the facts, the nearest first, as the model has positions for, with so many tokens of a reply."""
        most = max_positions(self.model)
        while most is not None and facts and len(self._ids(choice(question, facts))) + reply > most:
            facts = facts[:-1]
        return facts


def choice(question: str, facts: Sequence[Fact]) -> str:
    """What the model is asked: which of the facts answers the question, or none."""
    return CHOICE.format("\n".join(f"- {fact}" for _, fact in facts), question)


def named(reply: str, facts: Sequence[Fact]) -> Fact | None:
    """The fact that a reply repeats, the longest of several; None where it repeats none or says that none fits."""
    said = reply.casefold()
    found = max((f for f in facts if f[1].casefold() in said), key=lambda f: len(f[1]), default=None)
    rest = said if found is None else said.replace(found[1].casefold(), "")
    return None if any(no in rest for no in NONE) else found
