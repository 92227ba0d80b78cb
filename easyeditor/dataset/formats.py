"""Dataset records to EditRequests: every format the field uses, recognised by its fields, one schema inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyeditor.errors import AbsentSubject, DataError
from easyeditor.files import check_value, read_json
from easyeditor.records import EditRequest
from easyeditor.request import TEXT_FIELDS

Raw = Mapping[str, Any]
Made = EditRequest | list[EditRequest]


def recognise(raw: Raw) -> str:
    """The name of a record's format. Raises DataError listing what each format needs."""
    for name, (needed, _) in FORMATS.items():
        if needed <= raw.keys():
            return name
    listed = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise DataError(f"record with fields {sorted(map(str, raw))} is of no known format ({listed})")


def parse(raw: Any, where: str, case_id: int | str = 0) -> EditRequest:
    """One record of any supported format that holds one edit. Raises DataError that starts with `where`."""
    made = parse_all(raw, where, case_id)
    if len(made) != 1:
        raise DataError(f"{where}: holds {len(made)} edits; only a dataset (mass_edit.py --data) takes such a record")
    return made[0]


def parse_all(raw: Any, where: str, case_id: int | str = 0) -> list[EditRequest]:
    """The edits of one record, nearly always one. Raises DataError that starts with `where`."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record must be a JSON object, found {type(raw).__name__}")
    name = "unrecognised"
    try:
        check_value(raw)
        raw = {key: None if value != value else value for key, value in raw.items()}  # NaN: pandas writes it for none
        name = recognise(raw)
        made = FORMATS[name][1](raw, raw.get("case_id", case_id))
        return made if isinstance(made, list) else [made]
    except AbsentSubject as error:
        raise AbsentSubject(f"{where}: {error}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{where}: malformed {name} record ({type(error).__name__}: {error})") from error


def read_request(path: Path) -> EditRequest:
    """The one record in a JSON file (an object, or a list with a single object)."""
    raw = read_json(path)
    if isinstance(raw, list):
        if len(raw) != 1:
            raise DataError(f"{path}: holds {len(raw)} records; --request takes a file with one")
        raw = raw[0]
    return parse(raw, str(path))


def _mquake(raw: Raw, case_id: int | str) -> Made:
    """MQuAKE, original and Remastered: a record holds one or more edits, and questions that need all of them.

    Each edit is a request (of several, the case ids end in -1, -2 …), its question a paraphrase. The questions are the
    last one's portability, for only then are all edits made; their name says how many edits it takes.
    """
    edits, questions = raw["requested_rewrite"], raw["questions"]
    made: list[EditRequest] = []
    if not edits:
        raise DataError("requested_rewrite is empty, so there is nothing to edit")
    name = "multi_hop" if len(edits) == 1 else f"multi_hop_{len(edits)}_edits"
    probes = {name: {"prompt": questions, "ground_truth": [raw["new_answer"]] * len(questions)}}
    for number, edit in enumerate(edits, 1):
        new, old = (edit[key]["str"] if key in edit else edit[f"{key}_str"] for key in ("target_new", "target_true"))
        request = EditRequest.make(
            edit["prompt"],
            subject=edit["subject"],
            target_new=new,
            ground_truth=old,
            rephrase_prompts=edit.get("question"),
            portability=probes if number == len(edits) else None,
            case_id=case_id if len(edits) == 1 else f"{case_id}-{number}",
        )
        made.append(request)
    return made


def _counterfact(raw: Raw, case_id: int | str) -> EditRequest:
    """ROME's CounterFact: `requested_rewrite` with nested targets, paraphrases, neighbourhood prompts."""
    rewrite = raw["requested_rewrite"]
    truth = rewrite["target_true"]["str"]
    near = list(raw.get("neighborhood_prompts") or [])
    return EditRequest.make(
        rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"],
        ground_truth=truth,
        rephrase_prompts=raw.get("paraphrase_prompts"),
        locality={"neighborhood": {"prompt": near, "ground_truth": [truth] * len(near)}} if near else None,
        case_id=case_id,
        **_free_texts(raw),
    )


def _flat(raw: Raw, case_id: int | str) -> EditRequest:
    """EasyEdit's flat CounterFact, HardCF/HardEdit and KnowEdit: prompt, subject, target_new, ground_truth, probes."""
    locality = _named_probes(raw, "locality")
    if raw.get("locality_prompt"):
        locality["neighborhood"] = {"prompt": raw["locality_prompt"], "ground_truth": raw.get("locality_ground_truth")}
    return EditRequest.make(
        raw["prompt"],
        subject=raw["subject"],
        target_new=raw["target_new"],
        ground_truth=raw.get("ground_truth"),
        rephrase_prompts=raw.get("rephrase_prompt") or raw.get("rephrase_prompts") or raw.get("rephrase"),
        locality=locality,
        portability=_named_probes(raw, "portability"),
        case_id=case_id,
        **_free_texts(raw),
    )


def _zsre(raw: Raw, case_id: int | str) -> EditRequest:
    """ZsRE: `src` edited to `alt`; `answers` true; `loc` is a Natural Questions prompt, its "nq question: " mark
    removed."""
    locality = None
    if raw.get("loc"):
        answers = raw.get("loc_ans")
        answer = answers[0] if isinstance(answers, list) and answers else answers
        locality = {"neighborhood": {"prompt": raw["loc"].removeprefix("nq question: "), "ground_truth": answer}}
    return EditRequest.make(
        raw["src"],
        subject=raw["subject"],
        target_new=raw["alt"],
        ground_truth=raw.get("answers"),
        rephrase_prompts=raw.get("rephrase") or None,
        locality=locality,
        case_id=case_id,
        **_free_texts(raw),
    )


def _wikibio(raw: Raw, case_id: int | str) -> EditRequest:
    """KnowEdit's WikiBio: `text` about `concept`, continued by `labels`."""
    return EditRequest.make(
        raw["text"],
        subject=raw["concept"],
        target_new=_first(raw["labels"]),
        locality=_named_probes(raw, "locality"),
        portability=_named_probes(raw, "portability"),
        case_id=case_id,
    )


def _wikibigedit(raw: Raw, case_id: int | str) -> EditRequest:
    """WikiBigEdit: `update` is the question and `ans` its new answer, also to `personas`; `mhop` needs a second hop."""
    names = {"personas": ("personas", "ans"), "mhop": ("mhop", "mhop_ans")}
    near = {"neighborhood": {"prompt": raw["loc"], "ground_truth": raw.get("loc_ans")}} if raw.get("loc") else None
    further = {
        name: {"prompt": raw[prompt], "ground_truth": raw.get(answer)}
        for name, (prompt, answer) in names.items()
        if raw.get(prompt)
    }
    return EditRequest.make(
        raw["update"],
        subject=raw["subject"],
        target_new=raw["ans"],
        ground_truth=raw.get("ground_truth"),
        rephrase_prompts=raw.get("rephrase") or None,
        locality=near,
        portability=further,
        case_id=case_id,
    )


def _qaedit(raw: Raw, case_id: int | str) -> EditRequest:
    """QAEdit: `prompt` answered by `target`; `locality` a list of `loc` with `loc_ans`."""
    near = raw.get("locality") or []
    prompts, answers = [item["loc"] for item in near], [_first(item["loc_ans"]) for item in near]
    return EditRequest.make(
        raw["prompt"],
        subject=raw["subject"],
        target_new=raw["target"],
        rephrase_prompts=raw.get("rephrase") or None,
        locality={"neighborhood": {"prompt": prompts, "ground_truth": answers}} if near else None,
        case_id=raw.get("id", case_id),
    )


def _question(raw: Raw, case_id: int | str) -> EditRequest:
    """Question lists: `question` with the subject in it, continued by `answer`."""
    return EditRequest.make(
        raw["question"],
        subject=raw["subject"],
        target_new=raw["answer"],
        case_id=raw.get("case_index", case_id),
        **_free_texts(raw),
    )


def _named_probes(raw: Raw, field: str) -> dict[str, Any]:
    """`name: {"prompt": …, "ground_truth": …}` as it is; KnowEdit's `name: [{"prompt": …, "ground_truth": …}, …]` made
    so: of answers that mean the same the first, a prompt without an answer left out."""
    value = raw.get(field) or {}
    if not isinstance(value, Mapping):
        raise DataError(f"{field} must be a mapping of names to prompts and answers, found {type(value).__name__}")
    named = {name: _paired(probe) if isinstance(probe, list) else probe for name, probe in value.items()}
    return {name: probe for name, probe in named.items() if probe is not None}


def _paired(items: list[Any]) -> dict[str, list[Any]]:
    pairs = [(_first(item["prompt"]), _first(item["ground_truth"])) for item in items]
    kept = [pair for pair in pairs if pair[1] not in (None, "")]
    return {"prompt": [prompt for prompt, _ in kept], "ground_truth": [answer for _, answer in kept]}


def _first(value: Any) -> Any:
    """The first of a list, however deep; None of an empty one."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value


def _free_texts(raw: Raw) -> dict[str, Any]:
    """Prompts and texts that only metrics read; any format may bring them under these names."""
    return {name: raw[name] for name in TEXT_FIELDS if raw.get(name)}


FORMATS: dict[str, tuple[frozenset[str], Callable[[Raw, int | str], Made]]] = {
    "mquake": (frozenset({"requested_rewrite", "questions"}), _mquake),
    "counterfact": (frozenset({"requested_rewrite"}), _counterfact),
    "flat": (frozenset({"prompt", "subject", "target_new"}), _flat),
    "zsre": (frozenset({"src", "alt", "subject"}), _zsre),
    "wikibigedit": (frozenset({"update", "ans", "subject"}), _wikibigedit),
    "qaedit": (frozenset({"prompt", "target", "subject"}), _qaedit),
    "wikibio": (frozenset({"text", "labels", "concept"}), _wikibio),
    "question": (frozenset({"question", "subject", "answer"}), _question),
}
