"""The one table of metrics, and `evaluate`, which measures any of them for many requests on a model as it is."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.endpoint import Endpoint
from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.base.progress import Progress
from easyeditor.evaluate.accuracy import EASYEDIT, ZSRE, record_side
from easyeditor.evaluate.behind import RECALL, Behind, asking_of, owned_pairs
from easyeditor.evaluate.consistency import CONSISTENCY
from easyeditor.evaluate.counterfact import COUNTERFACT
from easyeditor.evaluate.first_place import FIRST_PLACE
from easyeditor.evaluate.generation import GENERATION, TEXTS
from easyeditor.evaluate.judge import NO_JUDGE, judge_named, verdicts
from easyeditor.evaluate.metric import Answers, Ask, Metric, Pair, Settings, Value, missing
from easyeditor.evaluate.mquake import MQUAKE
from easyeditor.evaluate.perplexity import PerplexityProbe
from easyeditor.evaluate.scoring import Scored, score
from easyeditor.evaluate.wild import WILD
from easyeditor.lm.budget import Budget
from easyeditor.lm.generate import Decoding, Generated, generate
from easyeditor.lm.prompting import has_template
from easyeditor.lm.tokens import begins_texts_with_bos
from easyeditor.lm.weights import frozen
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import mean
from easyeditor.values.record import Side

ESSENCE_TOKENS = 100  # of a text on the subject, as ROME's code reads

GROUPS: dict[str, tuple[Metric, ...]] = {
    "easyedit": EASYEDIT,
    "counterfact": (*COUNTERFACT, *TEXTS),
    "zsre": ZSRE,
    "generation": GENERATION,
    "first_place": FIRST_PLACE,
    "consistency": CONSISTENCY,
    "mquake": MQUAKE,
    "recall": RECALL,
    **WILD,
}
METRICS: dict[str, Metric] = {metric.name: metric for group in GROUPS.values() for metric in group}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of many requests on one state of a model: a row of values per request, in order, and its answers."""

    names: tuple[str, ...]
    rows: tuple[Mapping[str, Value], ...]
    answers: Answers
    requests: tuple[EditRequest, ...] = ()
    settings: tuple[Settings, ...] = ()
    behind: Behind = field(default_factory=Behind)

    def only(self, numbers: Sequence[int]) -> Evaluation:
        """That of some of the requests."""
        return replace(
            self,
            rows=tuple(self.rows[n] for n in numbers),
            requests=tuple(self.requests[n] for n in numbers),
            settings=tuple(self.settings[n] for n in numbers),
            behind=Behind(tuple(self.behind.asked[n] for n in numbers if self.behind.asked)),
        )

    def side(self, number: int, ppl: float | None = None) -> Side:
        """One request under EasyEdit's names, without locality; only of an evaluation `measure` made for records."""
        answers = self.behind.answers(number, self.answers, self.settings[number])
        return record_side(self.requests[number], answers, ppl)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per metric: the mean over the requests that have a value, how many have one, and why others lack it."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.names:
            values = [row[name] for row in self.rows if name in row]
            numbers = [v.value for v in values if v.value is not None]
            reasons = sorted({v.reason for v in values if v.reason is not None})
            found[name] = {
                "mean": mean(numbers),
                "requests": len(numbers),
                "missing": len(values) - len(numbers),
                "reasons": reasons,
            }
        for name in self.names:
            if METRICS[name].harmonic:
                found[name] = _harmonic([found[part] for part in METRICS[name].harmonic])
        return found

    def row(self, number: int) -> dict[str, Any]:
        """One request's values as plain data."""
        return {name: value.to_json() for name, value in self.rows[number].items()}

    def to_json(self) -> dict[str, Any]:
        """`summary`, and `rows` as plain data."""
        return {"summary": self.summary(), "rows": [self.row(n) for n in range(len(self.rows))]}


def chosen(names: Iterable[str]) -> list[Metric]:
    """Metrics by name or group (`easyedit`, `counterfact`, `wild` …, `all`), each once.

    A metric made of others brings them along.

    Raises:
        ConfigError: a name that is neither; the near ones and the groups are named.
    """
    picked: dict[str, Metric] = {}
    for name in names:
        if name == "all":
            members: tuple[Metric, ...] = tuple(METRICS.values())
        elif name in GROUPS:
            members = GROUPS[name]
        elif name in METRICS:
            members = (METRICS[name],)
        else:
            near = difflib.get_close_matches(name, [*METRICS, *GROUPS], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = f"groups: all, {', '.join(GROUPS)}; metrics: {', '.join(METRICS)}"
            raise ConfigError(f"metric {name!r} is not known{hint} ({listed})")
        for metric in members:
            picked.update({part: METRICS[part] for part in metric.harmonic})
            picked[metric.name] = metric
    if not picked:
        raise ConfigError("no metric was asked for; name some, or a group such as 'easyedit'")
    return list(picked.values())


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """What a metric made of others is of their means (S; ROME, table 4): 0 if one is 0, None if one is lacking."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return 0.0 if 0 in known else len(known) / math.fsum(1 / value for value in known)


def evaluate(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    names: Sequence[str],
    *,
    settings: Settings | None = None,
    before: Evaluation | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure metrics of all requests on the model as it is: everything they ask is asked once, in few batches.

    `before` is the same measurement on the unedited model, which locality compares with. A value that cannot be had
    is None with a reason, never 0 and never left out.

    Raises:
        ConfigError: an unknown metric. DataError: no requests, or a text too long for the model.
    """
    if not requests:
        raise DataError("no requests to evaluate")
    settings = settings or Settings(judge=judge_for(names))
    references = settings.idf_texts or tuple(text for r in requests for text in r.reference_texts)
    same = [replace(settings, idf_texts=references)] * len(requests)
    return measure(model, tok, requests, chosen(names), same, before=before, progress=progress)


def measure(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    metrics: Sequence[Metric],
    settings: Sequence[Settings],
    *,
    record: bool = False,
    before: Evaluation | None = None,
    scored: Mapping[Pair, Scored] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate` with settings of its own for each request (batching, stops, prompting and judge are the first one's);
    with `record` everything a record says of the requests is asked too. What is `scored` already (`pairs_of`) is not
    again."""
    first = settings[0]
    budget = first.budget
    first.prompting.checked(tok)
    unable = {m.name: reason for m in metrics if (reason := _unable(m, tok, first))}
    asking = asking_of(requests, [m for m in metrics if m.name not in unable], settings)
    asks = [(n, ask) for m, n, r, own in asking for ask in m.asks(r, own)]
    texts = dict.fromkeys(text for m, _, r, _ in asking for text in m.texts(r))
    with frozen(model):
        owned = owned_pairs(requests, metrics, settings, record=record)
        behind = Behind.of(first.recall, requests, ((n, prompt) for n, (prompt, _) in (*owned, *asks)))
        if scored is None:
            pairs = list(dict.fromkeys(behind.pair(n, pair) for n, pair in owned))
            found = score(model, tok, pairs, budget=budget, prompting=first.prompting, requests=requests)
            scored = dict(zip(pairs, found, strict=True))
        answers = Answers(
            settings=first,
            scored=scored,
            generated=_generated(model, tok, [behind.ask(*ask) for ask in asks], budget, progress, requests),
            perplexities=_perplexities(model, tok, list(texts), budget),
            before=None if before is None else before.answers,
        )
    if first.judge is not None:
        asked = ((m, r, behind.answers(n, answers, own)) for m, n, r, own in asking)
        cases = (case for m, r, own in asked if m.judged for case in m.judged(r, own))
        answers = replace(answers, verdicts=verdicts(first.judge, cases, progress))
    rows = tuple(
        {
            m.name: missing(unable[m.name])
            if m.name in unable
            else _value(m, r, behind.answers(n, answers, settings[n]))
            for m in metrics
            if m.value is not None
        }
        for n, r in enumerate(requests)
    )
    return Evaluation(
        names=tuple(m.name for m in metrics),
        rows=rows,
        answers=answers,
        requests=tuple(requests),
        settings=tuple(settings),
        behind=behind,
    )


def pairs_of(
    requests: Sequence[EditRequest], metrics: Sequence[Metric], settings: Sequence[Settings], *, record: bool = False
) -> list[Pair]:
    """All that `measure` scores, each once."""
    return list(dict.fromkeys(pair for _, pair in owned_pairs(requests, metrics, settings, record=record)))


def judge_for(names: Sequence[str]) -> Endpoint | None:
    """The judge that the environment names, if one of these metrics asks it.

    Raises:
        ConfigError: as `chosen`, or the judge's address is none.
    """
    return judge_named() if names and any(metric.judged for metric in chosen(names)) else None


def _unable(metric: Metric, tok: PreTrainedTokenizerBase, settings: Settings) -> str | None:
    """Why a metric cannot be had of any request."""
    if metric.judged is not None and settings.judge is None:
        return NO_JUDGE
    if not metric.chat:
        return None
    if not has_template(tok):
        return "the tokenizer has no chat template"
    try:
        replace(settings.prompting, chat=True, eos=False).checked(tok)
    except ModelError as error:
        return str(error)
    return None


def _value(metric: Metric, request: EditRequest, answers: Answers) -> Value:
    assert metric.value is not None
    lacking = metric.lacks(request)
    if lacking is not None:
        return missing(lacking)
    if metric.needs_before and answers.before is None:
        return missing("needs the outputs of the unedited model (--base-model)")
    value = metric.value(request, answers)
    if value.value is not None and not math.isfinite(value.value):
        return Value(value=None, reason="not finite: the model gives no numbers here", details=value.details)
    return value


def _generated(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    budget: Budget,
    progress: Progress | None,
    requests: Sequence[EditRequest],
) -> dict[Ask, Generated]:
    by_decoding: dict[Decoding, list[str]] = {}
    for prompt, decoding in dict.fromkeys(asks):
        by_decoding.setdefault(decoding, []).append(prompt)
    made: dict[Ask, Generated] = {}
    for decoding, prompts in by_decoding.items():
        texts = generate(model, tok, prompts, decoding, budget=budget, progress=progress, requests=requests)
        made.update({(prompt, decoding): text for prompt, text in zip(prompts, texts, strict=True)})
    return made


def _perplexities(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, texts: Sequence[str], budget: Budget
) -> dict[str, float]:
    if not texts:
        return {}
    begun = begins_texts_with_bos(tok)  # as the reference's tokenizer does by itself
    probe = PerplexityProbe(
        model, tok, texts, max_length=ESSENCE_TOKENS, add_start_token=begun, batch_tokens=budget.tokens
    )
    report = probe.measure()
    return dict(zip(texts, report.perplexities, strict=True))


def _harmonic(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = harmonic_mean([part["mean"] for part in parts])
    reasons = sorted({reason for part in parts for reason in part["reasons"]})
    requests = min(part["requests"] for part in parts)
    if found is None:
        return {"mean": None, "requests": 0, "missing": requests, "reasons": reasons}
    return {"mean": found, "requests": requests, "missing": max(part["missing"] for part in parts), "reasons": reasons}
