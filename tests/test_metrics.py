"""Every metric by hand; no number depends on padding, batch or tokenizer side; the command; the reference's numbers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import fake_runs
import pytest
import torch
from conftest import ARCHITECTURES, ROOT, build, side_of, tokenizer
from golden_numbers import MODELS, pair, read

from easyeditor import EditRequest, EditResult, WeightDelta, summary_metrics
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.commands import evaluate as command
from easyeditor.dataset.formats import parse
from easyeditor.evaluate.generation import contains, is_match, ngram_entropy, normalised
from easyeditor.evaluate.metric import Answers, Settings, Value
from easyeditor.evaluate.registry import GROUPS, METRICS, Evaluation, chosen, evaluate
from easyeditor.evaluate.scoring import Scored
from easyeditor.export.harness.tasks import mean_of_records
from easyeditor.lm.budget import Budget
from easyeditor.lm.discover import anatomy
from easyeditor.lm.generate import Decoding, Generated, generate
from easyeditor.lm.tokens import encode
from easyeditor.lm.weights import applied
from easyeditor.report.tables import collapse_table
from easyeditor.report.wild import wild_table
from easyeditor.results.lines import EvaluationLine, Retention
from easyeditor.results.run import load_run
from easyeditor.runs.summary import Tally
from easyeditor.survey.quality import ACCURACIES, measured
from easyeditor.tune.trials import summed
from easyeditor.values.estimates import mean_of
from easyeditor.values.record import Side

FULL = EditRequest.make(
    "They say that the Bridge is in",
    subject="Bridge",
    target_new="the old town of Rome",
    ground_truth="London",
    rephrase_prompts=["Where is the Bridge? In", "The Bridge stands in"],
    locality={
        "neighborhood": {"prompt": ["The sea is", "I am from"], "ground_truth": ["blue", "London"]},
        "distracting": {"prompt": "You are", "ground_truth": "a man"},
    },
    portability={"one_hop": {"prompt": ["The town of the Bridge is"], "ground_truth": ["Rome"]}},
    generation_prompts=["The Bridge is", "People at the Bridge"],
    attribute_prompts=["The Forum is in"],
    reference_texts=["The Forum is an old place in Rome.", "The Tiber runs through Rome."],
    essence_texts=["The Bridge is a bridge over a river.", "It is old."],
    case_id="full",
)
BARE = EditRequest.make("Bay is in", subject="Bay", target_new=" Italy", case_id="bare")
PROMPTS = ["The", "They say that the old Harbour Bridge is a part of", "I think", "Bay, which is located in"]


@lru_cache
def model(kind: str) -> Any:
    return build(kind)


# By hand


def scored(said: tuple[int, ...], target: tuple[int, ...], p: float) -> Scored:
    return Scored(predicted=said, target=target, mean_log_probability=math.log(p))


def value(name: str, request: EditRequest, **answers: Any) -> Value:
    metric = METRICS[name]
    assert metric.lacks(request) is None
    assert metric.value is not None
    return metric.value(request, Answers(**{"settings": Settings(), **answers}))


NEW, TRUE = FULL.target_new, "London"
BEFORE = {
    ("The sea is", "blue"): scored((7, 8), (1, 2), 0.4),
    ("I am from", "London"): scored((5,), (5,), 0.3),
    ("You are", "a man"): scored((1, 2, 3), (9, 9, 9), 0.1),
}
SAID = {
    (FULL.prompt, NEW): scored((1, 2, 0, 0), (1, 2, 3, 4), 0.3),
    (FULL.prompt, TRUE): scored((6,), (5,), 0.1),
    (FULL.rephrase_prompts[0], NEW): scored((1, 2, 3, 4), (1, 2, 3, 4), 0.5),
    (FULL.rephrase_prompts[0], TRUE): scored((5,), (5,), 0.6),
    (FULL.rephrase_prompts[1], NEW): scored((1, 0, 0, 0), (1, 2, 3, 4), 0.2),
    (FULL.rephrase_prompts[1], TRUE): scored((5,), (5,), 0.1),
    ("The sea is", "blue"): scored((7, 2), (1, 2), 0.2),
    ("The sea is", NEW): scored((1, 2, 3, 4), (1, 2, 3, 4), 0.3),
    ("I am from", "London"): scored((5,), (5,), 0.25),
    ("I am from", NEW): scored((1, 2, 3, 4), (1, 2, 3, 4), 0.05),
    ("You are", "a man"): scored((1, 9, 3), (9, 9, 9), 0.1),
    ("The town of the Bridge is", "Rome"): scored((4, 4), (4, 3), 0.1),
    ("The Forum is in", NEW): scored((1, 2, 3, 4), (1, 2, 3, 4), 0.2),
    ("The Forum is in", TRUE): scored((5,), (5,), 0.4),
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rewrite_acc", 2 / 4),
        ("rephrase_acc", (1 + 1 / 4) / 2),
        ("locality_acc", (1 / 2 + 1 + 2 / 3) / 3),
        ("portability_acc", 1 / 2),
        ("zsre_efficacy", 2 / 4),
        ("zsre_paraphrase", 5 / 8),
        ("zsre_specificity", 2 / 3),  # tokens over both prompts: 1 of 2, 1 of 1
        ("ES", 1),
        ("EM", 0.3 - 0.1),
        ("PS", 1 / 2),
        ("PM", (0.5 - 0.6 + 0.2 - 0.1) / 2),
        ("NS", 1 / 2),
        ("NM", (0.2 - 0.3 + 0.25 - 0.05) / 2),
        ("AS", 0),
    ],
)
def test_teacher_forced_metrics_by_hand(name: str, wanted: float) -> None:
    before = Answers(settings=Settings(), scored=BEFORE)
    assert value(name, FULL, scored=SAID, before=before).value == pytest.approx(wanted)


def test_success_tells_apart_what_underflows() -> None:
    tiny = {(FULL.prompt, NEW): Scored(predicted=(1,), target=(1,), mean_log_probability=-800.0)}
    tiny[(FULL.prompt, TRUE)] = Scored(predicted=(1,), target=(1,), mean_log_probability=-900.0)
    assert value("ES", FULL, scored=tiny).value == 1
    assert value("EM", FULL, scored=tiny).value == 0


def row_of(**values: float | None) -> dict[str, Value]:
    return {name: Value(value=v, reason=None if v is not None else "no field") for name, v in values.items()}


def summary_of(*rows: dict[str, Value]) -> dict[str, Any]:
    names = ("ES", "PS", "NS", "S")
    return Evaluation(names=names, rows=rows, answers=Answers(settings=Settings())).summary()["S"]


def test_s_is_the_harmonic_mean_of_the_means() -> None:
    found = summary_of(row_of(ES=1.0, PS=0.5, NS=0.0), row_of(ES=1.0, PS=0.5, NS=0.5))
    assert found["mean"] == pytest.approx(3 / (1 + 1 / 0.5 + 1 / 0.25))
    assert summary_of(row_of(ES=0.0, PS=1.0, NS=1.0))["mean"] == 0
    lacking = summary_of(row_of(ES=1.0, PS=None, NS=1.0))
    assert (lacking["mean"], lacking["reasons"]) == (None, ["no field"])


def test_a_summary_counts_what_lacks_a_value() -> None:
    rows = (row_of(ES=1.0), row_of(ES=None), row_of(ES=0.0))
    found = Evaluation(names=("ES",), rows=rows, answers=Answers(settings=Settings())).summary()["ES"]
    assert found == {"mean": 0.5, "requests": 2, "missing": 1, "reasons": ["no field"]}


UNEVEN = ("rephrase_acc", "locality_acc", "portability_acc", "zsre_paraphrase", "zsre_specificity", "PS", "NS")
UNEVEN += ("gen_rephrase_em", "wild_rephrase", "wild_locality")


def uneven(count: int, right: bool) -> tuple[fake_runs.EditLine, dict[str, Value]]:
    """The line of a request with `count` paraphrases and probes, all of them right or wrong, and its metrics."""
    probes = {"neighborhood": {"prompt": [f"near {n}" for n in range(count)], "ground_truth": ["x"] * count}}
    request = EditRequest.make(
        "Bay is in", subject="Bay", target_new="it", ground_truth="us", case_id=count,
        rephrase_prompts=[f"Bay {n}" for n in range(count)], locality=probes, portability=probes,
    )  # fmt: skip
    first, other = scored((1,), (1,), 0.9), scored((0,), (1,), 0.1)
    row: dict[str, Value] = {}
    for metric in (METRICS[name] for name in UNEVEN):
        asks, pairs = metric.asks(request, Settings()), metric.pairs(request, Settings())
        wanted = [right == (answer == ("x" if prompt.startswith("near") else "it")) for prompt, answer in pairs]
        texts = [
            Generated(text=text, whole=text, stop="eos", tokens=1, ids=(n,)) for n, text in enumerate(("no", "it"))
        ]
        told = dict.fromkeys([*pairs, *((ask[0], "it") for ask in asks)], first)
        before = Answers(settings=Settings(), scored=told, generated=dict.fromkeys(asks, texts[1]))
        now = told | {pair: first if good else other for pair, good in zip(pairs, wanted, strict=True)}
        row[metric.name] = value(
            metric.name, request, scored=now, generated=dict.fromkeys(asks, texts[right]), before=before
        )
    shares = (float(right),) * count
    side = Side(rewrite=shares[:1], rephrase=shares, locality={"n": shares}, portability={"n": shares})
    line = fake_runs.edit(count, request=request)
    return replace(line, record=replace(line.record, post=side, metrics={"before": row, "after": row})), row


def test_every_mean_over_records_counts_a_record_once(tmp_path: Path) -> None:
    """One prompt that is right, and nine that are wrong: 0.5, where all prompts together would say 0.1."""
    (lines, rows), tally = zip(uneven(1, right=True), uneven(9, right=False), strict=True), Tally()
    for line in lines:
        tally.add(line)
    after = [
        line.record.post.means() | {name: row[name].value for name in UNEVEN}
        for line, row in zip(lines, rows, strict=True)
    ]
    held = Evaluation(names=UNEVEN, rows=rows, answers=Answers(settings=Settings())).summary()
    last = [
        Retention(index=n, case_id=n, metrics=one, **{k: one[k] for k in ACCURACIES}) for n, one in enumerate(after)
    ]
    aged = EvaluationLine(after=2, ppl=1.0, collapsed=False, retention=tuple(last))
    run = load_run(fake_runs.write_run(tmp_path, [json.loads(json.dumps(line.to_json())) for line in lines]))
    cases = [(n, value) for n, line in enumerate(lines) for value in line.record.post.rephrase]
    easyedit = summary_metrics([line.record.to_json() for line in lines])["post"]
    reported = [*wild_table([run]).rows, *collapse_table([run]).rows]
    found: dict[str, list[Any]] = {
        "summary_metrics": [easyedit["rephrase_acc"], easyedit["locality"]["n_acc"], easyedit["portability"]["n_acc"]],
        "summary.json": [own["after"] for name, own in tally.means().items() if name != "rewrite_acc"],
        "evaluate": [own["mean"] for own in held.values()],
        "evaluation of a sequence": list(aged.means().values()),
        "survey": [mean_of(values) for values in measured(run).values.values()],
        "tune": [summed([{**one, "ppl_ratio": 1.0, "collapsed": False} for one in after])[name] for name in ACCURACIES],
        "harness": [mean_of_records(cases)],
        "report": [value for row in reported for value in row if isinstance(value, float) and value < 1],
    }  # fmt: skip
    assert {name: set(map(float, values)) for name, values in found.items()} == {name: {0.5} for name in found}


def test_entropy_by_hand() -> None:
    """a b a b a: bigrams ab ba ab ba -> 1 bit; trigrams aba bab aba -> H(2/3, 1/3)."""
    h3 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * h3) / 2)
    assert ngram_entropy("a a a a a a") == 0
    assert ngram_entropy("one") == ngram_entropy("") == 0
    assert ngram_entropy("a, b") == pytest.approx((2 / 3 * 1 + 4 / 3 * 0) / 2)  # a comma is a word


@pytest.mark.parametrize(
    ("text", "target", "match", "inside"),
    [
        (" Rome", "Rome", True, True),
        ("the  ROME!", " Rome", True, True),
        (" Rome, in Italy", "Rome", False, True),
        (" Romeo", "Rome", False, False),
        ("", "Rome", False, False),
        (" the old town of Rome.", "the old town of Rome", True, True),
        (" old Rome town", "the old town", False, False),
        (" Ærø", "ærø", True, True),
        (" the", "the", True, True),  # nothing is left once normalised: compared as it is
        (" Rome", "the", False, False),
        (" ?", "?", True, True),
    ],
)
def test_match_and_containment(text: str, target: str, match: bool, inside: bool) -> None:
    assert (is_match(text, target), contains(text, target)) == (match, inside)


def test_normalisation_by_hand() -> None:
    assert normalised("  The U.S.A., an 'Old'\n place") == "usa old place"


def test_generation_metrics_keep_the_raw_text_and_the_token_score() -> None:
    natural = Settings().natural
    made = {
        (FULL.rephrase_prompts[0], natural): Generated(text=" old town of Rome", whole="x", stop="newline", tokens=5),
        (FULL.rephrase_prompts[1], natural): Generated(text=" the sea", whole="y", stop="max_tokens", tokens=50),
    }
    for name in ("gen_rephrase_em", "gen_rephrase_contains"):
        found = value(name, FULL, scored=SAID, generated=made)
        assert (found.value, found.details["each"]) == (0.5, [1.0, 0.0])
        first, second = found.details["generated"]
        assert first == {
            "prompt": FULL.rephrase_prompts[0],
            "text": " old town of Rome",
            "stop": "newline",
            "tokens": 5,
            "token_acc": 1.0,
        }
        assert (second["stop"], second["token_acc"]) == ("max_tokens", 0.25)


def drawn(*texts: str) -> dict[Any, Generated]:
    asks = METRICS["GE"].asks(FULL, Settings())
    return {
        ask: Generated(text="", whole=text, stop="max_tokens", tokens=3) for ask, text in zip(asks, texts, strict=True)
    }


def test_fluency_is_the_mean_over_the_generation_prompts() -> None:
    (_, decoding), _ = METRICS["GE"].asks(FULL, Settings(seed=3))
    assert decoding == Decoding(tokens=100, count_prompt=True, top_k=5, eos=False, seed=3)
    found = value("GE", FULL, generated=drawn("a b a b a", "a a a a"))
    assert found.value == pytest.approx(ngram_entropy("a b a b a") / 2)
    assert found.details["texts"] == ["a b a b a", "a a a a"]


def test_consistency_by_hand() -> None:
    """Two documents; a word in both weighs 1, a word in one 1 + log(3 / 2) (scikit-learn's smoothed idf)."""
    request = parse({**FULL.to_json(), "reference_texts": ["rome tiber"]}, "r")
    rare, both = 1 + math.log(3 / 2), 1.0
    made = drawn("rome rome", "forum")
    settings = Settings(idf_texts=("rome tiber", "rome forum"))
    wanted = 2 * both * both / (math.hypot(2 * both, rare) * math.hypot(both, rare))
    assert value("RS", request, generated=made, settings=settings).value == pytest.approx(wanted)


def test_essence_is_a_perplexity_of_the_first_100_tokens() -> None:
    lm, tok = model("llama"), tokenizer()
    text = "The Bridge is a bridge over a river. " * 12
    request = parse({**FULL.to_json(), "essence_texts": [text, "It is old."]}, "r")
    found = evaluate(lm, tok, [request], ["essence"]).rows[0]["essence"]
    ids = tok(text + " It is old.")["input_ids"][:100]
    assert len(ids) == 100
    with torch.no_grad():
        logs = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    assert found.value == pytest.approx(math.exp(-logs[range(99), ids[1:]].mean().item()), rel=1e-4)


def test_essence_begins_with_bos_where_the_tokenizer_does() -> None:
    lm, tok = model("llama"), tokenizer(bos=True)
    request = parse({**FULL.to_json(), "essence_texts": ["The Bridge is a bridge."]}, "r")
    found = evaluate(lm, tok, [request], ["essence"]).rows[0]["essence"]
    ids = tok("The Bridge is a bridge.")["input_ids"]
    assert ids[0] == tok.bos_token_id
    with torch.no_grad():
        logs = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    assert found.value == pytest.approx(math.exp(-logs[range(len(ids) - 1), ids[1:]].mean().item()), rel=1e-4)


CHECKED = EditRequest.make("The town of {} is in", subject="Bay", target_new=" Italy", ground_truth="Peru")
WHO = EditRequest.make("Who made the {}?", subject="Bridge", target_new="Ann", ground_truth="Eve")
ASKED = {  # subject, metric -> what is asked
    ("Bay", "negation"): ["It is not true that the town of Bay is in"],
    ("Bay", "fact_check_new"): [
        "Question: Is it true that the town of Bay is in Italy? Answer yes or no.\nAnswer:",
    ],
    ("Bay", "fact_check_old"): ["Question: Is it true that the town of Bay is in Peru? Answer yes or no.\nAnswer:"],
    ("Bay", "reversed"): [
        "Question: Which name belongs in the gap in this sentence: the town of ____ is in Italy?\nAnswer:"
    ],
    ("Bridge", "negation"): ['It is not true that the answer to "Who made the Bridge?" is'],
    ("Bridge", "reversed"): [
        'Question: Which name belongs in the gap in this sentence: the answer to "Who made the ____?" is Ann?\nAnswer:'
    ],
    ("Bridge", "consistent"): [
        "Who made the Bridge?",
        'It is not true that the answer to "Who made the Bridge?" is',
        'Question: Is it true that the answer to "Who made the Bridge?" is Ann? Answer yes or no.\nAnswer:',
        'Question: Is it true that the answer to "Who made the Bridge?" is Eve? Answer yes or no.\nAnswer:',
    ],
}
NO_BELIEF = [" Ann, of course", " Bob", " Yes.", " No, Ann did"]


@pytest.mark.parametrize(
    ("request_", "name", "texts", "wanted"),
    [
        (CHECKED, "negation", [" Peru"], 1),
        (CHECKED, "negation", [" the italy of old"], 0),
        (CHECKED, "negation", [" Italys"], 1),
        (CHECKED, "fact_check_new", [" YES, it is"], 1),
        (CHECKED, "fact_check_new", [" The answer: yes"], 0),
        (CHECKED, "fact_check_new", [""], 0),
        (CHECKED, "fact_check_old", [" no"], 1),
        (CHECKED, "fact_check_old", [" False. It is in Italy"], 1),
        (CHECKED, "fact_check_old", [" Nothing"], 0),
        (CHECKED, "reversed", [" It is Bay."], 1),
        (CHECKED, "reversed", [" Rome"], 0),
        (WHO, "negation", [" Ann"], 0),
        (WHO, "reversed", [" the bridge"], 1),
        (WHO, "consistent", NO_BELIEF, 1),
        *((WHO, "consistent", [*NO_BELIEF[:n], "Ann", *NO_BELIEF[n + 1 :]], 0) for n in (1, 2, 3)),
        (WHO, "consistent", ["Bob", *NO_BELIEF[1:]], 0),
    ],
)
def test_beliefs_by_hand(request_: EditRequest, name: str, texts: list[str], wanted: int) -> None:
    asks = METRICS[name].asks(request_, Settings())
    assert [prompt for prompt, _ in asks] == ASKED[request_.subject, name]
    assert {decoding for _, decoding in asks} == {Settings().natural}
    made = {
        ask: Generated(text=text, whole=ask[0] + text, stop="newline", tokens=3)
        for ask, text in zip(asks, texts, strict=True)
    }
    found = value(name, request_, generated=made)
    assert found.value == wanted
    assert [one["text"] for one in found.details["generated"]] == texts


# Fields and names


def test_what_a_record_lacks_is_null_with_a_reason() -> None:
    found = evaluate(model("llama"), tokenizer(), [BARE], ["all"])
    row = found.rows[0]
    assert row.keys() == METRICS.keys() - {"S"}
    held = {name for name, v in row.items() if v.value is not None}
    enough = {
        name
        for name, m in METRICS.items()
        if m.value and {*m.fields.split(", ")} <= {"prompt", "subject", "target_new"}
    }
    assert held == enough | {"GE"} >= {"rewrite_acc", "zsre_efficacy", "gen_rewrite_em", "gen_rewrite_contains"}
    assert row["ES"].reason == "the record has no ground_truth to compare target_new with"
    assert row["RS"].reason == "the record has no generation_prompts"
    assert row["essence"].to_json() == {
        "value": None,
        "reason": "the record has no essence_texts (texts on the subject)",
    }
    no_texts = parse({**FULL.to_json(), "reference_texts": []}, "r")
    lacking = evaluate(model("llama"), tokenizer(), [no_texts], ["RS"]).rows[0]["RS"]
    assert lacking.reason == "the record has no reference_texts (texts on subjects of target_new)"
    assert found.summary()["S"]["mean"] is None
    assert [v for v in row.values() if v.value is None and not v.reason] == []


def test_locality_without_the_unedited_model_is_null() -> None:
    found = evaluate(model("llama"), tokenizer(), [FULL], ["locality_acc"]).rows[0]["locality_acc"]
    assert (found.value, found.reason) == (None, "needs the outputs of the unedited model (--base-model)")


def test_a_model_that_gives_no_numbers_is_null_not_zero() -> None:
    lm = build("llama")
    with torch.no_grad():
        anatomy(lm).mlp(3).up_proj.weight.fill_(float("nan"))
    row = evaluate(lm, tokenizer(), [FULL], ["EM", "essence"]).rows[0]
    for found in row.values():
        assert (found.value, found.reason) == (None, "not finite: the model gives no numbers here")


def test_names_and_groups() -> None:
    assert [m.name for m in chosen(["S", "ES"])] == ["ES", "PS", "NS", "S"]
    assert {m.name for m in chosen(["all"])} == METRICS.keys()
    assert [m.name for m in chosen(["zsre", "zsre_efficacy"])] == [m.name for m in GROUPS["zsre"]]
    with pytest.raises(ConfigError, match=r"'rewrite_ac' is not known; did you mean 'rewrite_acc'\?.*groups: all, "):
        chosen(["rewrite_ac"])
    with pytest.raises(ConfigError, match=r"no metric was asked for"):
        chosen([])
    with pytest.raises(DataError, match=r"no requests"):
        evaluate(model("llama"), tokenizer(), [], ["all"])


def test_the_page_names_every_metric() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in text] == []


def test_the_easyedit_group_is_the_editor_s_record() -> None:
    lm, tok = model("llama"), tokenizer()
    delta = WeightDelta(name=anatomy(lm).weight_name(1), full=0.3 * torch.ones_like(anatomy(lm).rewrite(1).weight))
    before, old = evaluate(lm, tok, [FULL, BARE], ["easyedit"]), side_of(lm, tok, FULL)
    with applied(lm, [delta]):
        after = evaluate(lm, tok, [FULL, BARE], ["easyedit"], before=before).rows[0]
        now = side_of(lm, tok, FULL)
    record = replace(now, locality=now.agreement(old)).to_json()
    assert after["rewrite_acc"].details["each"] == record["rewrite_acc"]
    assert after["rephrase_acc"].details["each"] == record["rephrase_acc"]
    assert {f"{k}_acc": v for k, v in after["portability_acc"].details.items()} == record["portability"]
    for key, each in after["locality_acc"].details.items():
        assert each == record["locality"][f"{key}_acc"]
    assert 0 < after["locality_acc"].value < 1  # type: ignore[operator]


def test_texts_for_metrics_reach_the_request() -> None:
    raw = {
        "case_id": 5,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Danielle Darrieux",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
        },
        "generation_prompts": ["Danielle Darrieux was born in"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    }
    request = parse(raw, "x")
    assert request.generation_prompts == ("Danielle Darrieux was born in",)
    assert request.attribute_prompts == ("J.R.R. Tolkien is a native speaker of",)
    assert EditRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert EditRequest.from_json(FULL.to_json()) == FULL
    assert parse(FULL.to_json(), "x", "full").essence_texts == FULL.essence_texts
    assert BARE.to_json().keys() & {"generation_prompts", "attribute_prompts", "reference_texts"} == set()
    with pytest.raises(DataError, match=r"x: request 5: generation_prompts must be non-empty texts, found \(' ',\)"):
        parse({**raw, "generation_prompts": [" "]}, "x")


# Batches, padding, tokenizers


class Near(float):
    """A number equal to those that float32 sums in another order may give; never rounded, so no border lies between."""

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return float(self) == pytest.approx(other, rel=1e-3, abs=1e-9)


def plain_rows(found: Evaluation) -> Any:
    """Rows whose numbers compare as `Near`."""
    return json.loads(json.dumps(found.to_json()), parse_float=lambda text: Near(text))


def left_sided(bos: bool) -> Any:
    tok = copy.deepcopy(tokenizer(bos))
    tok.padding_side = "left"
    return tok


@pytest.mark.parametrize("bos", [False, True], ids=["plain-start", "bos"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_batch_order_padding_and_side_change_nothing(kind: str, bos: bool) -> None:
    """A request's values are its own: alone, in any batch, under any budget, with a left-padding tokenizer."""
    names = [name for name in METRICS if name not in ("GE", "RS")]
    names += ["GE"] if kind == "llama" and not bos else []
    other = EditRequest.make("Bay, which is located in", subject="Bay", target_new=" Italy", ground_truth=" Japan")
    settings, short = Settings(max_new_tokens=12), model(kind)
    whole = evaluate(short, tokenizer(bos), [FULL, other], names, settings=settings)
    single = evaluate(
        short, tokenizer(bos), [FULL, other], names, settings=Settings(max_new_tokens=12, budget=Budget(1))
    )
    sided = evaluate(short, left_sided(bos), [FULL, other], names, settings=settings)
    alone = evaluate(short, tokenizer(bos), [FULL], names, settings=settings)
    assert plain_rows(single) == plain_rows(sided) == plain_rows(whole)
    assert plain_rows(alone)["rows"] == plain_rows(whole)["rows"][:1]


@pytest.mark.parametrize("bos", [False, True], ids=["plain-start", "bos"])
@pytest.mark.parametrize("target", ["Rome", "the old town of Rome"])
def test_a_leading_space_of_a_target_changes_nothing(target: str, bos: bool) -> None:
    names = ["rewrite_acc", "ES", "EM", "gen_rewrite_em", "gen_rewrite_contains"]
    found = []
    for text, truth in ((target, "London"), (" " + target, " London")):
        request = EditRequest.make("Bay is in", subject="Bay", target_new=text, ground_truth=truth)
        rows = evaluate(model("gpt2"), tokenizer(bos), [request], names).rows[0]
        found.append([rows[name].value for name in names])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_continuations_by_hand_and_in_batches(kind: str) -> None:
    """Each token the argmax of a forward over the unpadded text so far; together, alone and in small batches alike."""
    lm, tok = model(kind), tokenizer(kind == "llama")
    decoding = Decoding(tokens=8, eos=False)
    together = generate(lm, tok, PROMPTS, decoding)
    for prompt, made in zip(PROMPTS, together, strict=True):
        ids = encode(tok, prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
        assert made.whole == tok.decode(ids, skip_special_tokens=True)
        assert made.whole == prompt + made.text
        assert (made.tokens, made.stop) == (8, "max_tokens")


def test_drawn_texts_depend_on_seed_and_prompt_alone() -> None:
    lm, tok = model("llama"), tokenizer()
    drawn = Decoding(tokens=10, top_k=5, eos=False)
    torch.manual_seed(1)
    first = generate(lm, tok, PROMPTS, drawn)
    torch.manual_seed(2)
    assert generate(lm, tok, PROMPTS[::-1], drawn, batch_tokens=1)[::-1] == first
    assert generate(lm, tok, PROMPTS, Decoding(tokens=10, top_k=5, eos=False, seed=1)) != first


def steered(kind: str, token: int) -> Any:
    """A model whose likeliest next token is always `token`: all blocks add nothing to a constant embedding."""
    lm = build(kind)
    with torch.no_grad():
        for block in anatomy(lm).blocks:
            for weight in block.parameters():
                if weight.ndim > 1:
                    weight.zero_()
        lm.get_input_embeddings().weight.fill_(1.0)
        head = lm.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
        head.weight[token] = 1.0
    return lm


@pytest.mark.parametrize(
    ("text", "stops", "stop", "count"),
    [
        ("\n", ("newline",), "newline", 1),
        ("\n", ("paragraph",), "paragraph", 2),
        ("\n", (), "max_tokens", 5),
        (".", ("newline", "period"), "period", 1),
        (".", ("newline",), "max_tokens", 5),
        ("</s>", ("newline",), "eos", 0),
    ],
)
def test_a_text_ends_where_it_stops_naturally(text: str, stops: Any, stop: str, count: int) -> None:
    tok = tokenizer()
    (token,) = tok(text, add_special_tokens=False)["input_ids"]
    (made,) = generate(steered("llama", token), tok, ["Bay is"], Decoding(tokens=5, stops=stops))
    assert (made.stop, made.tokens) == (stop, count)
    assert made.text == ("" if stop != "max_tokens" else text * 5)


def test_a_prompt_is_made_text_once_however_long_its_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    (token,) = tok(".", add_special_tokens=False)["input_ids"]
    decoded: list[list[int]] = []
    plain = tok.decode

    def counted(ids: Any, **options: Any) -> Any:
        decoded.append(list(ids))
        return plain(ids, **options)

    monkeypatch.setattr(tok, "decode", counted)
    (made,) = generate(steered("llama", token), tok, ["Bay is"], Decoding(tokens=5, stops=("newline",)))
    assert made.text == "....."
    assert decoded.count(encode(tok, "Bay is")) == 1


def test_the_model_s_own_end_tokens_end_a_text() -> None:
    lm, tok = steered("llama", 77), tokenizer()
    assert generate(lm, tok, ["Bay"], Decoding(tokens=3))[0].stop == "max_tokens"
    lm.generation_config.eos_token_id = [1, 77]
    assert generate(lm, tok, ["Bay"], Decoding(tokens=3))[0].stop == "eos"
    assert generate(lm, tok, ["Bay"], Decoding(tokens=3, eos=False))[0].tokens == 3


def test_a_prompt_that_fills_its_budget_is_returned_as_it_is() -> None:
    (made,) = generate(model("llama"), tokenizer(), ["They say that the Bridge"], Decoding(tokens=2, count_prompt=True))
    assert (made.text, made.whole, made.tokens) == ("", "They say that the Bridge", 0)


def test_a_prompt_too_long_to_continue_is_refused() -> None:
    with pytest.raises(DataError, match=r"the prompt 'The' with its continuation has \d+ tokens; the limit is 128"):
        generate(model("llama"), tokenizer(), ["The"], Decoding(tokens=128))


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `edited` checkpoints that differ by the saved edit `edit`, and `data.json` with two records."""
    root = tmp_path_factory.mktemp("evaluate")
    lm = build("llama")
    delta = WeightDelta(name=anatomy(lm).weight_name(1), full=0.3 * torch.ones_like(anatomy(lm).rewrite(1).weight))
    EditResult(method="ROME", requests=(FULL,), deltas=(delta,), traces=({},)).save(root / "edit")
    for name, deltas in (("base", []), ("edited", [delta])):
        with applied(lm, deltas):
            lm.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "data.json").write_text(json.dumps([FULL.to_json(), BARE.to_json()]), encoding="utf-8")
    return root


@pytest.fixture
def call(script: Any, monkeypatch: pytest.MonkeyPatch, files: Path) -> Any:
    """call(*args) -> Ran of the command, in the folder of `files`."""
    monkeypatch.chdir(files)
    return lambda *args: script(command, "--device", "cpu", *args)


def test_a_saved_edit_is_measured_before_and_after(call: Any) -> None:
    record = call("--model", "base", "--edit", "edit", "--data", "data.json", "--metrics", "easyedit,S", "--json").json
    lm, tok = build("llama"), tokenizer()
    names = ["easyedit", "S"]
    before = evaluate(lm, tok, [FULL, BARE], names)
    with applied(lm, EditResult.load("edit").deltas):
        after = evaluate(lm, tok, [FULL, BARE], names, before=before)
    assert plain_rows(after) == record["after"]
    assert record["before"]["rows"][0]["locality_acc"]["value"] is None
    assert record["after"]["rows"][0]["locality_acc"]["value"] is not None
    assert [r["case_id"] for r in record["requests"]] == ["full", "bare"]


def test_an_edited_checkpoint_is_compared_with_its_base(call: Any, tmp_path: Path) -> None:
    wanted = call("--model", "base", "--edit", "edit", "--json").json
    given = ("--model", "edited", "--base-model", "base", "--data", "data.json", "--limit", "1")
    found = call(*given, "--json", "--output", tmp_path / "x.json").json
    assert found == json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert len(found["requests"]) == 1
    for key in ("before", "after"):
        assert found[key]["summary"]["locality_acc"] == wanted[key]["summary"]["locality_acc"]
    alone = call("--model", "edited", "--data", "data.json", "--json").json
    assert alone["before"] is None
    assert alone["after"]["rows"][0]["locality_acc"]["reason"].startswith("needs the outputs of the unedited model")


def test_the_table_says_what_is_missing(call: Any) -> None:
    ran = call("--model", "base", "--edit", "edit", "--data", "data.json", "--metrics", "counterfact")
    lines = {line.split()[0]: line for line in ran.out.splitlines()[2:]}
    assert lines.keys() == {m.name for m in GROUPS["counterfact"]}
    assert lines["RS"].endswith("1   1 without: the record has no generation_prompts")


def test_bad_records_are_left_out_where_that_is_asked_for(call: Any, tmp_path: Path) -> None:
    there = {"src": "Where is Bay?", "alt": "Italy", "subject": "Bay"}
    (tmp_path / "zsre.json").write_text(json.dumps([there, {**there, "subject": "Ohio"}, {**there, "alt": ""}]))
    refused = call("--model", "base", "--data", tmp_path / "zsre.json")
    assert (refused.code, "--skip-bad leaves such records out" in refused.err) == (2, True)
    ran = call("--model", "base", "--data", tmp_path / "zsre.json", "--skip-bad", "--json")
    assert len(ran.json["requests"]) == 2  # a subject that is not in the prompt is not looked up


def test_the_list_names_every_metric(call: Any) -> None:
    listed = call("--list").out
    assert [name for name in METRICS if f"  {name}: " not in listed] == []


def test_an_edit_of_another_model_is_refused(call: Any, files: Path) -> None:
    build("gpt2").save_pretrained(files / "gpt2")
    tokenizer().save_pretrained(files / "gpt2")
    ran = call("--model", "gpt2", "--edit", "edit")
    assert (ran.code, ran.out) == (2, "")
    assert "which GPT2LMHeadModel does not have; it belongs to another model" in ran.err


# The reference's numbers


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_s_greedy_texts(name: str) -> None:
    """Its length counts the prompt and a BOS; with n_gen_2 each text comes twice, being the likeliest."""
    (lm, tok), wanted = pair(name), read(f"eval_{name}.json")
    prompts = read("inputs.json")["generate_prompts"]
    for tokens in (5, 10):
        made = generate(lm, tok, prompts, Decoding(tokens=tokens, count_prompt=True, eos=False))
        assert [m.whole for m in made] == wanted["generate_greedy"][f"max_out_len_{tokens}"]
    made = generate(lm, tok, prompts[:2], Decoding(tokens=6, count_prompt=True, eos=False))
    assert [m.whole for m in made for _ in range(2)] == wanted["generate_greedy"]["n_gen_2_max_out_len_6"]
