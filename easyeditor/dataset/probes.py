"""What a record asks besides its edit, under the names the field has for it: paraphrases, locality, portability."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.values.edit import EditRequest

LOG = logging.getLogger(__name__)

Asked = tuple[str, Any, Any]
"""The name of a kind of probe, its prompts and their answers."""

REPHRASE = (
    *("rephrase_prompt", "rephrase", "rephrased_prompt", "rephrase_question", "rephrased_question"),
    *("paraphrase_prompt", "paraphrase", "paraphrased_prompt", "paraphrase_question", "paraphrased_question"),
    *("para_question", "ood_rephrase", "equiv_prompt"),
)
"""Fields with the edit's prompt in other words; the plural of each, too."""
NAMED = {"locality": ("locality", "locality_inputs"), "portability": ("portability", "portability_inputs")}
"""Fields that hold probes with names of their own, or a list of them."""
UNNAMED = {"locality": "neighborhood", "portability": "one_hop"}
"""What probes without a name are called."""
PAIRED = (
    ("locality", "neighborhood", "locality_prompt", "locality_ground_truth"),
    ("locality", "neighborhood", "loc", "loc_ans"),
    ("locality", "neighborhood", "unrel_prompt", "unrel_ans"),
    ("locality", "neighborhood", "locality_question", "locality_answer"),
    ("locality", "neighborhood", "locality", "locality_ans"),
    ("portability", "one_hop", "portability_prompt", "portability_ground_truth"),
    ("portability", "one_hop", "portability", "portability_ans"),
    ("portability", "personas", "personas", None),
    ("portability", "mhop", "mhop", "mhop_ans"),
    ("portability", "yes", "yes_question", "Yes"),
    ("portability", "no", "no_question", "No"),
    ("portability", "reversed_relation", "reversed_relation_question", "subject"),
    *(("portability", f"{n}hop", f"question_{n}hop", f"answer_{n}hop") for n in range(2, 7)),
    ("portability", "sub_question", "sub_question", "sub_answer"),
)
"""Kind, name, field of the prompts, field of the answers (None: the edit's target; "Yes" and "No" are the answers)."""
PROMPTS = ("prompt", "question", "New Question", "loc")
ANSWERS = ("ground_truth", "answer", "answers", "New Answer", "loc_ans", "target", "ans")


@dataclass(kw_only=True)
class Reading:
    """How records are read, and what was met: fields that nothing reads, probes that were left out."""

    needs_subject: bool = True
    """Refuse a record whose subject is not in its prompt? False: read it without a subject."""
    unread: Counter[str] = field(default_factory=Counter)
    """Field -> records that have it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Kind and name -> probes without an answer."""

    def add(self, other: Reading) -> None:
        """Count what another reading met."""
        self.unread += other.unread
        self.left_out += other.left_out

    def tell(self, where: str) -> None:
        """A warning, in one line, on what was met in requests that are given one by one."""
        unread = f"fields not read: {', '.join(self.unread)}" if self.unread else ""
        if met := "; ".join(filter(None, (unread, left_out(self)))):
            LOG.warning("%s: %s", where, met)


def probes_of(requests: Iterable[EditRequest]) -> dict[str, Any]:
    """How many requests have paraphrases, and locality and portability probes of each name."""
    listed = list(requests)
    named = {kind: dict(Counter(name for one in listed for name in getattr(one, kind))) for kind in NAMED}
    return {"rephrase": sum(bool(request.rephrase_prompts) for request in listed), **named}


def listed_probes(requests: Iterable[EditRequest]) -> str:
    """`probes_of` in words."""
    counts = probes_of(requests)
    parts = [f"rephrase {counts['rephrase']:,}"] if counts["rephrase"] else []
    for kind in filter(counts.get, NAMED):
        parts.append(f"{kind} " + ", ".join(f"{name} {n:,}" for name, n in counts[kind].items()))
    return "; ".join(parts) or "none"


def left_out(reading: Reading) -> str:
    """The probes without an answer, in words; "" where all have one."""
    counts = ", ".join(f"{name} {n:,}" for name, n in reading.left_out.items())
    return f"probes left out, for they have no answer: {counts}" if counts else ""


def read_probes(raw: Mapping[str, Any], target: Any, reading: Reading, **more: Asked) -> dict[str, Any]:
    """`EditRequest.make`'s arguments for all probes of a record; `more` are a kind's probes that its format gives.

    Raises:
        DataError: a probe that has no prompt or no answer field, or lists of unequal length.
    """
    rephrased: list[Any] = []
    for name in (spelling for one in REPHRASE for spelling in (one, f"{one}s")):
        rephrased += [text for text in paraphrases(raw.get(name), reading) if text not in rephrased]
    found: dict[str, Any] = {"rephrase_prompts": rephrased}
    for kind, fields in NAMED.items():
        texts = f"{kind}_ans" in raw  # as LEME has them: the field is the prompt itself
        asked = [] if texts else [probe for name in fields for probe in _named(raw.get(name), kind)]
        for row, name, prompt, answer in PAIRED:
            if row == kind and (texts or prompt != kind) and not empty(raw.get(prompt)):
                given = target if answer is None else answer if answer in ("Yes", "No") else raw.get(answer)
                if answer is not None and empty(given):  # CKnowEdit has locality_answer, portability_answer
                    given = raw.get(answer.replace("ground_truth", "answer"))
                asked.append((name, _unmarked(raw[prompt]) if prompt == "loc" else raw[prompt], given))
        asked += [more[kind]] if kind in more else []
        found[kind] = answered(asked, kind, reading)
    return found


def paraphrases(value: Any, reading: Reading) -> list[Any]:
    """The texts of a field that holds one or a list; empty ones in a list are left out and counted."""
    listed = value if isinstance(value, (list, tuple)) else [] if empty(value) else [value]
    kept = [first(item) for item in listed if not empty(item)]
    if len(kept) < len(listed):
        reading.left_out["rephrase"] += len(listed) - len(kept)
    return kept


def answered(asked: Iterable[Asked], kind: str, reading: Reading) -> dict[str, dict[str, list[Any]]]:
    """Prompts with one answer each, by name; of several answers that mean the same the first.

    A prompt without an answer is left out and counted. Raises DataError for lists of unequal length.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for name, prompts, answers in asked:
        several = isinstance(prompts, (list, tuple))
        questions = list(prompts) if several else [prompts]
        truths = list(answers) if several and isinstance(answers, (list, tuple)) else [answers]
        if empty(answers):
            truths = [None] * len(questions)
        if len(questions) != len(truths):
            count = f"{len(questions)} prompts but {len(truths)} ground truths"
            raise DataError(f"{kind}.{name}: {count}; give one for each")
        for question, answer in zip(questions, truths, strict=True):
            if not empty(question) and empty(answer):
                reading.left_out[f"{kind} {name}"] += 1
            elif not empty(question):
                kept = found.setdefault(name, {"prompt": [], "ground_truth": []})
                kept["prompt"].append(first(question))
                kept["ground_truth"].append(first(answer))
    return found


def empty(value: Any) -> bool:
    """Is there nothing in it: no text, no number, however deep?"""
    if isinstance(value, Mapping):
        return all(map(empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(empty, value))
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def first(value: Any) -> Any:
    """The text of a value: of a list the first that has one, however deep; of `{"str": …}` that; a number in digits."""
    if isinstance(value, Mapping) and "str" in value:
        return first(value["str"])
    if isinstance(value, (list, tuple)):
        return first(next((item for item in value if not empty(item)), value[0] if value else None))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value:  # NaN: pandas writes it for none
            return None
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    return value


def _named(value: Any, kind: str) -> list[Asked]:
    """`{name: probe}` or `{name: [probe, …]}`, one probe, or a list of them."""
    if empty(value):
        return []
    if isinstance(value, Mapping) and not any(isinstance(value.get(key), (str, list, tuple)) for key in PROMPTS):
        return [(name, *sides) for name, probe in value.items() for sides in _sides(probe, f"{kind}.{name}")]
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, Mapping) or empty(item) for item in items):
        raise DataError(f"{kind} must be a mapping of names to prompts and answers, found {type(value).__name__}")
    return [(UNNAMED[kind], *sides) for sides in _sides(value, kind)]


def _sides(probe: Any, where: str) -> list[tuple[Any, Any]]:
    """Prompts and answers of a probe, or of each in a list."""
    pairs = []
    for item in probe if isinstance(probe, (list, tuple)) else [probe]:
        if empty(item):
            continue
        keys = item.keys() if isinstance(item, Mapping) else ()
        prompt = next((key for key in PROMPTS if key in keys), None)
        answer = next((key for key in ANSWERS if key in keys), None)
        if prompt is None or answer is None:
            raise DataError(f"{where} must have 'prompt' and 'ground_truth', found {item!r:.200}")
        pairs.append((item[prompt], item[answer]))
    return pairs


def _unmarked(prompts: Any) -> Any:
    """Without the mark that Natural Questions prompts have."""
    if isinstance(prompts, (list, tuple)):
        return [_unmarked(prompt) for prompt in prompts]
    return prompts.removeprefix("nq question: ") if isinstance(prompts, str) else prompts
