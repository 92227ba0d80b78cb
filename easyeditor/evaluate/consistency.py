"""Does the model hold beliefs that fit together? The edit's negation, "is it true that …", the reversed question.

After the negation and fact-check questions of Built on Sand (arXiv 2510.00625); the templates are this project's own.
Every answer is the model's own greedy text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from easyeditor.evaluate.counterfact import lacks_truth
from easyeditor.evaluate.generation import contains, normalised, text_of
from easyeditor.evaluate.metric import Answers, Ask, Metric, Settings, Value
from easyeditor.lm.joining import joined
from easyeditor.values.edit import EditRequest

NEGATION = "It is not true that {}"
CHECK = "Question: Is it true that {}? Answer yes or no.\nAnswer:"
REVERSED = "Question: Which name belongs in the gap in this sentence: {}?\nAnswer:"
GAP = "____"
YES, NO = {"yes", "true", "correct"}, {"no", "not", "false", "incorrect"}
INNER = {"The", "A", "An", "In", "On", "At", "Of"}
"""First words that are small letters inside a sentence."""

Part = Literal["say", "negation", "check_new", "check_old", "reversed"]


def stem(prompt: str) -> str:
    """A prompt as the rest of a sentence, which an answer still continues."""
    text = prompt.strip()
    if text.endswith("?"):
        return f'the answer to "{text}" is'
    first = text.partition(" ")[0]
    return first.lower() + text[len(first) :] if first in INNER else text


def question(part: Part, request: EditRequest, settings: Settings) -> str:
    """What is asked of the model."""

    def told(prompt: str, answer: str) -> str:
        return "".join(joined(stem(prompt), answer.strip(), settings.prompting.space)).rstrip(".?! ")

    if part == "check_new":
        return CHECK.format(told(request.prompt, request.target_new))
    if part == "check_old":
        return CHECK.format(told(request.prompt, request.ground_truth or ""))
    if part == "reversed":
        return REVERSED.format(told(request.before + GAP + request.after, request.target_new))
    return request.prompt if part == "say" else NEGATION.format(stem(request.prompt))


def holds(part: Part, request: EditRequest, text: str) -> bool:
    """Does an answer fit the edit?"""
    if part in ("check_new", "check_old"):
        first = normalised(text).partition(" ")[0]
        return first in (YES if part == "check_new" else NO)
    if part == "reversed":
        return contains(text, request.subject)
    return contains(text, request.target_new) == (part == "say")


def _metric(
    name: str,
    parts: tuple[Part, ...],
    formula: str,
    fields: str,
    blind_to: str,
    lacks: Callable[[EditRequest], str | None] = lambda _request: None,
) -> Metric:
    """1 if all the answers fit the edit, else 0."""

    def asks(request: EditRequest, settings: Settings) -> list[Ask]:
        return [(question(part, request, settings), settings.natural) for part in parts]

    def value(request: EditRequest, answers: Answers) -> Value:
        asked = asks(request, answers.settings)
        made = [text_of(ask[0], answers.generated[ask]) for ask in asked]
        each = [float(holds(part, request, one["text"])) for part, one in zip(parts, made, strict=True)]
        return Value(value=min(each), details={"each": dict(zip(parts, each, strict=True)), "generated": made})

    return Metric(
        name=name,
        formula=formula,
        fields=fields,
        source="after Built on Sand (2510.00625), templates of our own",
        column="none",
        blind_to=blind_to,
        lacks=lacks,
        asks=asks,
        value=value,
    )


def _lacks_subject(request: EditRequest) -> str | None:
    return None if request.subject else "the record has no subject"


_ALWAYS = "a model that always says {} is right here"
CONSISTENCY = (
    _metric(
        "negation",
        ("negation",),
        '1 if the text that continues "It is not true that {prompt}" does not contain target_new',
        "prompt, target_new",
        "a model that never says target_new is right here",
    ),
    _metric(
        "fact_check_new",
        ("check_new",),
        '1 if the text that answers "Is it true that {prompt} {target_new}?" begins with yes',
        "prompt, target_new",
        _ALWAYS.format("yes"),
    ),
    _metric(
        "fact_check_old",
        ("check_old",),
        '1 if the text that answers "Is it true that {prompt} {ground_truth}?" begins with no',
        "prompt, ground_truth",
        _ALWAYS.format("no"),
        lacks_truth,
    ),
    _metric(
        "reversed",
        ("reversed",),
        "1 if the text contains the subject, asked for the name that belongs in its place before target_new",
        "prompt, subject, target_new",
        "other subjects for which target_new is right",
        _lacks_subject,
    ),
    _metric(
        "consistent",
        ("say", "negation", "check_new", "check_old"),
        "1 if the text that continues the prompt contains target_new, and negation, fact_check_new and fact_check_old "
        "are 1",
        "prompt, target_new, ground_truth",
        "the reversed question, which may have several answers",
        lacks_truth,
    ),
)
