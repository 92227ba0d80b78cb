"""Edits that write nothing: facts before questions. What is asked, whose fact, what it costs; and the seam under it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build, same, states, tokenizer
from script_runs import call, save_tiny
from test_seam import FACTS

from easyeditor import BaseEditor, EditRequest, EditResult, load_hparams
from easyeditor.base.errors import ConfigError, DataError
from easyeditor.commands import evaluate as evaluate_command
from easyeditor.commands import export as export_command
from easyeditor.commands import mass_edit, ppl, single_case_edit
from easyeditor.commands import report as report_command
from easyeditor.lm.generate import Decoding, Generated, generate
from easyeditor.lm.tokens import encode
from easyeditor.methods.in_context import scr
from easyeditor.methods.in_context.retriever import retriever

NEAR = {"prompt": ["Lima lies in", "Oslo lies in"], "ground_truth": ["Peru", "Norway"]}
RICH = [
    EditRequest.make(
        "{} lies in",
        subject=subject,
        target_new=target,
        ground_truth="Spain",
        rephrase_prompts=[f"One finds {subject} in"],
        locality={"neighborhood": NEAR},  # the same prompts for both
        case_id=n,
    )
    for n, (subject, target) in enumerate([("Bay", "Italy"), ("Berlin", "Peru")])
]


def editor(name: str = "ICE", kind: str = "llama", metrics: tuple[str, ...] = (), **more: Any) -> BaseEditor:
    model = build(kind)
    values = {"alg_name": name, "device": "cpu", "ppl_sentence_num": 0, **more}
    return BaseEditor(load_hparams({**values, "model_name": (model, tokenizer())}), metrics=metrics)


def told(fact: EditRequest, question: str) -> str:
    """EasyEdit's words, written anew."""
    return f"New Fact: {fact.prompt} {fact.target_new}\nPrompt: {question}"


# What is asked


def test_the_oracle_puts_a_requests_own_fact_before_everything_asked_for_it() -> None:
    made = editor()
    both = made.compute(RICH)
    assert (both.deltas, both.facts) == ((), ("Bay lies in Italy", "Berlin lies in Peru"))
    prompts = ["Lima lies in", "Bay lies in"]
    bare = made.measure(RICH, [None] * 2)
    with made.applied(both):
        found = made.measure(RICH, [None] * 2)
        assert made.asked("Oslo?") == told(RICH[1], "Oslo?")  # typed by somebody: the latest fact
    scored = found.answers.scored
    for n, request in enumerate(RICH):
        plain = made.measure(
            [EditRequest.make(told(request, p), subject=None, target_new="Peru") for p in prompts], [None] * 2
        )
        under = found.behind.answers(n, found.answers, found.settings[n])
        for prompt in prompts[:1]:  # a prompt of both requests, each time behind another fact
            own = plain.answers.scored[told(request, prompt), "Peru"]
            assert under.scored[prompt, "Peru"] == scored[told(request, prompt), "Peru"]
            assert own.mean_log_probability == pytest.approx(
                under.scored[prompt, "Peru"].mean_log_probability, rel=1e-5
            )
        assert found.side(n).rewrite != bare.side(n).outputs
    assert [row["recall_hit"].value for row in found.rows] == [1, 1]
    assert [row["recall_none"].value for row in found.rows] == [0, 0]  # no neighbour is spared by this oracle
    tokens = [
        len(encode(made.tok, told(r, p))) - len(encode(made.tok, p))
        for r in RICH[:1]
        for p in (r.prompt, *r.rephrase_prompts, *NEAR["prompt"])
    ]
    assert found.rows[0]["recall_tokens"].value == pytest.approx(sum(tokens) / len(tokens))
    assert bare.rows[0]["recall_hit"].value is None


def test_a_fact_said_again_counts_as_said_last_and_one_that_is_not_there_is_not_asked_behind() -> None:
    made = editor()
    made.commit(made.compute(RICH[0]))
    made.commit(made.compute(RICH[1]))
    made.commit(made.compute(EditRequest.make("{} lies in", subject="Bay", target_new="Chad")))
    recall = made.method.recall
    assert recall is not None
    asked = recall.asked([("Bay?", RICH[0]), ("Bay?", RICH[1]), ("Bay?", FACTS[3])])
    assert [one.prompt for one in asked] == [
        "New Fact: Bay lies in Chad\nPrompt: Bay?",
        "New Fact: Berlin lies in Peru\nPrompt: Bay?",
        "Bay?",
    ]
    assert (asked[2].fact, asked[2].before) == (None, 0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ICE", "SCR"])
def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(
    side: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of another request, with another fact or none, of another length; the tokenizer's own padding side."""
    monkeypatch.setattr(scr, "named", lambda reply, facts: [*facts, None][len(reply) % (len(facts) + 1)])
    made = editor(name, metrics=("generation", "GE"))
    made.tok.padding_side = side
    strange = EditRequest.make("{}, far away in the south, is a town of", subject="Lugo", target_new="Mali", case_id=9)
    made.commit(made.compute(RICH))
    together = made.measure([*RICH, strange], [None] * 3)
    for n, request in enumerate([*RICH, strange]):
        alone = made.measure([request], [None])
        assert {k: v.value for k, v in together.rows[n].items()} == {k: v.value for k, v in alone.rows[0].items()}
        one, other = together.side(n), alone.side(0)
        assert (one.rewrite, one.rephrase, one.outputs) == (other.rewrite, other.rephrase, other.outputs)
        likely = [side.probabilities["target_new"] for side in (one, other)]  # type: ignore[index]
        assert likely[0] == pytest.approx(likely[1], rel=1e-5)


def test_a_text_is_written_behind_the_fact_and_shown_without_it() -> None:
    """With the cache, and as long as the bare prompt's where a length counts the prompt (GE)."""
    made = editor(metrics=("generation", "GE"))
    made.commit(made.compute(RICH[0]))
    row = made.measure(RICH[:1], [None]).rows[0]
    prompt = RICH[0].prompt
    (text,) = generate(made.model, made.tok, [told(RICH[0], prompt)], Decoding(tokens=50, stops=("newline",)))
    assert row["gen_rewrite_em"].details["generated"][0]["text"] == text.text
    (whole,) = row["GE"].details["texts"]
    assert whole.startswith(prompt)
    longer = len(encode(made.tok, told(RICH[0], prompt))) - len(encode(made.tok, prompt))
    drawn = Decoding(tokens=100 + longer, count_prompt=True, top_k=5, eos=False)
    (own,) = generate(made.model, made.tok, [told(RICH[0], prompt)], drawn)
    assert whole == prompt + own.text
    assert own.tokens + len(encode(made.tok, prompt)) == 100


# Demonstrations, and what is near


def shown(place: Path) -> str:
    """Three facts to learn from, one of them of a subject that is edited."""
    records = [
        {
            "subject": subject,
            "prompt": f"{subject} is in",
            "target_new": "Mali",
            "rephrase_prompt": f"One sees {subject} in",
        }
        | {"locality": {"near": {"prompt": prompt, "ground_truth": "Peru"}}}
        for subject, prompt in [("Lugo", "Lima lies in"), ("Bay", "Nice lies in"), ("Kiel", "Graz lies in")]
    ]
    (place / "shown.json").write_text(json.dumps(records), encoding="utf-8")
    return str(place / "shown.json")


def test_demonstrations_copy_update_and_retain_and_give_nothing_away(tmp_path: Path) -> None:
    made = editor("IKE", k=16, demonstrations=shown(tmp_path))
    made.commit(made.compute(RICH))
    recall = made.method.recall
    assert recall is not None
    bay, near, strange = recall.asked([("Bay lies in", RICH[0]), ("Lima lies in", RICH[0]), ("Bay?", FACTS[3])])
    head, tail = bay.prompt.rsplit("\n\n", 1)
    assert tail == told(RICH[0], "Bay lies in")
    lugo, kiel = (
        [f"New Fact: {s} is in Mali\nPrompt: {q}" for q in qs]
        for s, qs in (
            ("Lugo", ("Lugo is in Mali", "One sees Lugo in Mali", "Lima lies in Peru")),
            ("Kiel", ("Kiel is in Mali", "One sees Kiel in Mali", "Graz lies in Peru")),
        )
    )
    assert sorted(head.split("\n\n")) == sorted([*lugo, *kiel])  # none of Bay
    assert "Lima lies in Peru" not in near.prompt  # the answer to what is asked
    assert near.prompt.count("\n\n") == 5
    assert (strange.prompt, strange.fact) == ("Bay?", None)
    one = editor("IKE", k=1, demonstrations=shown(tmp_path))
    one.commit(one.compute(RICH))
    assert one.asked("Bay?").startswith(head.split("\n\n")[0] + "\n\nNew Fact: ")  # the nearest stands first


def test_what_is_near_is_as_computed_plainly() -> None:
    """Cosine of mean last hidden states less the mean over the texts, one text at a time; BM25 by its formula."""
    made, texts, asked = editor(), ["Bay lies in Italy", "Oslo is a town", "The sea", "Italy"], ["Bay?", "A town"]

    def mean(text: str) -> torch.Tensor:
        ids = torch.tensor([encode(made.tok, text)])
        with torch.no_grad():
            return made.model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(0)

    rows = torch.stack([mean(text) for text in texts])
    near = [torch.cosine_similarity(mean(q) - rows.mean(0), rows - rows.mean(0)) for q in asked]
    find = retriever("hidden", made.model, made.tok, made.method.budget)
    assert find.ranked(texts, asked) == [row.argsort(descending=True).tolist() for row in near]
    assert find.ranked(texts, asked[1:]) == find.ranked(texts, asked)[1:]
    words = [text.lower().split() for text in ("bay lies in italy", "oslo is a town", "the sea", "italy")]
    average = sum(map(len, words)) / 4

    def bm25(question: list[str], text: list[str]) -> float:  # Lucene's, k1 1.5, b 0.75
        score = 0.0
        for word in question:
            count, has = text.count(word), sum(word in other for other in words)
            weight = math.log(1 + (4 - has + 0.5) / (has + 0.5))
            score += weight * count / (count + 1.5 * (0.25 + 0.75 * len(text) / average))
        return score

    (order,) = retriever("bm25", made.model, made.tok, made.method.budget).ranked(texts, ["Italy: a bay?"])
    scores = [bm25(["italy", "a", "bay"], text) for text in words]
    assert order == sorted(range(4), key=lambda n: -scores[n])


def listed(facts: list[str], question: str) -> str:
    """What the model is asked first, written anew."""
    which = "Which fact answers the question? If none does, write: no relevant fact."
    return "\n".join(["Facts:", *(f"- {fact}" for fact in facts), which, f"Question: {question}", "Fact:"])


def test_the_model_chooses_among_the_nearest_facts_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, hits and tokens as counted by hand from the replies; a request's question may get another's fact."""
    facts = {r.subject: f"{r.prompt} {r.target_new}" for r in [*RICH, FACTS[3]]}
    bay, berlin, other = facts.values()
    replies = {
        "Bay lies in": bay,
        "One finds Bay in": f" {berlin}.",
        "Lima lies in": "No relevant fact",
        "Bay?": "Rome",
    }
    lists: dict[str, str] = {}

    def reply(_model: Any, _tok: Any, prompts: list[str], decoding: Decoding, **_: Any) -> list[Generated]:
        lists.update({prompt.split("Question: ")[1].split("\n")[0]: prompt for prompt in prompts})
        assert decoding.tokens >= max(len(encode(made.tok, fact)) for fact in facts.values())
        said = [replies.get(prompt.split("Question: ")[1].split("\n")[0], other) for prompt in prompts]
        return [Generated(text=text, whole=text, stop="newline", tokens=7) for text in said]

    monkeypatch.setattr(scr, "generate", reply)
    made = editor("SCR", k=2, retriever="bm25")
    made.commit(made.compute([*RICH, FACTS[3]]))
    row = made.measure(RICH[:1], [None]).rows[0]
    assert lists["Bay lies in"] == listed([bay, berlin], "Bay lies in")  # both words, one word, no word
    found = {name: row[f"recall_{name}"].value for name in ("hit", "at_k", "none", "tokens")}
    assert {name: found[name] for name in ("hit", "at_k", "none")} == {"hit": 0.5, "at_k": 1, "none": 0.5}
    behind = {
        "Bay lies in": RICH[0],
        "One finds Bay in": RICH[1],
        "Oslo lies in": FACTS[3],
    }  # a neighbour's, and a fact
    asked = {question: told(fact, question) for question, fact in behind.items()}
    each = [
        len(encode(made.tok, asked.get(q, q))) - len(encode(made.tok, q)) + len(encode(made.tok, lists[q])) + 7
        for q in (*asked, "Lima lies in")
    ]
    assert found["tokens"] == pytest.approx(sum(each) / 4)
    assert made.asked("Bay?") == "Bay?"
    assert made.asked("Bay lies in") == asked["Bay lies in"]  # typed by somebody: looked up as well


def test_what_the_model_is_asked_first_is_what_it_replies_to_alone() -> None:
    """The reply of the tiny model to the list, by its own generation; nothing in it is a fact."""
    made = editor("SCR", k=1)
    made.commit(made.compute(RICH[:1]))
    recall = made.method.recall
    assert recall is not None
    prompt = listed(["Bay lies in Italy"], "Bay?")
    limit = 8 + len(encode(made.tok, "Bay lies in Italy"))
    (text,) = generate(made.model, made.tok, [prompt], Decoding(tokens=limit, stops=("newline",)))
    (asked,) = recall.asked([("Bay?", RICH[1])])
    assert (asked.prompt, asked.fact, asked.among) == ("Bay?", None, tuple(RICH[:1]))
    assert asked.beside == len(encode(made.tok, prompt)) + text.tokens


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        (" bay LIES in Italy, so it is", 0),
        ("Bay lies in Italy and Chad", 1),
        ("- Bay lies in Italy (no relevant information)", None),
        ("It is false that Rome is old", 2),
        ("False", None),
        ("Bay lies in Spain", None),
        ("", None),
    ],
)
def test_a_reply_names_the_longest_fact_that_it_repeats(reply: str, place: int | None) -> None:
    texts = ["Bay lies in Italy", "Bay lies in Italy and Chad", "It is false that Rome is old"]
    facts = [(FACTS[0], text) for text in texts]
    assert scr.named(reply, facts) == (None if place is None else facts[place])


def test_a_list_has_as_many_facts_as_fit_the_model() -> None:
    """Of 30 facts those nearest to the question, up to the model's positions, the reply among them."""
    made = editor("SCR", k=1000, retriever="bm25")
    many = [EditRequest.make("{} lies in", subject=f"Town {n}", target_new="Italy") for n in range(30)]
    made.commit(made.compute(many))
    recall = made.method.recall
    assert recall is not None
    (asked,) = recall.asked([("Town 7 lies in", None)])
    texts = [f"{r.prompt} {r.target_new}" for r in [many[7], *(r for r in many if r is not many[7])]]
    limit = 8 + max(len(encode(made.tok, text)) for text in texts)
    sizes = [len(encode(made.tok, listed(texts[:n], "Town 7 lies in"))) + limit for n in range(1, 31)]
    most = sum(size <= made.model.config.max_position_embeddings for size in sizes)
    assert 1 < most < 30
    assert asked.among == (many[7], *(r for r in many if r is not many[7]))[:most]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"k": 0}, "k is 0; allowed: 1 or more"),
        ({"demonstration_facts": 0}, "demonstration_facts is 0; allowed: 1 or more"),
        ({"retriever": "faiss"}, "retriever is 'faiss'.*allowed: one of 'hidden', 'bm25'"),
        ({"demonstrations": "nowhere.json"}, "nowhere.json"),
        ({"demonstrations": ""}, "demonstrations is ''; allowed: a file of records, or null"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        editor("IKE", **values)
    assert "\n" not in str(caught.value)


def test_bm25_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"pip install 'edit-collapse\[retrieve\]'; or retriever: hidden"):
        editor("IKE", retriever="bm25")


# The seam


def test_a_memory_is_applied_committed_reverted_and_out_of_force_on_the_original(tmp_path: Path) -> None:
    made = editor()
    before, first, second = states(made.model), made.compute(RICH[0]), made.compute(RICH[1])
    assert made.method.recall is None
    with suppress(KeyboardInterrupt), made.applied(first):
        assert made.asked("x") == told(RICH[0], "x")
        raise KeyboardInterrupt
    assert made.asked("x") == "x"
    made.commit(first)
    made.commit(EditResult.load(second.save(tmp_path / "second")))
    with made.original():
        assert made.asked("x") == "x"
    assert made.asked("x") == told(RICH[1], "x")
    made.revert(second)
    assert made.asked("x") == told(RICH[0], "x")
    with pytest.raises(DataError, match="not committed in this editor"):
        made.revert(second)
    assert made.asked("x") == told(RICH[0], "x")
    made.revert_all()
    assert made.method.recall is None
    assert not made.edited
    assert same(made.model, before)


def test_an_editor_of_weights_refuses_a_memory_in_one_line() -> None:
    memory = editor().compute(RICH[0])
    other = editor("FT", layers=[1], num_steps=1, lr=1e-3)
    for act in (other.commit, lambda edit: other.applied(edit).__enter__()):
        with pytest.raises(
            ConfigError, match="this edit of ICE is a memory of facts, which FT does not look up"
        ) as caught:
            act(memory)
        assert "\n" not in str(caught.value)
    assert not other.edited


def test_perplexity_is_measured_once_where_no_edit_can_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = editor(ppl_sentence_num=2)
    first = made.perplexity()
    with made.applied(made.compute(RICH[0])):
        assert made.perplexity() is first
    with torch.no_grad():
        next(iter(made.model.parameters())).mul_(1.5)  # by somebody else
    assert made.perplexity() != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": []}, "it changes no weight .no deltas., and has no facts"),
        ({"facts": ["a", "b"]}, "facts are not a text for each request"),
        ({"facts": [3]}, "facts are not a text for each request"),
        ({"facts": [" "]}, "facts are not a text for each request"),
        ({"facts": "a"}, "facts are not a text for each request"),
    ],
)
def test_a_damaged_memory_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    place = editor().compute(RICH[0]).save(tmp_path / "edit")
    (place / "edit.json").write_text(json.dumps({**json.loads((place / "edit.json").read_text()), **change}))
    with pytest.raises(DataError, match=said):
        EditResult.load(place)


# Commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, a YAML of ICE and two records."""
    monkeypatch.chdir(tmp_path)
    values = {
        "alg_name": "ICE",
        "model_name": str(save_tiny(tmp_path / "llama")),
        "device": "cpu",
        "ppl_sentence_num": 2,
    }
    Path("ice.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    Path("two.json").write_text(json.dumps([request.to_json() for request in RICH]), encoding="utf-8")
    return tmp_path


def test_hits_and_tokens_are_in_the_record_the_run_and_the_report(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--hparams", "ice.yaml", "--data", "two.json", "--output", "run", "--mode", "sequential", "--eval-every", 1]
    ran = call(mass_edit, run, monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert "recall_hit" in ran.out
    assert "recall_tokens" in ran.out
    lines = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "evaluation"]
    assert [row["metrics"]["recall_hit"] for row in kept[-1]["retention"]] == [1, 1]
    shutil.copytree("run", "again")
    cut = Path("again/results.jsonl").read_bytes().splitlines(keepends=True)
    Path("again/results.jsonl").write_bytes(b"".join(cut[:2]))
    assert call(mass_edit, ["--resume", "again"], monkeypatch, capsys).code == 0
    assert EditResult.load("again/deltas/000002").sha256() == EditResult.load("run/deltas/000002").sha256()
    ran = call(report_command, ["run", "--output", "page"], monkeypatch, capsys)
    assert ran.code == 0, ran.err


def test_what_has_nothing_to_do_with_a_memory_says_so_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--hparams", "ice.yaml", "--prompt", "Bay lies in", "--target-new", "Italy"]
    ran = call(single_case_edit, [*one, "--save-edit", "edit"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    ran = call(evaluate_command, ["--model", "llama", "--device", "cpu", "--edit", "edit"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert "recall_hit" in ran.out
    nothing = "it changes no weight, so there is nothing to "
    for command, flags, said in (
        (export_command, ["edit", "--to", "adapter", "--output", "out"], nothing + "export"),
        (ppl, ["--model", "llama", "--device", "cpu", "--edit", "edit"], nothing + "measure"),
        (single_case_edit, [*one, "--save-model", "out"], nothing + "export"),
        (single_case_edit, [*one, "--save-adapter", "out"], nothing + "export"),
    ):
        ran = call(command, flags, monkeypatch, capsys)
        assert ran.code == 2, ran.out
        assert said in ran.err
        assert ran.err.strip().splitlines()[-1].startswith("error: ")
    assert not Path("out").exists()
