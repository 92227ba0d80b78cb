"""Dataset records to EditRequests: every format the field uses, recognised by its fields, one schema inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyeditor.errors import DataError
from easyeditor.files import check_value, read_json
from easyeditor.records import EditRequest
from easyeditor.request import TEXT_FIELDS

Raw = Mapping[str, Any]


def recognise(raw: Raw) -> str:
    """The name of a record's format. Raises DataError listing what each format needs."""
    for name, (needed, _) in FORMATS.items():
        if needed <= raw.keys():
            return name
    listed = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise DataError(f"record with fields {sorted(map(str, raw))} is of no known format ({listed})")


def parse(raw: Any, where: str, case_id: int | str = 0) -> EditRequest:
    """One record of any supported format. Raises DataError that starts with `where`."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record must be a JSON object, found {type(raw).__name__}")
    name = "unrecognised"
    try:
        check_value(raw)
        name = recognise(raw)
        return FORMATS[name][1](raw, raw.get("case_id", case_id))
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
    """EasyEdit's flat CounterFact and HardCF/HardEdit: prompt, subject, target_new, ground_truth, optional probes."""
    locality = dict(raw.get("locality") or {})
    if raw.get("locality_prompt"):
        locality["neighborhood"] = {"prompt": raw["locality_prompt"], "ground_truth": raw.get("locality_ground_truth")}
    return EditRequest.make(
        raw["prompt"],
        subject=raw["subject"],
        target_new=raw["target_new"],
        ground_truth=raw.get("ground_truth"),
        rephrase_prompts=raw.get("rephrase_prompt") or raw.get("rephrase_prompts"),
        locality=locality,
        portability=raw.get("portability"),
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
        rephrase_prompts=raw.get("rephrase"),
        locality=locality,
        case_id=case_id,
        **_free_texts(raw),
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


def _free_texts(raw: Raw) -> dict[str, Any]:
    """Prompts and texts that only metrics read; any format may bring them under these names."""
    return {name: raw[name] for name in TEXT_FIELDS if raw.get(name)}


FORMATS: dict[str, tuple[frozenset[str], Callable[[Raw, int | str], EditRequest]]] = {
    "counterfact": (frozenset({"requested_rewrite"}), _counterfact),
    "flat": (frozenset({"prompt", "subject", "target_new"}), _flat),
    "zsre": (frozenset({"src", "alt", "subject"}), _zsre),
    "question": (frozenset({"question", "subject", "answer"}), _question),
}
