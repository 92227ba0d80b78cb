"""Prompts and targets: the space between them, prompts that end in a blank, lookup tokens of slow tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTEXTS, build, tokenizer
from test_every_method import settings, supplies
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from easyeditor import BaseEditor, EditRequest, load_hparams
from easyeditor.dataset.reader import read_dataset
from easyeditor.evaluate.examined import Examined
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.registry import evaluate
from easyeditor.export.harness.tasks import documents
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.joining import joined, spaced
from easyeditor.lm.prompting import Prompting
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import encode, lookup_index, target_ids
from easyeditor.methods.locate.rows import target_rows
from easyeditor.methods.table import METHODS
from easyeditor.values.record import EditRecord

FACTS = Path(__file__).resolve().parents[1] / "data" / "facts.json"
ASIDE = {"ground_truth": "France", "rephrase_prompts": ["One finds Bay in "]}
BLANK = EditRequest.make("Bay lies in ", subject="Bay", target_new="Rome", **ASIDE)
TOGETHER = """
df.|to_csv( "|Paris $|5 US$|5 l'|eau l’|eau qu'|elle O'|Brien is|,~of~course Rome|. Rome|) it|'s is|n't (|x f(|x foo[|0
said~"|Yes print("|x sagt~„|Ja «|oui ``|so well-|known 1990–|1995 Rome—|then and/|or https://|a C:\\|x x=|5 a@|b
no.~#|1 std::|x ¿|Dónde Pi~is~3.|14 50|% 20|°C 中国的首都是|纽约 首都是|Paris Japan's~is|東京 首都：|Paris カナ|a
เมือง|ไทย ນະຄອນ|ຫຼວງ រាជ|ធានី မြို့|တော်
"""
APART = """
is|Rome U.S.|Congress said.|Then e.g.|apples Inc.|is dogs'|owner Jesus'|life 'hi'|and
said~"hi"|and „Ja“|sagt «~oui~»|dit `x`|is rock~'n'|roll A:|5 C#|and 5€|now 5~€|now word~—|and a~/|b x~=|5
is|-v is|.5 is|%d is|/usr is|"red" is|'red'
is|(5) (東京)|is 한국의|서울 -|a is|$5
"""


@pytest.mark.parametrize(("cases", "space"), [(TOGETHER, ""), (APART, " ")], ids=["none", "one"])
def test_a_space_stands_where_running_text_has_one(cases: str, space: str) -> None:
    for prompt, target in (case.replace("~", " ").split("|") for case in cases.split()):
        assert joined(prompt, target, "auto") == (prompt, space + target)
        assert joined(f"A (long) 'text'. {prompt}", target, "auto")[1] == space + target, "what is before counts not"
        assert joined(prompt, target, "always") == (prompt, " " + target)
        assert joined(prompt, target, "never") == (prompt, target)


@pytest.mark.parametrize(
    ("prompt", "target", "space", "whole"),
    [
        ("A:\n", "Rome", "auto", ("A:\n", "Rome")),
        ("is ", "Rome", "auto", ("is", " Rome")),
        ("is ", " Rome", "auto", ("is", " Rome")),
        ("is  ", "Rome", "auto", ("is ", " Rome")),
        ("is ", "Rome", "never", ("is", " Rome")),
        ("is ", "Rome", "always", ("is ", " Rome")),
        ("is", "\nRome", "always", ("is", "\nRome")),
        ("is ", ", too", "auto", ("is", " , too")),
    ],
)
def test_a_blank_at_the_end_of_a_prompt_is_the_targets(
    prompt: str, target: str, space: Any, whole: tuple[str, str]
) -> None:
    assert joined(prompt, target, space) == whole
    tok, prompting = tokenizer(bos=True), Prompting(space=space)
    assert encode(tok, prompt, prompting) == encode(tok, whole[0])
    assert tok.decode(target_ids(tok, prompt, target, prompting)) == whole[1]


def test_facts_have_the_space_they_always_had() -> None:
    for request in read_dataset(str(FACTS)).requests:
        pairs = [(prompt, request.target_new) for prompt in (request.prompt, *request.rephrase_prompts)]
        for probe in (*request.locality.values(), *request.portability.values()):
            pairs += zip(probe.prompts, probe.answers, strict=True)
        for prompt, answer in pairs:
            assert joined(prompt, answer, "auto") == (prompt, spaced(answer))


@pytest.mark.parametrize("token", ["subject_last", "subject_first", "subject_first_after_last", "last"])
@pytest.mark.parametrize("prompt", ["Bay lies in ", "It is Bay ", "서울 "])
def test_lookup_tokens_of_a_prompt_that_ends_in_a_blank(prompt: str, token: str) -> None:
    tok, subject = tokenizer(bos=True), "Bay" if "Bay" in prompt else "서울"
    rows = [
        target_rows(tok, EditRequest.make(text, subject=subject, target_new="Rome"), CONTEXTS, token)
        for text in (prompt, prompt.rstrip())
    ]
    assert rows[0] == rows[1]


def made(name: str, place: Path, **changes: Any) -> BaseEditor:
    model = build("llama", max_position_embeddings=512)
    model.config.name_or_path = "llama"
    values = {**settings(name, "llama", supplies("llama", place)), "ppl_sentence_num": 0, **changes}
    return BaseEditor.from_hparams(load_hparams({**values, "model_name": (model, tokenizer())}))


def losses(edit: Examined) -> list[float]:
    return [layer.loss_first for layer in edit.result.traces[0].values()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_metric_joins_by_one_rule(name: str, place: Path) -> None:
    """A last blank changes nothing; `always` and `never` reach the edit and what is measured of it."""
    bare = dataclasses.replace(BLANK, prompt="Bay lies in", rephrase_prompts=("One finds Bay in",))
    code = EditRequest.make("They say df.", subject="They", target_new="to_csv(")
    edits = [made(name, place).examine(request) for request in (BLANK, bare, code)]
    assert edits[0].result.sha256() == edits[1].result.sha256()
    records = [edit.record.to_json(whole=False) for edit in edits]
    for record in records[:2]:
        assert "target_space" not in record
        assert (record["probabilities"], record["post"]) == (records[1]["probabilities"], records[1]["post"])
    assert records[2]["target_space"] == ""
    assert EditRecord.from_json(edits[2].record.to_json()).target_space == ""
    always = made(name, place, target_space="always").examine(code)
    assert "target_space" not in always.record.to_json(whole=False)
    assert always.record.probabilities != edits[2].record.probabilities
    assert losses(always) != losses(edits[2]) or always.result.facts != edits[2].result.facts
    never = made(name, place, target_space="never")
    found = never.measure([bare], [None]).answers.scored["Bay lies in", "Rome"]
    assert found.target == tuple(target_ids(never.tok, "Bay lies in", "Rome", Prompting(space="never")))


def test_metrics_texts_and_tasks_join_by_one_rule() -> None:
    model, tok = build("llama", max_position_embeddings=512), tokenizer()
    bare = dataclasses.replace(BLANK, prompt="Bay lies in", rephrase_prompts=("One finds Bay in",))
    found = [
        evaluate(model, tok, [r], ["EM", "PM", "wild_rewrite", "zsre"], settings=Settings()) for r in (BLANK, bare)
    ]
    assert found[0].summary() == found[1].summary()
    (one,), (other,) = (generate(model, tok, [r.prompt], Decoding(tokens=4, eos=False)) for r in (BLANK, bare))
    assert one == other
    assert documents([BLANK], tok) == documents([bare], tok)
    code = documents([EditRequest.make("df.", subject="df", target_new="to_csv(")], tok)
    assert [(doc["query"], doc["choices"]) for doc in code] == [("df.", ["to_csv("])]
    assert line(tok, "df.", "to_csv(").labels == tuple(tok("to_csv(")["input_ids"])


class Slow(PreTrainedTokenizerFast):
    """The tiny tokenizer without offsets."""

    is_fast = False  # type: ignore[assignment]


@pytest.mark.parametrize("token", ["subject_first", "subject_last", "subject_first_after_last"])
def test_a_slow_tokenizer_finds_the_tokens_a_fast_one_finds(token: str) -> None:
    fast = tokenizer(bos=True)
    slow = Slow(tokenizer_object=fast.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    texts = [
        ("", "東京", " is in"),
        ("In ", "東京", ""),
        ("中国的", "首都", "是"),
        ("The 😀", "Bay", " a"),
        ("é", "é😀", "é "),
    ]
    for parts in (*texts, ("They say ", "the Bridge", " is"), ("A", " Bay ", "is")):
        assert lookup_index(slow, *parts, token) == lookup_index(fast, *parts, token), parts
    first = {"subject_first": 2, "subject_last": 7, "subject_first_after_last": 8}[token]
    assert lookup_index(ByT5Tokenizer(), "a ", "東京", "!", token) == first
