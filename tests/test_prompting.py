"""Prompts in a chat template and targets that end with an EOS: one place for every method; long targets too."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXTS, build, rome_hparams, same, states, tokenizer
from script_runs import call, save_tiny, write_yaml
from test_every_method import settings, supplies
from transformers import PreTrainedTokenizerFast

from easyeditor import BaseEditor, EditRequest, load_hparams
from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.commands import evaluate as command
from easyeditor.commands import single_case_edit
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.registry import evaluate
from easyeditor.evaluate.scoring import score
from easyeditor.experiments.tools.lab import hparams_of
from easyeditor.lm import rendering
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.prompting import PLAIN, Prompting, assistant_text, user_turn
from easyeditor.lm.scored import line
from easyeditor.lm.tokens import encode, lookup_index, target_ids
from easyeditor.methods.locate.rows import kl_row, prompt_row, target_rows
from easyeditor.methods.table import METHODS
from easyeditor.trainer.tasks import Tasks

TURNS = (
    "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
THINKS = TURNS.replace("m.content", "('think: ' if m.role == 'assistant' else '') + m.content")
TEMPLATES = {"turns": TURNS, "inst": INST, "thinks": THINKS}
BRIDGE = EditRequest.make(
    "They say that the Bridge is in",
    subject="Bridge",
    target_new="Rome",
    ground_truth="the old town",
    rephrase_prompts=["The Bridge lies in"],
    locality={"neighborhood": {"prompt": ["The sea is"], "ground_truth": ["blue"]}},
)
CHAT = Prompting(chat=True)
ENDED = Prompting(chat=True, eos=True)


def chatty(template: str | None = TURNS, **options: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template of its own."""
    raw = tokenizer().backend_tokenizer
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special)


def text_of(tok: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    return str(tok.decode(list(ids), clean_up_tokenization_spaces=False))


# Tokens


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_prompt_behind_a_context_is_one_turn_of_the_user(name: str, context: str) -> None:
    tok = chatty(TEMPLATES[name])
    row = prompt_row(tok, BRIDGE, context, "subject_last", CHAT)
    wanted = tok.apply_chat_template(
        [{"role": "user", "content": context.replace("{}", BRIDGE.prompt)}], tokenize=False, add_generation_prompt=True
    )
    assert text_of(tok, row.ids) == wanted
    before = text_of(tok, row.ids[: row.lookup])
    with_it = text_of(tok, row.ids[: row.lookup + 1])
    assert not before.endswith("Bridge")
    assert with_it.endswith("Bridge")
    assert with_it.count("Bridge") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_lookup_tokens_in_a_template(name: str) -> None:
    """Of "They", in first place: its first token, the one after its last; and the last of all."""
    tok = chatty(TEMPLATES[name])
    ids, turn = encode(tok, "They say that", CHAT), user_turn(tok, "They say that")

    def before(token: str) -> str:
        return text_of(tok, ids[: lookup_index(tok, "", "They", " say that", token, CHAT)])

    start = turn.text[: turn.offset]
    assert before("subject_first") == start
    assert before("subject_first_after_last") == start + "They"
    assert lookup_index(tok, "", "They", " say that", "last", CHAT) == len(ids) - 1


def test_white_space_that_a_template_drops_does_not_move_the_subject() -> None:
    tok = chatty(INST)
    ids = encode(tok, "  They say \n", CHAT)
    assert text_of(tok, ids) == "<s>[INST] They say [/INST]"
    place = lookup_index(tok, "  ", "They", " say \n", "subject_last", CHAT)
    assert text_of(tok, ids[: place + 1]) == "<s>[INST] They"


@pytest.mark.parametrize(
    ("name", "answer"), [("turns", "Rome"), ("inst", " Rome"), ("thinks", "Rome")], ids=["turns", "inst", "thinks"]
)
@pytest.mark.parametrize("target", ["Rome", " Rome"])
def test_a_target_is_the_beginning_of_the_assistants_turn(name: str, answer: str, target: str) -> None:
    tok = chatty(TEMPLATES[name])
    assert assistant_text(tok, BRIDGE.prompt, target) == answer
    made = line(tok, BRIDGE.prompt, target, ENDED)
    whole = text_of(tok, (*made.ids, made.labels[-1]))
    assert whole == user_turn(tok, BRIDGE.prompt).text + answer + "</s>"
    assert text_of(tok, made.labels) == answer + "</s>"
    assert len(made.labels) == len(made.scored)


@pytest.mark.parametrize("prompting", [Prompting(eos=True), ENDED])
def test_the_search_looks_for_an_eos_behind_every_context(prompting: Prompting) -> None:
    tok = chatty()
    rows, labels = target_rows(tok, BRIDGE, CONTEXTS, "subject_last", prompting)
    assert [label[-1] for label in labels] == [tok.eos_token_id] * len(CONTEXTS)
    assert [len(row.scored) for row in rows] == [len(label) for label in labels]
    without = target_rows(tok, BRIDGE, CONTEXTS, "subject_last", dataclasses.replace(prompting, eos=False))[1]
    assert [label[:-1] for label in labels] == without


def test_the_kl_row_is_a_turn_too() -> None:
    tok = chatty()
    row = kl_row(tok, BRIDGE, "subject_last", CHAT)
    assert text_of(tok, row.ids) == "<s>user\nBridge"


def test_a_text_of_the_template_itself_is_not_taken_for_the_subject() -> None:
    """The subject "user" stands in the template before it stands in the prompt."""
    tok = chatty()
    place = lookup_index(tok, "A ", "user", " of it", "subject_last", CHAT)
    assert text_of(tok, encode(tok, "A user of it", CHAT)[: place + 1]) == "<s>user\nA user"


def test_without_a_template_nothing_changes() -> None:
    tok = tokenizer(bos=True)
    assert encode(tok, BRIDGE.prompt) == encode(tok, BRIDGE.prompt, PLAIN)
    assert target_ids(tok, BRIDGE.prompt, "Rome") == target_ids(tok, BRIDGE.prompt, "Rome", PLAIN)
    assert PLAIN.checked(chatty(None)) == Prompting()


# Methods


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompting")


def editor(name: str, place: Path, tok: PreTrainedTokenizerFast, **changes: Any) -> BaseEditor:
    model = build("llama", max_position_embeddings=512)
    model.config.name_or_path = "llama"
    values = {**settings(name, "llama", supplies("llama", place)), "ppl_sentence_num": 0, **changes}
    return BaseEditor.from_hparams(load_hparams({**values, "model_name": (model, tok)}))


def eos_of(name: str) -> dict[str, Any]:
    """`target_eos: true`, with the objective of FT that has a place for it."""
    return {"target_eos": True, **({"objective_optimization": "target_new"} if name == "FT" else {})}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_edits_in_a_chat_with_an_eos(name: str, place: Path) -> None:
    made = editor(name, place, chatty(), chat_template=True, **eos_of(name))
    before = states(made.model)
    examined = made.examine(BRIDGE)
    assert same(made.model, before)
    assert any(delta.norm() > 0 for delta in examined.result.deltas) == METHODS[name].writes
    plain = editor(name, place, chatty(), **eos_of(name)).compute(BRIDGE)
    assert (examined.result.sha256() != plain.sha256()) == METHODS[name].writes
    asked = made.method.scoring
    assert asked.chat
    with made.applied(examined.result):
        (wanted,) = score(made.model, made.tok, [(made.asked(BRIDGE.prompt), "Rome")], prompting=asked)
    assert examined.record.post.rewrite == (wanted.accuracy,)


def rewritten(made: BaseEditor, request: EditRequest) -> tuple[int, ...]:
    """The ids that an editor scores a request's answer by."""
    return made.measure([request], [None]).answers.scored[request.prompt, request.target_new].target


@pytest.mark.parametrize("name", ["ROME", "MEMIT", "FT-M", "UltraEdit", "MEND"])
def test_an_eos_is_scored_where_the_edit_asks_for_one(name: str, place: Path) -> None:
    made = editor(name, place, chatty(), target_eos=True)
    scored = made.measure([BRIDGE], [None]).answers.scored
    assert {answer for _, answer in scored} >= {BRIDGE.target_new, BRIDGE.ground_truth}
    assert {s.target[-1] for s in scored.values()} == {made.tok.eos_token_id}, "the two answers are compared alike"


@pytest.mark.parametrize("name", ["LocFT-BF", "LoRA"])
def test_a_method_that_always_trains_an_eos_is_scored_as_published(name: str, place: Path) -> None:
    made = editor(name, place, chatty())
    assert made.method.prompting.eos
    assert rewritten(made, BRIDGE) == tuple(target_ids(made.tok, BRIDGE.prompt, "Rome"))


@pytest.mark.parametrize("name", ["ROME", "MEMIT", "FT-M", "LoRA", "UltraEdit", "MEND"])
@pytest.mark.parametrize("prompting", [PLAIN, ENDED], ids=["plain", "chat"])
def test_a_target_of_more_than_a_hundred_tokens_edits_and_evaluates(
    name: str, prompting: Prompting, place: Path
) -> None:
    tok = chatty()
    request = dataclasses.replace(BRIDGE, target_new="the old town by the river and the sea of stone " * 5)
    count = len(target_ids(tok, request.prompt, request.target_new, prompting))
    assert count > 100
    changes = {"v_lr": 0.05, "v_num_grad_steps": 10} if name in ("ROME", "MEMIT") else {}
    made = editor(name, place, tok, chat_template=prompting.chat, target_eos=prompting.eos, **changes)
    examined = made.examine(request)
    assert len(rewritten(made, request)) == count - (name == "LoRA" and prompting.eos)
    assert any(delta.norm() > 0 for delta in examined.result.deltas)
    trace = next(iter(examined.result.traces[0].values()))
    assert (trace.loss_last < trace.loss_first) or name == "MEND", "MEND's network is not trained"
    with made.applied(examined.result):
        found = evaluate(made.model, tok, [request], ["rewrite_acc", "generation"], settings=Settings()).summary()
    assert found["gen_rewrite_em"]["mean"] == 0


# Evaluation


def test_texts_are_written_in_the_chat_and_given_without_the_template() -> None:
    tok, model = chatty(), build("llama")
    (plain,) = generate(model, tok, ["The sea"], Decoding(tokens=4, eos=False))
    (chat,) = generate(model, tok, ["The sea"], Decoding(tokens=4, eos=False, prompting=CHAT))
    whole = torch.tensor([encode(tok, "The sea", CHAT)])
    with torch.no_grad():
        first = int(model(whole).logits[0, -1].argmax())
    assert chat.ids[0] == first
    assert chat.whole == "The sea\n" + chat.text
    assert plain.whole == "The sea" + plain.text


def test_training_mend_sees_prompts_as_editing_does() -> None:
    tok = chatty()
    tasks = Tasks(tok, [BRIDGE], seed=0, outer=2, locality=0, longest=128, prompting=ENDED)
    lines = tasks.training(0, 1, 0, 1).draws[0].pool.lines
    assert lines[0] == line(tok, BRIDGE.prompt, "Rome", ENDED)
    assert lines[-1] == line(tok, "The sea is", "blue", ENDED)


# What is refused


@pytest.mark.parametrize("name", ["ROME", "FT-M", "MEND"])
def test_a_tokenizer_without_a_template_is_refused_at_once(name: str, place: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer has no chat template; set chat_template: false"):
        editor(name, place, chatty(None), chat_template=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TURNS.replace("m.content", "m.content | upper"), "does not hold the user's text as it is"),
        ("{{ 'always the same' }}", "does not hold the user's text as it is"),
        ("{{ raise_exception('no users here') }}", "fails .TemplateError: no users here"),
        ("{% if %}", "fails .TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "fails .ZeroDivisionError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
        ("{% set x = 10 ** (10 ** 8) %}", "more than 0.5 s"),
        ("{{ 'x' * 999999999 }}", "fails .MemoryError"),
        ("{{ 'x' * 9999999 }}", "it renders 9,999,999 characters"),
        ("{{ '%999999999d' % 1 }}", "fails .MemoryError"),
        ("{{ messages[0].content | center(999999999) }}", "fails .MemoryError"),
        ("{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails .RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "fails .SecurityError"),
        ("{{ '(' * 5000 }}{{ " + "(" * 9999, "fails"),
        ("{#" + "x" * 1_000_000 + "#}", "at most 1,000,000 are read"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    with pytest.raises(ModelError, match=said) as refused:
        CHAT.checked(chatty(template))
    assert "\n" not in str(refused.value)


def test_a_template_that_asks_for_the_day_is_told_the_same_one_always() -> None:
    """Llama's, Granite's and SmolLM's do: an edit must not depend on the day it is made on."""
    tok = chatty("{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + TURNS)
    assert user_turn(tok, "Bay is in").text.startswith("Today: 26 Jul 2024\n")


@pytest.mark.parametrize("begin", [" a", "\n\n", "  {% set x = 1 %}", "{%- set x = 1 %}\n\n b"])
def test_what_a_template_begins_with_is_rendered_as_it_is_alone(begin: str) -> None:
    tok = chatty(begin + TURNS)
    turns = [{"role": "user", "content": "Bay is in"}]
    assert user_turn(tok, "Bay is in").text == tok.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


THINKING = {
    "takes it": TURNS
    + "{% if add_generation_prompt and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}",
    "open": TURNS + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}",
    "open by another name": TURNS + "{% if add_generation_prompt %}{{ '[SCRATCHPAD]' }}{% endif %}",
    "open in history too": TURNS.replace("m.content", "('<think>' if m.role == 'assistant' else '') + m.content")
    + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}",
    "answers elsewhere": TURNS.replace("m.content", "('<|final|>' if m.role == 'assistant' else '') + m.content"),
    "open unless told": TURNS + "{% if add_generation_prompt %}{{ '<think>\\n' if not quick else '' }}{% endif %}",
}


@pytest.mark.parametrize("kind", THINKING)
def test_a_target_never_stands_among_a_models_thoughts(kind: str) -> None:
    tok = chatty(THINKING[kind])
    with pytest.raises(ModelError, match=r"^chat_template: .*chat_template_kwargs.*chat_template: false") as refused:
        CHAT.checked(tok)
    assert "\n" not in str(refused.value)
    settings = Settings(prompting=PLAIN)
    found = evaluate(build("llama"), tok, [BRIDGE], ["wild_chat_rewrite"], settings=settings).summary()
    assert found["wild_chat_rewrite"]["reasons"] == [str(refused.value)]


@pytest.mark.parametrize(
    ("kind", "said"), [("takes it", {"enable_thinking": False}), ("open unless told", {"quick": True})]
)
def test_what_a_template_takes_is_said_in_chat_template_kwargs(kind: str, said: dict[str, Any], place: Path) -> None:
    tok = chatty(THINKING[kind])
    made = editor("ROME", place, tok, chat_template=True, chat_template_kwargs=said)
    wanted = tok.apply_chat_template(
        [{"role": "user", "content": BRIDGE.prompt}], tokenize=False, add_generation_prompt=True, **said
    )
    for prompting in (made.method.prompting, made.method.scoring):
        text = line(tok, BRIDGE.prompt, "Rome", prompting)
        assert text_of(tok, (*text.ids, text.labels[-1])) == wanted + "Rome"
        assert text_of(tok, prompt_row(tok, BRIDGE, "{}", "last", prompting).ids) == wanted
    ids = made.tok(wanted, add_special_tokens=False)["input_ids"]
    (wrote,) = generate(made.model, tok, [BRIDGE.prompt], Decoding(tokens=1, prompting=made.method.prompting))
    assert wrote.ids[0] == int(made.model(torch.tensor([ids])).logits[0, -1].argmax())
    with pytest.raises(ModelError, match="says how a template is used"):
        Prompting(chat=True, template_kwargs='{"tokenize": true}').checked(tok)


def test_the_command_tells_a_template_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "m")
    chatty(THINKING["takes it"]).save_pretrained(tmp_path / "m")
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}]))
    flags = ["--model", tmp_path / "m", "--data", tmp_path / "data.json", "--device", "cpu", "--json"]
    for told, code in (([], 2), (["{"], 2), (["[]"], 2), (['{"enable_thinking": false}'], 0)):
        more = [flag for text in told for flag in ("--chat-template-kwargs", text)]
        ran = call(command, [*flags, "--chat-template", *more], monkeypatch, capsys)
        assert ran.code == code, ran.err
        assert len(ran.err.splitlines()) == 1 or code == 0


@pytest.mark.parametrize("name", ["ROME", "LoRA", "MEND"])
def test_easyedits_keys_of_chats_are_read(name: str, place: Path) -> None:
    values = {**settings(name, "llama", supplies("llama", place)), "model_name": "m", "use_chat_template": True}
    made = load_hparams({**values, "enable_thinking": False, "chat_template_kwargs": {"a": 1}})
    assert (made.chat_template, made.chat_template_kwargs) == (True, {"enable_thinking": False, "a": 1})
    for other in ({"chat_template": False}, {"enable_thinking": 0, "chat_template_kwargs": {"enable_thinking": 1}}):
        with pytest.raises(ConfigError, match="the same setting; give one"):
            load_hparams({**values, **other})
    told = {**values, "enable_thinking": True, "chat_template_kwargs": {"a": 1}}
    for sets in (["use_chat_template=false", "enable_thinking=false"], ["chat_template=false", "enable_thinking=0"]):
        for made in (load_hparams(told, sets), load_hparams(told).override(sets)):
            assert (made.chat_template, made.chat_template_kwargs) == (False, {"a": 1, "enable_thinking": False})


def test_set_knows_a_methods_other_keys(place: Path) -> None:
    values = {**settings("LoRA", "llama", supplies("llama", place)), "model_name": "m", "lora_r": 4}
    assert load_hparams(values, ["lora_r=2"]).rank == load_hparams(values, ["rank=2"]).rank == 2


def test_an_eos_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="the tokenizer has no EOS token"):
        Prompting(eos=True).checked(chatty(eos_token=None))


def test_ft_on_the_last_token_has_no_place_for_an_eos() -> None:
    with pytest.raises(ConfigError, match="so say target_new"):
        load_hparams({"alg_name": "FT", "model_name": "m", "layers": [1], "num_steps": 1, "lr": 1, "target_eos": True})


def test_the_papers_experiments_take_prompts_as_they_stand(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "h.yaml", "m", chat_template=True)
    args = argparse.Namespace(hparams=str(path), set=[], values=None, device=None)
    with pytest.raises(ConfigError, match="on prompts as they are"):
        hparams_of(args)


def test_the_script_refuses_in_one_line_and_edits_with_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "m")
    hparams = write_yaml(tmp_path / "h.yaml", "m", chat_template=True, ppl_sentence_num=0)
    flags = ["--hparams", hparams, "--prompt", "Bay is in", "--subject", "Bay", "--target-new", "Italy", "--json"]
    ran = call(single_case_edit, flags, monkeypatch, capsys)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("error: chat_template: the tokenizer has no chat template")
    chatty().save_pretrained(tmp_path / "m")
    ran = call(single_case_edit, flags, monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert ran.json["requested_rewrite"]["prompt"] == "Bay is in", "the record has the prompt, not the template"


def test_searches_kept_on_disk_are_told_apart(tmp_path: Path) -> None:
    model, tok = build("llama"), chatty()
    for changes in ({}, {"chat_template": True}, {"target_eos": True}, {"chat_template": True}):
        hparams = rome_hparams((model, tok), targets_dir=str(tmp_path / "kept"), **changes)
        BaseEditor.from_hparams(hparams).compute(BRIDGE)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3
