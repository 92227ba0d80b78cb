"""What a metric is: what it asks a model, what it makes of the answers, and what a reader must know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from easyeditor.base.endpoint import Endpoint
from easyeditor.base.shots import Shots
from easyeditor.evaluate.judge import Judged, Verdict
from easyeditor.evaluate.scoring import Scored
from easyeditor.lm.budget import USUAL_TOKENS, Budget
from easyeditor.lm.generate import Decoding, Generated, Stop
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.recall import Asked, Recall
from easyeditor.lm.tokens import SLOT
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import Value as Value
from easyeditor.values.plain import mean

Pair = tuple[str, str]
"""Prompt and answer, scored with the answer's tokens fed in."""
Ask = tuple[str, Decoding]
"""Prompt and how it is continued."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be chosen about a measurement.

    `prefix` (a context with ``{}``) is put before the rewrite prompt in teacher-forced metrics, and before paraphrases
    with `prefix_rephrase`. `prompting` is done to every prompt and scored answer; `judge` is asked by metrics that want
    a judge. `idf_texts` are the documents RS takes its word weights from; by default the reference texts of the
    requests measured together. `budget` bounds the tokens of a batch, and remembers what did not fit. `recall` is the
    memory that prompts are asked behind, `shots` the demonstrations that MQuAKE's questions are.
    """

    prefix: str | None = None
    prefix_rephrase: bool = False
    max_new_tokens: int = 50
    stops: tuple[Stop, ...] = ("newline",)
    seed: int = 0
    idf_texts: tuple[str, ...] | None = None
    budget: Budget = field(default_factory=lambda: Budget(USUAL_TOKENS), compare=False)
    prompting: Prompting = PLAIN
    judge: Endpoint | None = None
    recall: Recall | None = field(default=None, compare=False)
    shots: Shots | None = None

    def rewrite(self, request: EditRequest) -> str:
        """The rewrite prompt, behind the prefix if there is one."""
        return request.prompt if self.prefix is None else self.prefix.replace(SLOT, request.prompt)

    def rephrased(self, request: EditRequest) -> list[str]:
        """The paraphrases, behind the prefix if they are to be."""
        prefix = self.prefix if self.prefix is not None and self.prefix_rephrase else SLOT
        return [prefix.replace(SLOT, prompt) for prompt in request.rephrase_prompts]

    @property
    def natural(self) -> Decoding:
        """Greedy, up to an end of text, a stop, or `max_new_tokens`."""
        return Decoding(tokens=self.max_new_tokens, stops=self.stops, prompting=self.prompting)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one state of a model answered to all that the chosen metrics asked; `before` is the unedited model's.
    `asked` says how a request's prompts were asked, where that was behind a memory."""

    settings: Settings
    scored: Mapping[Pair, Scored] = field(default_factory=dict)
    generated: Mapping[Ask, Generated] = field(default_factory=dict)
    perplexities: Mapping[str, float] = field(default_factory=dict)
    verdicts: Mapping[Judged, Verdict] = field(default_factory=dict)
    before: Answers | None = None
    asked: Mapping[str, Asked] = field(default_factory=dict)

    @property
    def unedited(self) -> Answers:
        """What the unedited model answered; only for a metric that `needs_before`."""
        assert self.before is not None
        return self.before

    @property
    def tfidf(self) -> Any:
        """TF-IDF weights of the reference texts (scikit-learn's defaults, as ROME's)."""
        return _tfidf(self.settings.idf_texts or ())


@lru_cache(maxsize=4)
def _tfidf(references: tuple[str, ...]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit(references)


def missing(reason: str) -> Value:
    """A value that cannot be had."""
    return Value(value=None, reason=reason)


def mean_of(values: Sequence[float], **details: Any) -> Value:
    """The mean, with the values it is of."""
    return Value(value=mean(values), details=details)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the registry.

    `value` makes a request's value of the answers to `pairs`, `asks` and `texts`; it is called only when the request
    has what `lacks` looks for, and where it `needs_before`, only when the unedited model was asked too. `judged` says
    which of the texts written a judge is shown; `chat` that the metric's own questions go through the chat template.
    A metric with `harmonic` has no value of its own: its summary is the harmonic mean of those metrics' means.
    """

    name: str
    formula: str
    fields: str
    source: str
    column: str
    blind_to: str
    lacks: Callable[[EditRequest], str | None] = lambda _request: None
    pairs: Callable[[EditRequest, Settings], list[Pair]] = lambda _request, _settings: []
    asks: Callable[[EditRequest, Settings], list[Ask]] = lambda _request, _settings: []
    texts: Callable[[EditRequest], list[str]] = lambda _request: []
    value: Callable[[EditRequest, Answers], Value] | None = None
    judged: Callable[[EditRequest, Answers], list[Judged]] | None = None
    needs_before: bool = False
    chat: bool = False
    harmonic: tuple[str, ...] = ()
