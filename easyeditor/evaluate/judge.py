"""A language model as the judge of an answer; asked only where the environment names an endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable

from easyeditor.base.endpoint import Endpoint
from easyeditor.base.progress import Progress

URL, MODEL, KEY = "EASYEDITOR_JUDGE_URL", "EASYEDITOR_JUDGE_MODEL", "EASYEDITOR_JUDGE_KEY"
USUAL = "gpt-4o-mini"  # the protocol's judge (arXiv 2502.11177)
NO_JUDGE = f"no judge: {URL} names no endpoint"

Judged = tuple[str, str, str]
"""A question, its right answer, and the answer given."""
Verdict = bool | None
"""Was it right? None where the judge says neither yes nor no."""


def judge_named() -> Endpoint | None:
    """The endpoint the environment names, or None. Raises ConfigError where it is no http address, or its key none."""
    url = os.environ.get(URL)
    if not url:
        return None
    return Endpoint(
        url=url,
        model=os.environ.get(MODEL) or USUAL,
        key=os.environ.get(KEY) or os.environ.get("OPENAI_API_KEY"),
        named_by=f"{URL}, {MODEL} and {KEY}",
    )


def verdicts(judge: Endpoint, asked: Iterable[Judged], progress: Progress | None = None) -> dict[Judged, Verdict]:
    """The judge's word on each, one question at a time, at temperature 0. Raises EndpointError as `Endpoint.ask`."""
    listed, found = list(dict.fromkeys(asked)), dict[Judged, Verdict]()
    for number, case in enumerate(listed, 1):
        found[case] = _verdict(judge.ask(instruction(*case), temperature=0.0))
        if progress is not None:
            progress(number, len(listed), "judged")
    return found


def instruction(question: str, target: str, answer: str) -> str:
    """What the judge is asked (the grading of SimpleQA, as the protocol has it, in our own words)."""
    return (
        "Grade an answer against the right one. The question may be a sentence that the answer completes.\n\n"
        "A, correct: it says everything important that the right answer says, in any wording, case or order, and "
        "nothing that contradicts it.\n"
        "B, incorrect: something important is missing, something contradicts the right answer, it names more than the "
        "right answer does, or it repeats itself.\n\n"
        "Question: Which two rivers meet in Passau beside the Danube?\n"
        "Right answer: the Inn and the Ilz\n"
        '"ilz and inn" is A; "The Ilz and the Inn meet it there" is A.\n'
        '"the Inn" is B; "the Inn, the Ilz and the Elbe" is B; "Inn and Ilz, Inn and Ilz, Inn and Ilz" is B.\n\n'
        "Now grade this one.\n"
        f"Question: {question}\nRight answer: {target}\nAnswer: {answer}\n\n"
        "Reply with the letter A or B alone."
    )


def _verdict(reply: str) -> Verdict:
    """A or B, perhaps with a mark around it; anything longer counts for neither."""
    return {"A": True, "B": False}.get(reply.strip().strip("\"'.:()*` \n").upper())
