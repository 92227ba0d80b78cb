"""EditRequest: one fact to change, checked, with a definite place for its subject."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.base.errors import AbsentSubject, DataError
from easyeditor.base.files import check_value
from easyeditor.values.multi_hop import MultiHop
from easyeditor.values.texts import NO_TEXT, as_list, is_text, listed_texts

TEXT_FIELDS = ("generation_prompts", "attribute_prompts", "reference_texts", "essence_texts")


SAVED = (
    *("case_id", "prompt", "subject", "subject_start", "target_new", "ground_truth", "rephrase_prompt"),
    *("locality", "portability"),
)
"""What `to_json` always writes."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Prompts with the answers they are scored against (locality or portability); both lists are equally long."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to change: `prompt` (the subject filled in) should be continued by `target_new`.

    `subject_start` is the character in `prompt` where the subject that is edited begins; with a subject that
    occurs several times it is the last whole-word occurrence, unless the caller marked one with ``{}``.
    For evaluation only: `generation_prompts` to be continued freely, `attribute_prompts` on subjects that have
    `target_new` already, `reference_texts` on such subjects, `essence_texts` on the request's own subject,
    `multi_hop` as MQuAKE asks.
    Use `EditRequest.make` rather than the constructor: it checks and fills in.
    """

    prompt: str
    subject: str
    target_new: str
    subject_start: int
    ground_truth: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: Mapping[str, Probe] = field(default_factory=dict)
    portability: Mapping[str, Probe] = field(default_factory=dict)
    case_id: int | str = 0
    generation_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()
    essence_texts: tuple[str, ...] = ()
    multi_hop: MultiHop | None = None

    @staticmethod
    def make(
        prompt: str,
        *,
        subject: str | None,
        target_new: str,
        ground_truth: str | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality: Mapping[str, Any] | None = None,
        portability: Mapping[str, Any] | None = None,
        case_id: int | str = 0,
        subject_start: int | None = None,
        generation_prompts: str | Sequence[str] | None = None,
        attribute_prompts: str | Sequence[str] | None = None,
        reference_texts: str | Sequence[str] | None = None,
        essence_texts: str | Sequence[str] | None = None,
        multi_hop: MultiHop | Mapping[str, Any] | None = None,
    ) -> EditRequest:
        """Check one request and give it a definite subject position, unless `subject_start` gives it.

        A `subject` of None is for methods that use none: it is "" then, at the start of the prompt as it is.

        Raises:
            DataError: empty, non-text or endless fields, two ``{}``, subject not in the prompt, probes of unequal
            length.
        """
        where = f"request {_case_id(case_id)!r}"
        for name, value in (("prompt", prompt), ("subject", subject), ("target_new", target_new)):
            if name != "subject" or value is not None:
                _required_text(value, f"{where}: {name}")
        text, start = prompt, 0 if subject_start is None else subject_start
        if subject is not None and subject_start is None:
            text, start = _place_subject(prompt, subject, where)
        _check_start(text, subject or "", start, where)
        texts = (generation_prompts, attribute_prompts, reference_texts, essence_texts)
        return EditRequest(
            prompt=text,
            subject=subject or "",
            target_new=target_new,
            subject_start=start,
            ground_truth=_optional_text(ground_truth, f"{where}: ground_truth"),
            rephrase_prompts=listed_texts(rephrase_prompts, f"{where}: rephrase_prompts"),
            locality=_probes(locality, f"{where}: locality"),
            portability=_probes(portability, f"{where}: portability"),
            case_id=case_id,
            multi_hop=MultiHop.make(multi_hop, f"{where}: multi_hop"),
            **{name: listed_texts(value, f"{where}: {name}") for name, value in zip(TEXT_FIELDS, texts, strict=True)},
        )

    @property
    def place(self) -> tuple[str, int, str]:
        """What a request edits: two requests with the same place are about the same fact."""
        return (self.prompt, self.subject_start, self.subject)

    @property
    def before(self) -> str:
        """The prompt's text before the subject."""
        return self.prompt[: self.subject_start]

    @property
    def after(self) -> str:
        """The prompt's text after the subject."""
        return self.prompt[self.subject_start + len(self.subject) :]

    def to_json(self) -> dict[str, Any]:
        """The request under EasyEdit's names (`requested_rewrite`)."""
        return {
            "case_id": self.case_id,
            "prompt": self.prompt,
            "subject": self.subject,
            "subject_start": self.subject_start,
            "target_new": self.target_new,
            "ground_truth": self.ground_truth,
            "rephrase_prompt": list(self.rephrase_prompts),
            "locality": _probes_to_json(self.locality),
            "portability": _probes_to_json(self.portability),
            **{name: list(texts) for name in TEXT_FIELDS if (texts := getattr(self, name))},
            **({} if self.multi_hop is None else {"multi_hop": self.multi_hop.to_json()}),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> EditRequest:
        """Inverse of `to_json`, checked like a new request. Raises DataError."""
        if not isinstance(raw, Mapping):
            raise DataError(f"a saved request must be a JSON object, found {type(raw).__name__}")
        if lacking := [key for key in SAVED if key not in raw]:
            raise DataError(f"a saved request lacks {', '.join(lacking)}")
        lists = {"rephrase_prompts": raw["rephrase_prompt"], **{n: raw[n] for n in TEXT_FIELDS if n in raw}}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise DataError(f"a saved request's {name} must be a list, found {type(value).__name__}")
        if raw["subject_start"] is None:
            raise DataError("a saved request's subject_start is null")
        same = {key: raw[key] for key in (*SAVED, "multi_hop") if key != "rephrase_prompt" and key in raw}
        return EditRequest.make(**{**same, "subject": None if raw["subject"] == "" else raw["subject"]}, **lists)


def contradiction(first: EditRequest | None, later: EditRequest) -> str | None:
    """What two requests of one edit say of the same fact, where it differs; else None."""
    if first is None or first.place != later.place or first.target_new.strip() == later.target_new.strip():
        return None
    return (
        f"requests {first.case_id!r} and {later.case_id!r} contradict each other: {later.prompt!r} -> "
        f"{first.target_new!r} and {later.target_new!r}"
    )


def reconcile(requests: Sequence[EditRequest], *, repeats: bool = False) -> tuple[list[EditRequest], list[str]]:
    """The requests of one joint edit without repetitions, and notes on what was found.

    The same request twice is kept once, or as often as it comes with `repeats`. Several facts about one subject share
    a key and pull at each other: kept, noted.

    Raises:
        DataError: two requests give one prompt different answers.
    """
    kept: dict[tuple[str, int, str], EditRequest] = {}
    notes: list[str] = []
    prompts_of: dict[str, list[Any]] = {}
    for request in requests:
        if request.place not in kept:
            kept[request.place] = request
            prompts_of.setdefault(request.subject, []).append(request.case_id)
            continue
        first = kept[request.place]
        if found := contradiction(first, request):
            raise DataError(f"{found}; keep one of them")
        if not repeats:
            notes.append(f"request {request.case_id!r} repeats {first.case_id!r}; edited once")
    for subject, cases in prompts_of.items():
        if subject and len(cases) > 1:
            listed = ", ".join(map(repr, cases))
            notes.append(f"requests {listed} share the subject {subject!r}, and with it nearly the same key")
    return list(requests) if repeats else list(kept.values()), notes


def _place_subject(prompt: str, subject: str, where: str) -> tuple[str, int]:
    slots = prompt.count("{}")
    if slots > 1:
        raise DataError(f"{where}: prompt has {slots} '{{}}' ({prompt!r}); mark the subject once")
    if slots == 1:
        start = prompt.index("{}")
        return prompt[:start] + subject + prompt[start + 2 :], start
    found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)]
    start = found[-1] if found else prompt.rfind(subject)
    if start < 0:
        raise AbsentSubject(
            f"{where}: subject {subject!r:.200} is not in the prompt {prompt!r:.200}; write it there, or mark its "
            "place with {}"
        )
    return prompt, start


def _check_start(prompt: str, subject: str, start: Any, where: str) -> None:
    whole = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not whole or not prompt.startswith(subject, start):
        raise DataError(f"{where}: subject_start is {start!r}, but {subject!r} is not there in {prompt!r}")


def _case_id(value: Any) -> int | str:
    try:
        check_value(value)
    except ValueError as error:
        raise DataError(f"a case_id cannot be used: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"case_id must be a number or a text, found {type(value).__name__} ({value!r:.80})")
    return value


def _required_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, found {type(value).__name__} ({value!r:.80})")
    if not value.strip():
        raise DataError(f"{where} is empty; give it at least one visible character")
    if not is_text(value):
        raise DataError(f"{where} {NO_TEXT} ({value!r:.80})")


def _optional_text(value: Any, where: str) -> str | None:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, found {type(value).__name__} ({value!r:.80})")
    if value.strip() and not is_text(value):
        raise DataError(f"{where} {NO_TEXT} ({value!r:.80})")
    return value


def _probes(raw: Any, where: str) -> dict[str, Probe]:
    """Read EasyEdit's `{key: {"prompt": …, "ground_truth": …}}`, either value a text or a list of texts."""
    if raw is not None and not isinstance(raw, Mapping):
        raise DataError(f"{where} must be a mapping of names to prompts and answers, found {type(raw).__name__}")
    probes = {}
    for key, value in (raw or {}).items():
        if not is_text(key):
            raise DataError(f"{where}: a name must be a text, found {key!r}")
        if isinstance(value, Probe):
            probes[key] = value
            continue
        if not isinstance(value, Mapping) or "prompt" not in value or "ground_truth" not in value:
            raise DataError(f"{where}.{key} must have 'prompt' and 'ground_truth', found {value!r:.200}")
        prompts, answers = as_list(value["prompt"]), as_list(value["ground_truth"])
        if len(prompts) != len(answers):
            raise DataError(
                f"{where}.{key}: {len(prompts)} prompts but {len(answers)} ground truths; give one for each"
            )
        if not all(map(is_text, (*prompts, *answers))):
            raise DataError(f"{where}.{key}: prompts and ground truths must be non-empty texts, found {value!r:.200}")
        if prompts:
            probes[key] = Probe(prompts=prompts, answers=answers)
    return probes


def _probes_to_json(probes: Mapping[str, Probe]) -> dict[str, Any]:
    return {key: {"prompt": list(p.prompts), "ground_truth": list(p.answers)} for key, p in probes.items()}
