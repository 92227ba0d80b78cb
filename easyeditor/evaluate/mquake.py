"""MQuAKE: what follows from edits, asked for in several steps (Zhong et al. 2023, arXiv 2305.14795).

Greedy text behind the authors' demonstrations, which a user has as files. Right is what equals the answer or one of its
aliases, both normalised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from easyeditor.base.shots import Shots
from easyeditor.evaluate.generation import is_match, text_of
from easyeditor.evaluate.metric import Answers, Ask, Metric, Settings, Value, missing
from easyeditor.lm.generate import Decoding
from easyeditor.values.edit import EditRequest
from easyeditor.values.multi_hop import Hop, MultiHop
from easyeditor.values.plain import mean

PLAINLY = Decoding(tokens=50, stops=("newline",))
THINKING = Decoding(tokens=200, stops=("paragraph",))
ANSWER = re.compile(r"Answer:(.*)")

Question = tuple[str, str, tuple[str, ...]]
"""What is asked, the whole prompt that the model is given, and all answers that are right."""


def plainly(shots: Shots, question: str) -> str:
    """A question of several steps behind the demonstrations."""
    return f"{shots.plain}\nQ: {question} A:"


def thinking(shots: Shots, question: str) -> str:
    """The same behind those that think first."""
    return f"{shots.thoughts}\n\nQuestion: {question}\nThoughts:"


def one_step(shots: Shots, hop: Hop) -> str | None:
    """A question of one step behind the demonstrations of its relation; None where there are none."""
    found = shots.relations.get(hop.relation)
    return None if found is None else f"{found}\nQ: {hop.question} A:"


def said(text: str, *, thought: bool) -> str:
    """The answer in a text: all of it, or with thoughts what follows the first "Answer:"; "" where nothing does."""
    if not thought:
        return text
    found = ANSWER.search(text)
    return "" if found is None else found[1]


def _of(request: EditRequest) -> MultiHop:
    return request.multi_hop or MultiHop()


def _hops(hops: Callable[[EditRequest], Sequence[Hop]]) -> Callable[[EditRequest, Shots], list[Question]]:
    """Questions of one step; none at all where the files have no demonstrations for one of them."""

    def questions(request: EditRequest, shots: Shots) -> list[Question]:
        asked = [(hop.question, one_step(shots, hop), hop.answers) for hop in hops(request)]
        known = [(question, prompt, right) for question, prompt, right in asked if prompt is not None]
        return known if len(known) == len(asked) else []

    return questions


def _several(put: Callable[[Shots, str], str]) -> Callable[[EditRequest, Shots], list[Question]]:
    def questions(request: EditRequest, shots: Shots) -> list[Question]:
        asked = _of(request)
        return [(question, put(shots, question), asked.answers) for question in asked.questions]

    return questions


def _metric(
    name: str,
    formula: str,
    column: str,
    lacks: Callable[[EditRequest], str | None],
    questions: Callable[[EditRequest, Shots], list[Question]],
    share: Callable[[list[float]], float | None],
    *,
    thought: bool = False,
) -> Metric:
    def asks(request: EditRequest, settings: Settings) -> list[Ask]:
        if settings.shots is None:
            return []
        decoding = replace(THINKING if thought else PLAINLY, prompting=settings.prompting)
        return [(prompt, decoding) for _, prompt, _ in questions(request, settings.shots)]

    def value(request: EditRequest, answers: Answers) -> Value:
        shots = answers.settings.shots
        if shots is None:
            return missing("needs MQuAKE's prompt files (mquake_prompts, --mquake-prompts)")
        asked = questions(request, shots)
        if not asked:
            return missing("the prompt files have no demonstrations for a relation of the record")
        made = [answers.generated[ask] for ask in asks(request, answers.settings)]
        each = [
            float(any(is_match(said(text.text, thought=thought), answer) for answer in right))
            for text, (_, _, right) in zip(made, asked, strict=True)
        ]
        texts = [text_of(question, text) for (question, _, _), text in zip(asked, made, strict=True)]
        return Value(value=share(each), details={"each": each, "generated": texts})

    return Metric(
        name=name,
        formula=formula,
        fields="MQuAKE's; the authors' prompt files",
        source="MQuAKE (2305.14795)",
        column=column,
        blind_to="right answers in other words than the aliases",
        lacks=lacks,
        asks=asks,
        value=value,
    )


def _lacks_edit(request: EditRequest) -> str | None:
    return None if _of(request).edit is not None else "the record has no question about the edit (MQuAKE)"


def _lacks_hops(request: EditRequest) -> str | None:
    return None if _of(request).hops else "the record has no single hops (MQuAKE; its last edit)"


def _lacks_questions(request: EditRequest) -> str | None:
    return None if _of(request).questions else "the record has no questions of several steps (MQuAKE; its last edit)"


def _edit(request: EditRequest) -> list[Hop]:
    edit = _of(request).edit
    return [] if edit is None else [edit]


MQUAKE = (
    _metric(
        "mquake_edit",
        "1 if the edit's own question is answered with target_new or an alias, behind 8 demonstrations of its relation",
        "edit-wise",
        _lacks_edit,
        _hops(_edit),
        max,
    ),
    _metric(
        "mquake_hop",
        "share of the record's single hops, after its edits, that are answered so",
        "none",
        _lacks_hops,
        _hops(lambda request: _of(request).hops),
        mean,
    ),
    _metric(
        "mquake_instance",
        "1 if all its single hops are answered so",
        "instance-wise",
        _lacks_hops,
        _hops(lambda request: _of(request).hops),
        min,
    ),
    _metric(
        "mquake_multi_hop",
        "1 if any of the record's questions is answered with the new answer or an alias, behind the demonstrations",
        "multi-hop",
        _lacks_questions,
        _several(plainly),
        max,
    ),
    _metric(
        "mquake_multi_hop_cot",
        "the same, behind the demonstrations that think first; the answer is what follows the first 'Answer:'",
        "multi-hop (CoT)",
        _lacks_questions,
        _several(thinking),
        max,
        thought=True,
    ),
)
