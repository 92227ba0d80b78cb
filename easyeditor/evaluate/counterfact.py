"""ROME's CounterFact metrics on probabilities: ES, PS, NS (success), EM, PM, NM (magnitude), AS, and the score S.

P(o | x) is the per-token geometric mean, exp((1/n) Σ log p(o_i | x, o_<i)) (Meng et al. 2022, section 3.4; their code).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from easyeditor.evaluate.accuracy import NEAR, lacks_neighbourhood, lacks_rephrase
from easyeditor.evaluate.metric import Answers, Metric, Pair, Settings, Value, mean_of
from easyeditor.evaluate.scoring import Scored
from easyeditor.values.edit import EditRequest

Contest = tuple[str, str, str]
"""A prompt, the answer that should be likelier, and the other one."""
Contests = Callable[[EditRequest, Settings], list[Contest]]


def _rewrite(request: EditRequest, settings: Settings) -> list[Contest]:
    return [(settings.rewrite(request), request.target_new, _truth(request))]


def _rephrase(request: EditRequest, settings: Settings) -> list[Contest]:
    return [(prompt, request.target_new, _truth(request)) for prompt in settings.rephrased(request)]


def _near(request: EditRequest, _settings: Settings) -> list[Contest]:
    """The neighbourhood's own true answer (in CounterFact the record's) should stay likelier than the new one."""
    probe = request.locality[NEAR]
    return [(prompt, true, request.target_new) for prompt, true in zip(probe.prompts, probe.answers, strict=True)]


def _attribute(request: EditRequest, _settings: Settings) -> list[Contest]:
    """Of these subjects the new answer is true already."""
    return [(prompt, request.target_new, _truth(request)) for prompt in request.attribute_prompts]


def _truth(request: EditRequest) -> str:
    assert request.ground_truth is not None  # `lacks` looked
    return request.ground_truth


def lacks_truth(request: EditRequest) -> str | None:
    """Why a metric that compares with the old answer cannot be had."""
    return None if request.ground_truth is not None else "the record has no ground_truth to compare target_new with"


def _lacks_rephrase(request: EditRequest) -> str | None:
    return lacks_truth(request) or lacks_rephrase(request)


def _lacks_attribute(request: EditRequest) -> str | None:
    return lacks_truth(request) or (None if request.attribute_prompts else "the record has no attribute_prompts")


def _pairs(contests: Contests, request: EditRequest, settings: Settings) -> list[Pair]:
    listed = contests(request, settings)
    return [(prompt, answer) for prompt, wanted, other in listed for answer in (wanted, other)]


def _both(contests: Contests, request: EditRequest, answers: Answers) -> list[tuple[Scored, Scored]]:
    """(wanted, other) of every prompt."""
    listed = contests(request, answers.settings)
    return [(answers.scored[prompt, wanted], answers.scored[prompt, other]) for prompt, wanted, other in listed]


def _success(contests: Contests, request: EditRequest, answers: Answers) -> Value:
    """Compared as log-probabilities, which tell apart what underflows as probabilities."""
    both = _both(contests, request, answers)
    wins = [float(wanted.mean_log_probability > other.mean_log_probability) for wanted, other in both]
    return mean_of(wins, each=wins)


def _magnitude(contests: Contests, request: EditRequest, answers: Answers) -> Value:
    both = [[wanted.probability, other.probability] for wanted, other in _both(contests, request, answers)]
    return mean_of([wanted - other for wanted, other in both], probabilities=both)


def _family(
    letter: str, contests: Contests, what: str, fields: str, lacks: Callable[[EditRequest], str | None]
) -> tuple[Metric, Metric]:
    success = Metric(
        name=f"{letter}S",
        formula=f"share of {what}",
        fields=fields,
        source="ROME, section 3.4 (CounterFact)",
        column=f"{letter}S (ROME, MEMIT); AlphaEdit's CounterFact columns",
        blind_to="all answers but these two: the model may prefer a third",
        lacks=lacks,
        pairs=partial(_pairs, contests),
        value=partial(_success, contests),
    )
    magnitude = Metric(
        name=f"{letter}M",
        formula=f"mean difference of the two probabilities in {letter}S",
        fields=fields,
        source="ROME, section 3.4 (CounterFact)",
        column=f"{letter}M (ROME)",
        blind_to="small probabilities: a win of 0.001 over 0.0001 counts for nothing",
        lacks=lacks,
        pairs=partial(_pairs, contests),
        value=partial(_magnitude, contests),
    )
    return success, magnitude


_E = _family("E", _rewrite, "P(target_new) > P(ground_truth) on the prompt", "prompt, ground_truth", lacks_truth)
_P = _family(
    "P", _rephrase, "P(target_new) > P(ground_truth) over paraphrases", "rephrase_prompt, ground_truth", _lacks_rephrase
)
_N = _family(
    "N",
    _near,
    "P(true answer) > P(target_new) over neighbourhood prompts",
    "locality.neighborhood",
    lacks_neighbourhood,
)
_A = Metric(
    name="AS",
    formula="share of P(target_new) > P(ground_truth) over attribute prompts, whose subjects have target_new already",
    fields="attribute_prompts, ground_truth",
    source="CounterFact's attribute_prompts (ROME's data; in no table of the paper)",
    column="none",
    blind_to="as ES",
    lacks=_lacks_attribute,
    pairs=partial(_pairs, _attribute),
    value=partial(_success, _attribute),
)
_S = Metric(
    name="S",
    formula="3 / (1/ES + 1/PS + 1/NS) of the three means; 0 if one is 0",
    fields="those of ES, PS, NS",
    source="ROME, table 4; MEMIT, table 1",
    column="S (ROME, MEMIT)",
    blind_to="as ES, PS, NS; one number for three different failures",
    harmonic=("ES", "PS", "NS"),
)

COUNTERFACT = (*_E, *_P, *_N, _A, _S)
