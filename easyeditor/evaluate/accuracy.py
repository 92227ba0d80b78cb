"""Token-level accuracies: EasyEdit's rewrite, rephrase, locality, portability, and MEMIT's rules for ZsRE."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from easyeditor.evaluate.metric import Answers, Metric, Pair, Settings, Value, mean_of
from easyeditor.values.edit import EditRequest, Probe
from easyeditor.values.record import Side, agreement

NEAR = "neighborhood"  # the locality key of CounterFact's and ZsRE's own prompts


def lacks_rephrase(request: EditRequest) -> str | None:
    """Why a paraphrase metric cannot be had."""
    return None if request.rephrase_prompts else "the record has no paraphrases"


def lacks_locality(request: EditRequest) -> str | None:
    """Why a locality metric cannot be had."""
    return None if request.locality else "the record has no locality prompts"


def lacks_neighbourhood(request: EditRequest) -> str | None:
    """Why a neighbourhood metric cannot be had."""
    return None if NEAR in request.locality else f"the record has no locality prompts under {NEAR!r}"


def _rewrite_pairs(request: EditRequest, settings: Settings) -> list[Pair]:
    return [(settings.rewrite(request), request.target_new)]


def _rephrase_pairs(request: EditRequest, settings: Settings) -> list[Pair]:
    return [(prompt, request.target_new) for prompt in settings.rephrased(request)]


def _probe_pairs(probes: Mapping[str, Probe]) -> list[Pair]:
    return [pair for probe in probes.values() for pair in zip(probe.prompts, probe.answers, strict=True)]


def record_pairs(request: EditRequest, settings: Settings) -> list[Pair]:
    """Everything a record says of a request, as (prompt, answer)."""
    truth = [] if request.ground_truth is None else [(settings.rewrite(request), request.ground_truth)]
    near, further = _probe_pairs(request.locality), _probe_pairs(request.portability)
    return [*_rewrite_pairs(request, settings), *truth, *_rephrase_pairs(request, settings), *near, *further]


def record_side(request: EditRequest, answers: Answers, ppl: float | None) -> Side:
    """What a record says of a request on one state of the model, but for locality, which compares two."""

    def accuracies(pairs: list[Pair]) -> tuple[float, ...]:
        return tuple(answers.scored[pair].accuracy for pair in pairs)

    near = {key: _probe_pairs({key: probe}) for key, probe in request.locality.items()}
    likely = {  # per-token geometric means
        name: None if answer is None else answers.scored[(answers.settings.rewrite(request), answer)].probability
        for name, answer in (("target_new", request.target_new), ("ground_truth", request.ground_truth))
    }
    return Side(
        rewrite=accuracies(_rewrite_pairs(request, answers.settings)),
        rephrase=accuracies(_rephrase_pairs(request, answers.settings)),
        outputs={key: tuple(answers.scored[pair].predicted for pair in pairs) for key, pairs in near.items()},
        portability={key: accuracies(_probe_pairs({key: probe})) for key, probe in request.portability.items()},
        ppl=ppl,
        probabilities=likely,
    )


def _accuracy(pairs: list[Pair], answers: Answers) -> Value:
    each = [answers.scored[pair].accuracy for pair in pairs]
    return mean_of(each, each=each)


def _by_key(probes: Mapping[str, Probe], share: Callable[[Pair], float]) -> Value:
    each = {key: [share(pair) for pair in _probe_pairs({key: probe})] for key, probe in probes.items()}
    return mean_of([value for values in each.values() for value in values], **each)


def _locality(request: EditRequest, answers: Answers) -> Value:
    old, new = answers.unedited.scored, answers.scored
    return _by_key(request.locality, lambda pair: agreement(old[pair].predicted, new[pair].predicted))


def _token_share(pairs: list[Pair], answers: Answers) -> Value:
    """Share of right tokens over all prompts together, so that a longer answer weighs more (MEMIT's code)."""
    scored = [answers.scored[pair] for pair in pairs]
    right = sum(a == b for s in scored for a, b in zip(s.predicted, s.target, strict=True))
    return Value(value=right / sum(len(s.target) for s in scored), details={"each": [s.accuracy for s in scored]})


def _near_pairs(request: EditRequest, _settings: Settings) -> list[Pair]:
    return _probe_pairs({NEAR: request.locality[NEAR]})


_TOKENS = "share of answer tokens o_i that are argmax p(· | x, o_<i)"
_HIDES = "what the model would say by itself: the right tokens are fed in; a 3-token answer can score 0.33"

EASYEDIT = (
    Metric(
        name="rewrite_acc",
        formula=f"{_TOKENS}; x = prompt, o = target_new",
        fields="prompt, target_new",
        source="EasyEdit; Butterfly Effect, Fall of ROME",
        column="Rel. / Efficacy (EasyEdit, Fall of ROME)",
        blind_to=_HIDES,
        pairs=_rewrite_pairs,
        value=lambda r, a: _accuracy(_rewrite_pairs(r, a.settings), a),
    ),
    Metric(
        name="rephrase_acc",
        formula="the same, mean over paraphrases",
        fields="rephrase_prompt",
        source="EasyEdit",
        column="Gen. / Generalization (EasyEdit, Fall of ROME)",
        blind_to=_HIDES,
        lacks=lacks_rephrase,
        pairs=_rephrase_pairs,
        value=lambda r, a: _accuracy(_rephrase_pairs(r, a.settings), a),
    ),
    Metric(
        name="locality_acc",
        formula="share of answer positions whose argmax is the same as before the edit; mean over locality prompts",
        fields="locality; the unedited model",
        source="EasyEdit",
        column="Loc. / Locality (EasyEdit, Fall of ROME)",
        blind_to="whether the answer was right before; changes below the first choice",
        lacks=lacks_locality,
        pairs=lambda r, _s: _probe_pairs(r.locality),
        value=_locality,
        needs_before=True,
    ),
    Metric(
        name="portability_acc",
        formula="as rewrite_acc on the portability prompts and their answers",
        fields="portability",
        source="EasyEdit",
        column="Port. (EasyEdit)",
        blind_to=_HIDES,
        lacks=lambda r: None if r.portability else "the record has no portability prompts",
        pairs=lambda r, _s: _probe_pairs(r.portability),
        value=lambda r, a: _by_key(r.portability, lambda pair: a.scored[pair].accuracy),
    ),
)

ZSRE = (
    Metric(
        name="zsre_efficacy",
        formula=f"{_TOKENS}; x = src, o = alt",
        fields="prompt, target_new",
        source="MEMIT, section 5.1",
        column="Efficacy (MEMIT, zsRE table)",
        blind_to=_HIDES,
        pairs=_rewrite_pairs,
        value=lambda r, a: _token_share(_rewrite_pairs(r, a.settings), a),
    ),
    Metric(
        name="zsre_paraphrase",
        formula="the same over all tokens of all paraphrases together",
        fields="rephrase_prompt",
        source="MEMIT, section 5.1",
        column="Paraphrase (MEMIT, zsRE table)",
        blind_to=_HIDES,
        lacks=lacks_rephrase,
        pairs=_rephrase_pairs,
        value=lambda r, a: _token_share(_rephrase_pairs(r, a.settings), a),
    ),
    Metric(
        name="zsre_specificity",
        formula="the same on the neighbourhood prompts against their *true* answers (loc, loc_ans)",
        fields="locality.neighborhood",
        source="MEMIT, section 5.1",
        column="Specificity (MEMIT, zsRE table)",
        blind_to="whether the edit changed anything: an unedited GPT-J has 27 %",
        lacks=lacks_neighbourhood,
        pairs=_near_pairs,
        value=lambda r, a: _token_share(_near_pairs(r, a.settings), a),
    ),
)
