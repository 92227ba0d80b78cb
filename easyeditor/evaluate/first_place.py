"""Locality where an edit of a subject in first place does its damage: other subjects in first place.

Perplexity hides it, because few texts begin with such a word. The prompts are this project's own
(`data/requests/first_place.json`: sixty facts of `data/facts.json` that begin with a one-word subject, drawn by seed).
"""

from __future__ import annotations

from functools import cache

from easyeditor.base.files import read_json
from easyeditor.base.paths import SHIPPED
from easyeditor.evaluate.metric import Answers, Metric, Pair, Settings, Value, mean_of
from easyeditor.values.edit import EditRequest

PROMPTS = SHIPPED / "data" / "requests" / "first_place.json"


@cache
def _prompts() -> tuple[tuple[str, Pair], ...]:
    """(subject, (prompt, its answer)) of every prompt."""
    return tuple((item["subject"], (item["prompt"], item["answer"])) for item in read_json(PROMPTS))


def _pairs(request: EditRequest, _settings: Settings) -> list[Pair]:
    return [pair for subject, pair in _prompts() if subject != request.subject]


def _value(request: EditRequest, answers: Answers) -> Value:
    old, new = answers.unedited.scored, answers.scored
    each = [float(old[pair].predicted[0] == new[pair].predicted[0]) for pair in _pairs(request, answers.settings)]
    return mean_of(each)


FIRST_PLACE = (
    Metric(
        name="locality_first_place",
        formula="share of sixty prompts that begin with another one-word subject whose first choice is the same as "
        "before the edit",
        fields="none of the record's; the unedited model",
        source="this project (docs/findings/first-token-protection.md)",
        column="none",
        blind_to="whether the answer was right before; changes below the first choice; all but the first token",
        pairs=_pairs,
        value=_value,
        needs_before=True,
    ),
)
