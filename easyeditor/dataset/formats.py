"""Dataset records to EditRequests: every format the field uses, recognised by its fields, one schema inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyeditor.base.errors import AbsentSubject, DataError
from easyeditor.base.files import check_value, read_json
from easyeditor.dataset.probes import Asked, Reading, empty, first, read_probes
from easyeditor.values.edit import EditRequest
from easyeditor.values.request import TEXT_FIELDS
from easyeditor.values.texts import is_text

Raw = Mapping[str, Any]
Parse = Callable[[Raw, int | str, Reading], EditRequest | list[EditRequest]]

SUBJECTS = ("subject", "concept")
OLD = ("ground_truth", "target_true", "target_old", "answers")
"""Fields with the answer before the edit."""
IDS = ("case_id", "case_index", "id")
REWRITE = "requested_rewrite"


class _Tracked(dict[str, Any]):
    """A record that notes which of its fields are read."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def recognise(raw: Raw) -> str:
    """The name of a record's format. Raises DataError listing what each format needs."""
    for name, (needed, _) in FORMATS.items():
        if needed <= raw.keys():
            return name
    listed = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise DataError(f"record with fields {sorted(map(str, raw))} is of no known format ({listed})")


def parse(raw: Any, where: str, case_id: int | str = 0, reading: Reading | None = None) -> EditRequest:
    """One record of any supported format that holds one edit. Raises DataError that starts with `where`."""
    edits = parse_all(raw, where, case_id, reading)
    if len(edits) != 1:
        raise DataError(f"{where}: holds {len(edits)} edits; only a dataset (mass_edit.py --data) takes such a record")
    return edits[0]


def parse_all(raw: Any, where: str, case_id: int | str = 0, reading: Reading | None = None) -> list[EditRequest]:
    """The edits of one record, nearly always one; `reading` says how, and counts what was left unread.

    Raises DataError that starts with `where`.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record must be a JSON object, found {type(raw).__name__}")
    reading, name = reading or Reading(), "unrecognised"
    try:
        check_value(raw)
        record = _Tracked({key: None if value != value else value for key, value in raw.items()})
        rewrites = raw.get(REWRITE)
        listed = rewrites if isinstance(rewrites, list) else [rewrites]
        inner = [_Tracked(one) for one in listed if isinstance(one, Mapping)]
        if inner:
            record[REWRITE] = inner if isinstance(rewrites, list) else inner[0]
            record.setdefault("para_question", None if isinstance(rewrites, list) else inner[0].get("question"))
        name = recognise(record)
        edits = FORMATS[name][1](record, _case_id(record, case_id), reading)
    except AbsentSubject as error:
        raise AbsentSubject(f"{where}: {error}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{where}: malformed {name} record ({type(error).__name__}: {error})") from error
    reading.unread.update(key for key, value in raw.items() if key not in record.read and not empty(value))
    unread = {key for one in inner for key, value in one.items() if key not in one.read and not empty(value)}
    reading.unread.update(f"{REWRITE}.{key}" for key in sorted(unread) if not key.endswith("id"))  # ids are no probes
    return edits if isinstance(edits, list) else [edits]


def read_request(path: Path, *, needs_subject: bool = True) -> EditRequest:
    """The one record in a JSON file (an object, or a list with a single object)."""
    raw = read_json(path)
    if isinstance(raw, list):
        if len(raw) != 1:
            raise DataError(f"{path}: holds {len(raw)} records; --request takes a file with one")
        raw = raw[0]
    reading = Reading(needs_subject=needs_subject)
    request = parse(raw, str(path), reading=reading)
    reading.tell(str(path))
    return request


def _case_id(raw: Raw, number: int | str) -> Any:
    for name in IDS:
        value = raw.get(name)
        if isinstance(value, float) and value.is_integer():  # pandas, where another record has none
            value = int(value)
        if name == IDS[0] and value is not None:
            return value
        if isinstance(value, (int, str)) and not isinstance(value, bool) and not empty(value):
            return value
    return number


def _request(
    raw: Raw, case_id: int | str, reading: Reading, prompt: Any, target: Any, subject: Any, old: Any, **more: Asked
) -> EditRequest:
    """A request of the parts that every format has, with all probes and texts of `raw`; `more` as `read_probes`'."""
    target, subject = first(target), _only(subject)
    if subject is None and reading.needs_subject:
        raise AbsentSubject(
            f"request {case_id!r}: it has no subject; give it one, the words in the prompt whose fact is changed"
        )
    given: dict[str, Any] = {
        **{"target_new": target, "ground_truth": first(old), "case_id": case_id},
        **read_probes(raw, target, reading, **more),
        **{name: raw[name] for name in (*TEXT_FIELDS, "multi_hop") if raw.get(name)},
    }
    return make_request(_only(prompt), subject, reading, **given)


def make_request(prompt: Any, subject: Any, reading: Reading, **given: Any) -> EditRequest:
    """`EditRequest.make`, without a subject that is not in the prompt where `reading` needs none."""
    if not reading.needs_subject and empty(subject):
        subject = None
    try:
        return EditRequest.make(prompt, subject=subject, **given)
    except AbsentSubject:
        if reading.needs_subject:
            raise
        return EditRequest.make(prompt, subject=None, **given)


def _only(value: Any) -> Any:
    """The text of a value that may be a list of one."""
    several = isinstance(value, (list, tuple)) and len(value) > 1
    return value if several else first(value)


def _plain(prompt: str, target: str) -> Parse:
    """A format whose record is the edit itself: the fields of its prompt and its target."""

    def read(raw: Raw, case_id: int | str, reading: Reading) -> EditRequest:
        subject = next((raw[name] for name in SUBJECTS if name in raw), None)
        old = next((raw[name] for name in OLD if not empty(raw.get(name))), None)
        return _request(raw, case_id, reading, raw[prompt], raw[target], subject, old)

    return read


def _mquake(raw: Raw, case_id: int | str, reading: Reading) -> list[EditRequest]:
    """MQuAKE, original and Remastered: a record holds one or more edits, and questions that need all of them.

    Each edit is a request (of several, the case ids end in -1, -2 …), its question a paraphrase. The questions are the
    last one's portability, for only then are all edits made; their name says how many edits it takes.
    """
    edits, questions = raw[REWRITE], raw.get("questions", [])
    if not edits:
        raise DataError("requested_rewrite is empty, so there is nothing to edit")
    name = "multi_hop" if len(edits) == 1 else f"multi_hop_{len(edits)}_edits"
    asked: dict[str, Asked] = {"portability": (name, list(questions), [raw["new_answer"] for _ in questions])}
    hops = _hops(raw)
    answers = _answers(raw, "new_answer")
    last = {"questions": list(filter(is_text, questions)) if answers else [], "answers": answers, "hops": hops}
    asked_of = {hop["question"]: hop["answers"] for hop in hops}

    def own(edit: Raw) -> dict[str, Any]:
        """What asks for an edit itself; aliases are those of the hop that asks the same."""
        question, target = edit.get("question"), _target(edit, "target_new")
        answers = list(dict.fromkeys([target, *asked_of.get(question, [])]))
        hop = {"question": question, "answers": answers, "relation": edit.get("relation_id") or ""}
        return {} if empty(question) else {"edit": hop}

    return [
        _request(
            {
                "rephrase_prompt": edit.get("question"),
                "multi_hop": {**own(edit), **(last if number == len(edits) else {})},
            },
            case_id if len(edits) == 1 else f"{case_id}-{number}",
            reading,
            edit["prompt"],
            _target(edit, "target_new"),
            edit["subject"],
            _target(edit, "target_true"),
            **(asked if number == len(edits) else {}),
        )
        for number, edit in enumerate(edits, 1)
    ]


def _hops(raw: Raw) -> list[dict[str, Any]]:
    """The single hops after the edits, each with the relation of its triple; none where one lacks its answer."""
    listed = raw.get("new_single_hops") or []
    triples = (raw.get("orig") or {}).get("new_triples") or []
    relations = [relation for _, relation, _ in triples] if len(triples) == len(listed) else [""] * len(listed)
    hops = [
        {"question": hop.get("question"), "answers": _answers(hop, "answer"), "relation": relation}
        for hop, relation in zip(listed, relations, strict=True)
    ]
    return hops if all(is_text(hop["question"]) and hop["answers"] for hop in hops) else []


def _answers(raw: Raw, name: str) -> list[str]:
    """An answer and its aliases, those that are texts."""
    return [text for text in (first(raw.get(name)), *(raw.get(f"{name}_alias") or [])) if is_text(text)]


def _counterfact(raw: Raw, case_id: int | str, reading: Reading) -> EditRequest | list[EditRequest]:
    """ROME's CounterFact: `requested_rewrite` with nested targets, paraphrases, neighbourhood prompts. AKEW adds a
    question, which is a paraphrase; a list of edits is MQuAKE's, without questions that need all of them."""
    rewrite = raw[REWRITE]
    if isinstance(rewrite, list):
        return _mquake(raw, case_id, reading)
    truth = _target(rewrite, "target_true")
    near = list(raw.get("neighborhood_prompts") or [])
    parts = (rewrite["prompt"], _target(rewrite, "target_new"), rewrite["subject"], truth)
    return _request(raw, case_id, reading, *parts, locality=("neighborhood", near, [truth] * len(near)))


def _target(rewrite: Raw, name: str) -> Any:
    """`{"str": …}` of ROME's records, or Remastered's flat field."""
    return first(rewrite[name] if name in rewrite else rewrite.get(f"{name}_str"))


def _hallueditbench(raw: Raw, case_id: int | str, reading: Reading) -> EditRequest:
    """HalluEditBench: `question` about `subject` answered by `object`; the multiple choice comes behind it."""
    parts = (raw["question"], raw["object"], raw["subject"], None)
    choices = raw.get("multiple_choice_with_letters")
    asked = None if empty(choices) else f"{raw['question']} {choices}"
    more = ("multiple_choice", asked, raw.get("multiple_choice_labels"))
    return _request(raw, case_id, reading, *parts, portability=more)


FORMATS: dict[str, tuple[frozenset[str], Parse]] = {
    "mquake": (frozenset({"requested_rewrite", "questions"}), _mquake),
    "counterfact": (frozenset({"requested_rewrite"}), _counterfact),
    "flat": (frozenset({"prompt", "target_new"}), _plain("prompt", "target_new")),
    "zsre": (frozenset({"src", "alt"}), _plain("src", "alt")),
    "wikibigedit": (frozenset({"update", "ans"}), _plain("update", "ans")),
    "qaedit": (frozenset({"prompt", "target"}), _plain("prompt", "target")),
    "ultraedit": (frozenset({"src", "ans"}), _plain("src", "ans")),
    "ultraeditbench": (frozenset({"prompt", "ans"}), _plain("prompt", "ans")),
    "fever": (frozenset({"prompt", "alt"}), _plain("prompt", "alt")),
    "wikibio": (frozenset({"text", "labels", "concept"}), _plain("text", "labels")),
    "question": (frozenset({"question", "answer"}), _plain("question", "answer")),
    "hallueditbench": (frozenset({"question", "subject", "object"}), _hallueditbench),
}
