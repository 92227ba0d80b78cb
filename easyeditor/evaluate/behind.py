"""Questions behind a memory: each request's prompts as the model is given them, its answers under the bare prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from easyeditor.evaluate.accuracy import lacks_locality, record_pairs
from easyeditor.evaluate.metric import Answers, Ask, Metric, Pair, Settings, Value, mean_of, missing
from easyeditor.lm.generate import Generated
from easyeditor.lm.recall import Asked, Recall
from easyeditor.values.edit import EditRequest

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Behind:
    """By the place of a request, prompt -> as it is asked. Empty: the prompts as they are."""

    asked: tuple[Mapping[str, Asked], ...] = ()

    @staticmethod
    def of(recall: Recall | None, requests: Sequence[EditRequest], prompts: Iterable[tuple[int, str]]) -> Behind:
        """What `recall` makes of prompts, each with the place of its request; each question is looked up once."""
        if recall is None:
            return Behind()
        owned = list(dict.fromkeys(prompts))
        made: list[dict[str, Asked]] = [{} for _ in requests]
        for (n, prompt), asked in zip(owned, recall.asked([(p, requests[n]) for n, p in owned]), strict=True):
            made[n][prompt] = asked
        return Behind(tuple(made))

    def pair(self, n: int, pair: Pair) -> Pair:
        """A pair of request `n` as it is scored."""
        return (self.asked[n][pair[0]].prompt, pair[1]) if self.asked else pair

    def ask(self, n: int, ask: Ask) -> Ask:
        """What request `n` asks for, as it is written. A length that counts the prompt counts the bare one."""
        if not self.asked:
            return ask
        asked, decoding = self.asked[n][ask[0]], ask[1]
        longer = asked.before if decoding.count_prompt else 0
        return asked.prompt, replace(decoding, tokens=decoding.tokens + longer)

    def answers(self, n: int, answers: Answers, settings: Settings) -> Answers:
        """The answers to request `n`, under its bare prompts."""
        if not self.asked:
            return replace(answers, settings=settings)
        scored, generated = answers.scored, answers.generated

        def written(ask: Ask) -> Generated:
            made = generated[self.ask(n, ask)]
            return replace(made, whole=made.whole.removeprefix(self.asked[n][ask[0]].prompt.removesuffix(ask[0])))

        return replace(
            answers,
            settings=settings,
            asked=self.asked[n],
            scored=_Under(scored, lambda pair: scored[self.pair(n, pair)]),
            generated=_Under(generated, written),
        )


def owned_pairs(
    requests: Sequence[EditRequest], metrics: Sequence[Metric], settings: Sequence[Settings], *, record: bool
) -> list[tuple[int, Pair]]:
    """All that is scored, with the place of the request it is asked for."""
    pairs = [(n, pair) for m, n, r, own in asking_of(requests, metrics, settings) for pair in m.pairs(r, own)]
    if record:
        pairs += [(n, p) for n, r in enumerate(requests) for p in record_pairs(r, settings[n])]
    return pairs


def asking_of(
    requests: Sequence[EditRequest], metrics: Sequence[Metric], settings: Sequence[Settings]
) -> list[tuple[Metric, int, EditRequest, Settings]]:
    """Every metric with every request it can be had of, and its place."""
    return [
        (m, n, r, settings[n])
        for m in metrics
        if m.value is not None
        for n, r in enumerate(requests)
        if m.lacks(r) is None
    ]


class _Under(Mapping[K, V]):
    """A table read through `look`; its length and order are the table's own."""

    def __init__(self, table: Mapping[K, V], look: Callable[[K], V]) -> None:
        self._table, self._look = table, look

    def __getitem__(self, key: K) -> V:
        return self._look(key)

    def __iter__(self) -> Iterator[K]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _edited(request: EditRequest, settings: Settings) -> list[Pair]:
    return [(prompt, request.target_new) for prompt in (settings.rewrite(request), *settings.rephrased(request))]


def _near(request: EditRequest, _settings: Settings) -> list[Pair]:
    return [p for probe in request.locality.values() for p in zip(probe.prompts, probe.answers, strict=True)]


def _looked_up(
    pairs: Callable[[EditRequest, Settings], list[Pair]], number: Callable[[EditRequest, Asked], float]
) -> dict[str, Any]:
    """What a metric asks, and its value: the mean of a number over the questions looked up."""

    def value(request: EditRequest, answers: Answers) -> Value:
        prompts = dict.fromkeys(prompt for prompt, _ in pairs(request, answers.settings))
        if not answers.asked:
            return missing("no fact in a memory comes before prompts here")
        each = [number(request, answers.asked[prompt]) for prompt in prompts]
        return mean_of(each, each=each)

    return {"pairs": pairs, "value": value, "source": "this project", "column": "none"}


RECALL = (
    Metric(
        name="recall_hit",
        formula="share of prompts (rewrite, paraphrases) that are asked behind the request's own fact",
        fields="prompt, rephrase_prompt; a memory of facts (ICE, IKE, SCR)",
        blind_to="whether the model makes use of the fact",
        **_looked_up(_edited, lambda r, asked: float(asked.fact is not None and asked.fact.place == r.place)),
    ),
    Metric(
        name="recall_at_k",
        formula="share of prompts (rewrite, paraphrases) whose own fact is among those found: the `k` nearest (SCR); "
        "an oracle finds one",
        fields="prompt, rephrase_prompt; a memory of facts",
        blind_to="which of them is chosen",
        **_looked_up(_edited, lambda r, asked: float(any(one.place == r.place for one in asked.among))),
    ),
    Metric(
        name="recall_none",
        formula="share of locality prompts that are asked behind no fact",
        fields="locality; a memory of facts",
        blind_to="whether a fact before the prompt changes the answer",
        lacks=lacks_locality,
        **_looked_up(_near, lambda _, asked: float(asked.fact is None)),
    ),
    Metric(
        name="recall_tokens",
        formula="tokens that a question costs besides its own: the fact before it, and what was asked to find it; mean "
        "over the record's prompts",
        fields="prompt; a memory of facts",
        blind_to="what the search among the facts costs",
        **_looked_up(record_pairs, lambda _, asked: float(asked.before + asked.beside)),
    ),
)
