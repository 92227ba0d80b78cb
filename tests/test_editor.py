"""EasyEdit's door: the same calls, keys and shapes; the reference's quirks put right; data read and refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, rome_hparams, same, side_of, states, tokenizer

from easyeditor import BaseEditor, EditRequest
from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.dataset.formats import parse, read_request
from easyeditor.dataset.sentences import OFFICIAL, OWN, load_sentences, read_sentences
from easyeditor.evaluate.scoring import score
from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT, encode, target_ids
from easyeditor.methods.locate.rows import target_rows
from easyeditor.values.collapse import verdict
from easyeditor.values.edit import WeightDelta

FEW = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"]}
ONE = {"prompts": "Bay, which is located in", "target_new": "Italy", "subject": "Bay", "verbose": False}
TWO: dict[str, Any] = {
    "prompts": ["Bay, which is located in", "The mother tongue of {} is"],
    "subject": ["Bay", "Darrieux"],
    "target_new": ["Italy", "English"],
    "ground_truth": ["France", None],
    "rephrase_prompts": [["Bay can be found in", "Where is Bay? In"], "Darrieux speaks"],
    "locality_inputs": {"near": {"prompt": [["The sea is", "I"], "You"], "ground_truth": [["blue and", "am"], "are"]}},
    "portability_inputs": {"hop": {"prompt": ["In Bay they speak", None], "ground_truth": ["Italian", None]}},
    "verbose": False,
}


def editor_of(kind: str = "llama", *, tok: Any = None, **changes: Any) -> BaseEditor:
    hparams = rome_hparams(changes.pop("model_name", (build(kind), tok or tokenizer())), **{**FEW, **changes})
    return BaseEditor.from_hparams(hparams)


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in metrics]


# Keys and shapes


def numbers(values: Any, count: int) -> bool:
    return len(values) == count and all(isinstance(v, float) and 0 <= v <= 1 for v in values)


def test_a_record_has_easyedits_keys_and_shapes() -> None:
    editor = editor_of(ppl_sentence_num=50)
    metrics, model, _ = editor.edit(**TWO)
    assert model is editor.model
    assert [record["case_id"] for record in metrics] == [0, 1]
    first, second = metrics
    for state in ("pre", "post"):
        for record, rephrases, near, hops in ((first, 2, 2, 1), (second, 1, 1, 0)):
            part = record[state]
            assert numbers(part["rewrite_acc"], 1)
            assert numbers(part["rephrase_acc"], rephrases)
            assert len(part["locality"]["near_output"]) == near
            assert all(isinstance(i, int) for said in part["locality"]["near_output"] for i in said)
            assert ("hop_acc" in part["portability"]) == bool(hops)
            assert not hops or numbers(part["portability"]["hop_acc"], hops)
            assert isinstance(part["ppl"], float)
            assert part["ppl"] > 1
    assert "near_acc" not in first["pre"]["locality"]
    assert numbers(first["post"]["locality"]["near_acc"], 2)
    assert first["requested_rewrite"]["prompt"] == "Bay, which is located in"
    assert second["requested_rewrite"]["prompt"] == "The mother tongue of Darrieux is"
    assert first["time"] > 0
    assert first["collapse"]["collapsed"] in (True, False)
    assert first["collapse"]["ppl_before"] == first["pre"]["ppl"]
    assert first["collapse"]["ppl_after"] == first["post"]["ppl"]
    assert set(first["probabilities"]) == {"target_new", "ground_truth"}
    for record, truth in ((first, True), (second, False)):
        assert numbers(record["probabilities"]["target_new"].values(), 2)
        assert set(record["probabilities"]["target_new"]) == {"before", "after"}
        assert (record["probabilities"]["ground_truth"]["after"] is not None) == truth
    json.dumps(metrics, allow_nan=False)


def test_the_trace_of_a_record() -> None:
    metrics, _, _ = editor_of(layers=[0, 2]).edit(**ONE)
    trace = metrics[0]["trace"]
    assert list(trace) == ["0", "2"]
    texts = {"notes", "losses", "loss_names", "steps"}
    for layer in trace.values():
        assert [key for key, value in layer.items() if key not in texts and not isinstance(value, float)] == []
        assert layer["steps"] == len(layer["losses"]) == 2
        assert (layer["losses"][0][0], layer["losses"][-1][0]) == (layer["loss_first"], layer["loss_last"])
        assert layer["loss_last"] < layer["loss_first"]
        assert layer["numerator_norm"] / abs(layer["denominator"]) == pytest.approx(layer["delta_norm"], rel=1e-5)


def test_the_target_becomes_likelier_and_is_said() -> None:
    editor = editor_of(v_num_grad_steps=25, clamp_norm_factor=20)
    ((record,), _, _) = editor.edit("They all went to Bay", "the", subject="Bay", verbose=False)
    assert record["probabilities"]["target_new"]["after"] > 10 * record["probabilities"]["target_new"]["before"]
    assert (record["pre"]["rewrite_acc"], record["post"]["rewrite_acc"]) == ([0.0], [1.0])


def test_without_probes_and_sentences_the_record_is_small() -> None:
    metrics, _, _ = editor_of().edit(**ONE)
    (record,) = metrics
    assert "rephrase_acc" not in record["pre"]
    assert (record["pre"]["locality"], record["post"]["portability"]) == ({}, {})
    assert (record["pre"]["ppl"], record["post"]["ppl"], record["collapse"]) == (None, None, None)


def test_single_texts_equal_lists_of_one() -> None:
    single, _, _ = editor_of().edit(**ONE, ground_truth="France", rephrase_prompts="Bay is in")
    ground = {"ground_truth": ["France"], "rephrase_prompts": ["Bay is in"], "verbose": False}
    listed, _, _ = editor_of().edit(["Bay, which is located in"], ["Italy"], subject=["Bay"], **ground)
    assert without_time(single) == without_time(listed)


# Keeping and restoring


@pytest.mark.parametrize("flags", [{"keep_original_weight": True}, {"sequential_edit": False}], ids=str)
def test_restoring_after_each_edit(flags: dict[str, bool]) -> None:
    editor = editor_of()
    before = states(editor.model)
    metrics, model, saved = editor.edit(**TWO, **flags)
    assert saved == {}
    assert same(model, before)
    alone = editor_of().compute(metrics[1]["requested_rewrite"]).trace_json()[0]
    assert metrics[1]["trace"] == alone


@pytest.mark.parametrize("flags", [{}, {"keep_original_weight": False}, {"sequential_edit": True}], ids=str)
def test_keeping_every_edit(flags: dict[str, bool]) -> None:
    editor = editor_of()
    before = states(editor.model)
    _, model, saved = editor.edit(**TWO, **flags)
    assert not same(model, before)
    assert list(saved) == ["model.layers.1.mlp.down_proj.weight"]
    with torch.no_grad():
        for name, weight in saved.items():
            model.get_parameter(name).copy_(weight)
    assert same(model, before)


def test_in_sequence_pre_is_the_original_model_and_just_before_where_the_last_ended() -> None:
    editor = editor_of(ppl_sentence_num=9)
    (first, second), _, _ = editor.edit(**TWO, sequential_edit=True)
    assert first["just_before"] is None
    assert second["pre"]["ppl"] == first["pre"]["ppl"]
    assert second["just_before"]["ppl"] == first["post"]["ppl"] != first["pre"]["ppl"]
    assert second["perplexity"]["just_before"] == first["perplexity"]["after"]
    assert editor.perplexity().mean == pytest.approx(second["post"]["ppl"])
    collapse = second["collapse"]
    assert collapse["ppl_before"] == first["pre"]["ppl"]
    assert collapse["times_before"] == pytest.approx(second["post"]["ppl"] / first["pre"]["ppl"])
    assert collapse["times_just_before"] == pytest.approx(second["post"]["ppl"] / first["post"]["ppl"])


WILD = {"v_num_grad_steps": 8, "clamp_norm_factor": 100.0, "v_lr": 5.0}  # edits that change what the model says


def test_in_sequence_locality_is_measured_against_both_models() -> None:
    editor, untouched = editor_of(**WILD), editor_of(**WILD)
    (_, second), _, _ = editor.edit(**TWO, sequential_edit=True)
    request = EditRequest.from_json(second["requested_rewrite"])
    original = untouched.score(request)
    untouched.edit(TWO["prompts"][0], TWO["target_new"][0], subject=TWO["subject"][0], verbose=False)
    before, after = untouched.score(request), editor.score(request)
    assert original.outputs["near"] != before.outputs["near"]
    assert second["pre"]["locality"] == original.to_json()["locality"]
    assert second["pre"]["rewrite_acc"] == original.to_json()["rewrite_acc"]
    assert second["post"]["locality"] == replace(after, locality=after.agreement(original)).to_json()["locality"]
    assert second["just_before"]["locality"]["near_output"] == before.to_json()["locality"]["near_output"]
    assert second["post"]["locality_just_before"] == {"near_acc": list(after.agreement(before)["near"])}
    assert second["probabilities"]["target_new"]["before"] == pytest.approx(original.probabilities["target_new"])
    assert second["just_before"]["probabilities"]["target_new"] == pytest.approx(before.probabilities["target_new"])


def one_by_one(editor: BaseEditor) -> list[dict[str, Any]]:
    """Three calls with one request each, every edit kept."""
    made = [("Bay, which is located in", "Bay"), ("The mother tongue of {} is", "Darrieux"), ("They saw Oslo", "Oslo")]
    return [editor.edit(p, "Italy", subject=s, sequential_edit=True, verbose=False)[0][0] for p, s in made]


def test_a_repeated_call_judges_against_the_model_before_the_first_commit() -> None:
    editor = editor_of(ppl_sentence_num=9, **WILD)
    base = editor.perplexity().mean
    records = one_by_one(editor)
    assert [record["pre"]["ppl"] for record in records] == pytest.approx([base] * 3)
    assert [record["collapse"]["ppl_before"] for record in records] == pytest.approx([base] * 3)
    assert records[2]["just_before"]["ppl"] == pytest.approx(records[1]["post"]["ppl"])
    editor.revert_all()
    assert editor.perplexity().mean == pytest.approx(base)


def test_after_a_collapse_every_later_edit_is_collapsed_too() -> None:
    """The verdict compares with the model before the first edit, not with the one that collapsed."""
    editor = editor_of(ppl_sentence_num=9, collapse_threshold=1.0, collapse_ratio=1.01)  # a tiny model never goes far
    wreck = editor.compute({"prompt": "{} is in", "subject": "Bay", "target_new": "Italy"})
    (delta,) = wreck.deltas
    noise = torch.randn(delta.dense().shape, generator=torch.Generator().manual_seed(0))
    editor.commit(replace(wreck, deltas=(WeightDelta(name=delta.name, full=10 * noise),)))
    records = one_by_one(editor)
    for record in records:
        assert record["collapse"]["times_before"] > 1.01 > record["collapse"]["times_just_before"]
    assert [record["collapse"]["collapsed"] for record in records] == [True] * 3


@pytest.mark.parametrize(
    ("call", "mode", "other"),
    [("edit", "kept in the model", "sequential_edit=False"), ("batch_edit", "taken back", "sequential_edit=True")],
)
def test_several_requests_and_no_flag_give_one_warning(
    call: str, mode: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    editor = editor_of()
    getattr(editor, call)(**TWO)
    (message,) = [r.getMessage() for r in caplog.records if "neither" in r.getMessage()]
    assert mode in message
    assert other in message
    caplog.clear()
    editor.edit(**ONE)
    for flags in ({"sequential_edit": False}, {"keep_original_weight": False}):
        editor.edit(**TWO, **flags)
        editor.batch_edit(**TWO, **flags)
    assert not [r for r in caplog.records if "neither" in r.getMessage()]


def test_kept_edits_can_be_taken_back() -> None:
    editor = editor_of()
    before = states(editor.model)
    editor.edit(**TWO)
    editor.revert_all()
    assert same(editor.model, before)


@pytest.mark.parametrize("kept", [True, False])
def test_of_two_contradicting_flags_sequential_edit_decides(kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As in EasyEdit, whose examples pass `keep_original_weight=True, sequential_edit=True`."""
    editor = editor_of()
    before = states(editor.model)
    editor.edit(**ONE, keep_original_weight=kept, sequential_edit=not kept)
    assert not caplog.records
    editor.revert_all()
    editor.edit(**ONE, keep_original_weight=kept, sequential_edit=kept)
    assert same(editor.model, before) != kept
    (message,) = [r.getMessage() for r in caplog.records]
    assert "sequential_edit decides" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"subject": None}, ["subject="]),
        ({"subject": ["Bay"]}, ["2 prompts", "1 subject"]),
        ({"target_new": ["Italy"]}, ["2 prompts", "1 target_new"]),
        ({"ground_truth": ["a", "b", "c"]}, ["2 prompts", "3 ground_truth"]),
        ({"rephrase_prompts": "one"}, ["2 prompts", "1 rephrase_prompts"]),
        ({"prompts": ["Bay is in", "The mother tongue is"]}, ["request 1", "'Darrieux'", "is not in the prompt"]),
        ({"prompts": ["Bay is in", "{} and {}"]}, ["request 1", "2 '{}'"]),
        ({"prompts": ["Bay is in", "  "]}, ["request 1", "prompt is empty"]),
        ({"prompts": ["Bay is in", None]}, ["request 1", "prompt must be text", "NoneType"]),
        ({"subject": ["Bay", ""]}, ["request 1", "subject is empty"]),
        ({"target_new": ["Italy", " "]}, ["request 1", "target_new is empty"]),
        ({"target_new": ["Italy", True]}, ["request 1", "target_new must be text", "bool"]),
        ({"ground_truth": ["a", True]}, ["request 1", "ground_truth must be text", "bool"]),
        ({"rephrase_prompts": ["a", ["\udc80"]]}, ["request 1", "rephrase_prompts"]),
        ({"rephrase_prompts": ["a", True]}, ["request 1", "rephrase_prompts"]),
        ({"locality_inputs": {"near": {"prompt": ["a", "b"]}}}, ["locality_inputs['near']", "ground_truth"]),
        ({"locality_inputs": 5}, ["locality_inputs must be", "found 5"]),
        ({"portability_inputs": ["a"]}, ["portability_inputs must be", "found ['a']"]),
        ({"locality_inputs": {"near": {"prompt": 5, "ground_truth": "a"}}}, ["locality_inputs['near'] must be", "5"]),
        ({"target_new": 5}, ["target_new must be a text or a list, found 5"]),
        ({"prompts": {"a": "b"}}, ["prompts must be a text or a list"]),
        ({"subject": b"a"}, ["subject must be a text or a list"]),
        ({"rephrase_prompts": 5}, ["rephrase_prompts must be a text or a list"]),
        ({"ground_truth": True}, ["ground_truth must be a text or a list"]),
        ({"locality_inputs": {"near": {"prompt": ["a"], "ground_truth": ["b"]}}}, ["'near'", "1 prompts", "2 edits"]),
        (
            {"locality_inputs": {"near": {"prompt": ["a", ["b", "c"]], "ground_truth": ["a", ["b"]]}}},
            ["request 1", "locality.near", "2 prompts", "1 ground truths"],
        ),
        (
            {"locality_inputs": {"near": {"prompt": ["a", True], "ground_truth": ["a", "b"]}}},
            ["request 1", "locality.near"],
        ),
        ({"portability_inputs": {"hop": ["a", "b"]}}, ["portability_inputs['hop']", "prompt"]),
    ],
)
def test_bad_requests_are_refused_before_anything_is_edited(changes: dict[str, Any], parts: list[str]) -> None:
    editor = editor_of()
    before = states(editor.model)
    with pytest.raises(DataError) as caught:
        editor.edit(**{**TWO, **changes})
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert same(editor.model, before)


# The reference's quirks


@pytest.mark.parametrize("side", ["left", "right"])
def test_locality_prompts_are_scored_each_at_its_own_place(side: str) -> None:
    """Quirk 3: the reference scores only the longest of a list where it stands."""
    model, tok = build("gpt2"), copy.deepcopy(tokenizer())
    tok.padding_side = side
    prompts = ["I", "The sea was very deep and", "You and"]
    answers = ["am here", "blue", "I are together"]

    def record(prompt: Any, answer: Any) -> dict[str, Any]:
        near = {"near": {"prompt": prompt, "ground_truth": answer}}
        request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy", locality=near)
        return side_of(model, tok, request).to_json()["locality"]

    alone = [record(p, a)["near_output"][0] for p, a in zip(prompts, answers, strict=True)]
    assert record(prompts, answers)["near_output"] == alone
    assert [len(said) for said in alone] == [len(target_ids(tok, p, a)) for p, a in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_the_yaml_cannot_name_changes_nothing(kind: str) -> None:
    """Quirk 9: tied heads are no parameter of their own, and transformers renames heads."""
    named = {"lm_head_module": "model.no_such_head", "ln_f_module": "model.no_norm", "attn_module_tmp": "nowhere.{}"}
    model = build(kind)
    assert (kind == "gpt2") == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    plain, renamed = (editor_of(kind, **names).edit(**ONE)[0] for names in ({}, named))
    assert without_time(plain) == without_time(renamed)


def test_a_tied_head_of_another_architecture() -> None:
    hparams = rome_hparams((build("llama", tie_word_embeddings=True), tokenizer()), lm_head_module="lm_head", **FEW)
    metrics, model, _ = BaseEditor(hparams).edit(**ONE, keep_original_weight=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert metrics[0]["trace"]["1"]["loss_last"] < metrics[0]["trace"]["1"]["loss_first"]


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_token_type_ids_never_reach_the_model(replay: bool) -> None:
    """Quirk 1: GPT-2 would add an embedding to every token."""
    tok = copy.deepcopy(tokenizer())
    tok.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tok("Bay")
    sampled = {"context_templates": None, "context_template_length_params": [[2, 5]], "ppl_sentence_num": 3}
    found, seen = [], set()
    for each in (tok, tokenizer()):
        editor = editor_of("gpt2", tok=each, replay=replay, **sampled)
        editor.model.register_forward_pre_hook(lambda _m, _args, kwargs: seen.update(kwargs), with_kwargs=True)
        found.append(without_time(editor.edit(**ONE)[0]))
    assert found[0] == found[1]
    assert "input_ids" in seen
    assert "token_type_ids" not in seen


@pytest.mark.parametrize("target", ["東京", "é", "東"])
def test_a_target_cut_inside_a_character_is_edited_on_ids(target: str) -> None:
    """Quirk 2: decoding all target tokens but the last gives U+FFFD and other ids."""
    tok = tokenizer()
    request = EditRequest.make("They all went to Bay", subject="Bay", target_new=target)
    ids = target_ids(tok, request.prompt, target)
    assert "�" in tok.decode(ids[:-1])
    assert tok.decode(ids) == (target if target > "⺀" else f" {target}")  # Japanese has no spaces
    rows, labels = target_rows(tok, request, ["{}", "You. {}"], "subject_last")
    assert labels == [ids, ids]
    assert [list(row.ids) for row in rows] == [encode(tok, text + request.prompt) + ids[:-1] for text in ("", "You. ")]
    ((record,), _, _) = editor_of(v_num_grad_steps=8).edit(request.prompt, target, subject="Bay", verbose=False)
    assert record["probabilities"]["target_new"]["after"] > record["probabilities"]["target_new"]["before"]


def made(prompt: str, subject: str) -> EditRequest:
    return EditRequest.make(prompt, subject=subject, target_new="Italy")


@pytest.mark.parametrize(
    ("prompt", "subject", "text", "start"),
    [
        ("The set {1, 2} of Bay is", "Bay", "The set {1, 2} of Bay is", 18),
        ("The set {1, 2} of {} is", "Bay", "The set {1, 2} of Bay is", 18),
        ("{0} of {} is {x}", "Bay", "{0} of Bay is {x}", 7),
        ("Bay, Bayard and Bay, the Bayou, Baywatch", "Bay", None, 16),
        ("Bay of the Bayou", "Bay", None, 0),
        ("Bombay of the Bayou", "Bay", None, 14),  # no whole word: the last occurrence
        ("Bay and {} of Bay", "Bay", "Bay and Bay of Bay", 8),
        ("In Call Cobbs, Jr. they", "Call Cobbs, Jr.", None, 3),
        ("The .NET of C++ and C++ is", "C++", None, 20),
    ],
)
def test_where_the_subject_is(prompt: str, subject: str, text: str | None, start: int) -> None:
    request = made(prompt, subject)
    assert (request.prompt, request.subject_start) == (text or prompt, start)
    assert request.before + request.subject + request.after == request.prompt


def test_a_repeated_subject_is_edited_at_its_last_whole_word() -> None:
    editor = editor_of()
    plain, marked_last, marked_first = (
        editor.compute(made(prompt, "Bay")).deltas[0].dense()
        for prompt in ("Bay or Bay in the Bayou", "Bay or {} in the Bayou", "{} or Bay in the Bayou")
    )
    assert torch.equal(plain, marked_last)
    assert not torch.allclose(plain, marked_first)


def test_other_braces_edit_with_and_without_a_mark() -> None:
    editor = editor_of()
    plain, marked = (editor.compute(made(f"The set {{1, 2}} of {s} is", "Bay")).deltas[0] for s in ("Bay", "{}"))
    assert torch.equal(plain.dense(), marked.dense())


# Test-time prefix


def test_a_prefix_with_text_is_drawn_by_the_seed() -> None:
    contexts = ["{}", "You. {}", "I think so. {}", "It rained. {}", "They left. {}", "So what? {}"]
    drawn = {}
    for seed in (0, 0, 1, 2):
        editor = editor_of(if_prefix=True, seed=seed, context_templates=contexts, v_num_grad_steps=1)
        found = [record["test_prefix"] for record in editor.edit(**TWO)[0]]
        assert drawn.setdefault(seed, found) == found
    prefixes = {prefix for found in drawn.values() for prefix in found}
    assert prefixes <= set(contexts[1:])
    assert len(prefixes) > 2


@pytest.mark.parametrize(("if_prefix", "moved"), [(False, 0), (True, 1), ("all", 2)])
def test_what_the_prefix_stands_before(if_prefix: bool | str, moved: int) -> None:
    """The rewrite prompt, with `all` rephrase prompts too, never the other probes."""
    editor = editor_of("gpt2", if_prefix=if_prefix, context_templates=["{}", "You. {}"])
    prompts = ["Bay is in", "Where is Bay? In", "They say that Bay is in"]
    hop = {"hop": {"prompt": prompts[2], "ground_truth": "Italy"}}
    request = EditRequest.make(
        prompts[0], subject="Bay", target_new="Italy", rephrase_prompts=prompts[1], portability=hop
    )
    examined = editor.examine(request)
    assert examined.record.test_prefix == ("You. {}" if if_prefix else None)
    pairs = [("You. " * (place < moved) + prompt, "Italy") for place, prompt in enumerate(prompts)]
    with editor.applied(examined.result):
        scores = editor.score(request, examined.record.test_prefix)
        wanted = score(editor.model, editor.tok, pairs)
    assert [*scores.rewrite, *scores.rephrase, *scores.portability["hop"]] == [s.accuracy for s in wanted]
    assert examined.record.probabilities["target_new"]["after"] == wanted[0].probability


def test_a_prefix_needs_a_context_with_text() -> None:
    with pytest.raises(ConfigError, match="context with text"):
        editor_of(if_prefix=True, context_templates=["{}"]).edit(**ONE)


# What is assigned to an editor


@pytest.mark.parametrize(
    ("assigned", "as_new"),
    [
        ({"model": build("llama", seed=5)}, {"model_name": (build("llama", seed=5), tokenizer())}),
        ({"model": build("gpt2", seed=5)}, {"model_name": (build("gpt2", seed=5), tokenizer())}),
        ({"tok": tokenizer(bos=True)}, {"tok": tokenizer(bos=True)}),
        ({"hparams.layers": [2], "hparams.v_lr": "0.1"}, {"layers": [2], "v_lr": 0.1}),
        ({"hparams.alg_name": "R-ROME", "hparams.if_c_rome": True}, {"alg_name": "R-ROME", "if_c_rome": True}),
        ({"hparams.if_prefix": True, "hparams.seed": 3}, {"if_prefix": True, "seed": 3}),
        ({"hparams.ppl_sentence_num": 0}, {"ppl_sentence_num": 0}),
        ({"sentences": None}, {"ppl_sentence_num": 0}),
    ],
    ids=lambda case: " ".join(case),
)
def test_what_is_assigned_is_used_as_by_a_new_editor(assigned: dict[str, Any], as_new: dict[str, Any]) -> None:
    editor = editor_of(ppl_sentence_num=50)
    _, old, _ = editor.edit(**TWO)
    if not assigned.keys() & {"model", "tok"}:
        editor.revert_all()
    left = states(old)
    for name, value in assigned.items():
        owner, _, key = name.rpartition(".")
        setattr(editor.hparams if owner else editor, key, value)
    if "tok" in assigned:
        editor.model = build("llama")
    fresh = editor_of(**{"ppl_sentence_num": 50, **as_new})
    found, model, originals = editor.edit(**TWO)
    wanted, same_model, _ = fresh.edit(**TWO)
    assert without_time(found) == without_time(wanted)
    assert model is editor.model
    assert same(model, states(same_model))
    assert same(old, left) or model is old
    editor.revert_all()
    assert all(torch.equal(weight, editor.model.get_parameter(name)) for name, weight in originals.items())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("method", None, r"assign editor\.hparams"),
        ("metrics", ["GE", "no_such"], "no_such"),
        ("model", "gpt2", "pair from transformers"),
        ("hparams.model_name", "gpt2", "make a new editor, or assign editor.model"),
        ("hparams.dtype", "float16", "make a new editor"),
        ("hparams.v_lr", "half", "v_lr is 'half'"),
        ("hparams.layers", [2], r"call editor\.revert_all"),
    ],
)
def test_what_cannot_be_assigned_says_what_to_do(name: str, value: Any, says: str) -> None:
    editor = editor_of()
    editor.edit(**ONE)
    owner, _, key = name.rpartition(".")
    with pytest.raises(ConfigError, match=says):  # noqa: PT012 - at the assignment, or at the next use
        setattr(editor.hparams if owner else editor, key, value)
        editor.edit(**ONE)


# Hyper-parameters at the door


def test_hparams_belong_to_the_user_and_the_editor_has_its_own() -> None:
    pair = (build("llama"), tokenizer())
    hparams = rome_hparams(pair, **FEW)
    hparams.layers, hparams.v_lr = [2], "5e-1"
    editor = BaseEditor.from_hparams(hparams)
    assert (editor.model, editor.tok) == pair
    wanted = editor.compute(made("Bay is in", "Bay"))
    assert list(wanted.trace) == [2]
    hparams.layers.append(3)
    hparams.context_templates.append("They left. {}")
    hparams.v_num_grad_steps, hparams.model_name, hparams.seed = 1, "elsewhere", 7
    again = editor.compute(made("Bay is in", "Bay"))
    assert torch.equal(wanted.deltas[0].dense(), again.deltas[0].dense())
    assert (again.contexts, again.hparams) == (wanted.contexts, wanted.hparams)
    assert hparams.v_lr == "5e-1"


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("v_lr", "half", ["v_lr", "float"]),
        ("v_lrate", 0.5, ["unknown key 'v_lrate'", "did you mean"]),
        ("layers", [4], ["layer 4", "0 to 3"]),
        ("v_loss_layer", 9, ["v_loss_layer", "3"]),
        (
            "v_loss_layer",
            2,
            ["v_loss_layer", "3"],
        ),  # never a silent other layer: the model's own forward gives the loss
        ("model_name", 5, ["(model, tokenizer) pair", "int"]),
        ("model_name", (1, 2), ["(model, tokenizer) pair", "(int, int)"]),
        ("context_templates", ["{} {}"], ["context_templates", "exactly one {}"]),
        ("context_templates", [], ["context_templates", "empty"]),
    ],
)
def test_wrong_assignments_are_refused_at_the_door(name: str, value: Any, parts: list[str]) -> None:
    hparams = rome_hparams((build("llama"), tokenizer()), **FEW)
    setattr(hparams, name, value)
    with pytest.raises(ConfigError) as caught:
        BaseEditor(hparams)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_only_hparams_make_an_editor() -> None:
    with pytest.raises(ConfigError, match="found dict"):
        BaseEditor({"layers": [1]})  # type: ignore[arg-type]


@pytest.mark.parametrize("requests", [[], {}, ["Bay is in"], [{"prompt": "Bay is in"}]], ids=str)
def test_compute_refuses_what_is_no_request(requests: Any) -> None:
    with pytest.raises(DataError):
        editor_of().compute(requests)


# Dataset formats

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Bay",
        "target_new": {"str": "English", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
        "relation_id": "P103",
    },
    "paraphrase_prompts": ["Bay speaks", "Bay says"],
    "neighborhood_prompts": ["The mother tongue of Roland is", "Roland speaks"],
    "generation_prompts": ["Bay is from"],
}
EASYEDIT = {
    "case_id": 7,
    "prompt": "The mother tongue of Bay is",
    "target_new": "English",
    "subject": "Bay",
    "ground_truth": "French",
    "rephrase_prompt": "Bay speaks",
    "locality_prompt": "Roland speaks",
    "locality_ground_truth": "French",
}
HARDEDIT = {key: EASYEDIT[key] for key in ("prompt", "target_new", "subject", "ground_truth")}
ZSRE = {
    "subject": "Bay",
    "src": "What is the mother tongue of Bay?",
    "alt": "English",
    "answers": ["French", "Francais"],
    "rephrase": "Which tongue has Bay?",
    "loc": "nq question: who sang it",
    "loc_ans": "Roland",
}
QUESTION = {"case_index": 7, "question": "The mother tongue of Bay is", "answer": "English", "subject": "Bay"}
PROBED = {
    **HARDEDIT,
    "rephrase_prompts": ["Bay speaks"],
    "locality": {"near": {"prompt": ["a b", "c d"], "ground_truth": ["e", "f"]}},
    "portability": {"hop": {"prompt": "g h", "ground_truth": "i"}},
}


def facts(request: EditRequest) -> dict[str, Any]:
    """What a record says beyond prompt, subject and target, empty entries left out."""
    raw = request.to_json()
    keys = ("ground_truth", "rephrase_prompt", "locality", "portability")
    return {key: raw[key] for key in keys if raw[key]}


def near(key: str, prompts: list[str], answers: list[str]) -> dict[str, Any]:
    return {key: {"prompt": prompts, "ground_truth": answers}}


TONGUE = "The mother tongue of Bay is"
FRENCH: dict[str, Any] = {"ground_truth": "French"}
SPEAKS = {**FRENCH, "rephrase_prompt": ["Bay speaks"]}
BOTH = {**FRENCH, "rephrase_prompt": ["Bay speaks", "Bay says"]}
ASKS = {**FRENCH, "rephrase_prompt": ["Which tongue has Bay?"]}
NEARBY = near("neighborhood", COUNTERFACT["neighborhood_prompts"], ["French", "French"])


@pytest.mark.parametrize(
    ("raw", "case_id", "prompt", "extra"),
    [
        pytest.param(COUNTERFACT, 7, TONGUE, {**BOTH, "locality": NEARBY}, id="counterfact"),
        pytest.param(
            EASYEDIT,
            7,
            TONGUE,
            {**SPEAKS, "locality": near("neighborhood", ["Roland speaks"], ["French"])},
            id="easyedit",
        ),
        pytest.param(HARDEDIT, 3, TONGUE, FRENCH, id="hardedit"),
        pytest.param(
            ZSRE, 3, ZSRE["src"], {**ASKS, "locality": near("neighborhood", ["who sang it"], ["Roland"])}, id="zsre"
        ),
        pytest.param(QUESTION, 7, TONGUE, {}, id="question"),
        pytest.param(
            PROBED,
            3,
            TONGUE,
            {**SPEAKS, "locality": PROBED["locality"], "portability": near("hop", ["g h"], ["i"])},
            id="probes",
        ),
    ],
)
def test_a_record_of_every_format(raw: dict[str, Any], case_id: int, prompt: str, extra: dict[str, Any]) -> None:
    request = parse(raw, "file.json: record 3", 3)
    assert (request.case_id, request.prompt, request.subject, request.target_new) == (case_id, prompt, "Bay", "English")
    assert request.subject_start == prompt.index("Bay")
    assert facts(request) == extra


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (None, "must be a JSON object, found NoneType"),
        ([EASYEDIT], "found list"),
        ({}, "no known format"),
        ({1: "a", "b": 2}, "no known format"),
        (without(EASYEDIT, "target_new"), "no known format"),
        ({**EASYEDIT, "subject": "Joan"}, "'Joan' is not in the prompt"),
        ({**EASYEDIT, "subject": True}, "subject must be text"),
        ({**EASYEDIT, "target_new": {"text": "English"}}, "target_new must be text"),
        ({**EASYEDIT, "prompt": ""}, "prompt is empty"),
        ({**EASYEDIT, "rephrase_prompt": True}, "rephrase_prompts"),
        ({**PROBED, "locality": "near"}, "locality must be a mapping"),
        ({**PROBED, "locality": {"near": "Roland"}}, "locality.near must have 'prompt'"),
        ({**PROBED, "portability": ["hop"]}, "portability must be a mapping"),
        ({"requested_rewrite": None}, "malformed counterfact record"),
        ({**COUNTERFACT, "neighborhood_prompts": 5}, "malformed counterfact record"),
        ({**ZSRE, "loc": True}, "must be non-empty texts"),
        ({**ZSRE, "answers": [True]}, "ground_truth must be text"),
        ({**QUESTION, "answer": None}, "target_new must be text"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(raw: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(raw, "facts.json: record 12", 12)
    assert str(caught.value).startswith("facts.json: record 12: ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [EASYEDIT, [EASYEDIT]], ids=["object", "list"])
def test_a_request_file_with_one_record(content: Any, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_request(tmp_path / "request.json") == parse(EASYEDIT, "here")


# Sentences


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with our own fifty only."""
    own = [{"Text": f"Own sentence {number}."} for number in range(50)]
    (tmp_path / OWN).write_text(json.dumps(own), encoding="utf-8")
    return tmp_path


def official(data: Path, size: int, count: int) -> None:
    path = data / OFFICIAL[size]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"Text": f"Official {size}-{n}."} for n in range(count)]), encoding="utf-8")


@pytest.mark.parametrize("count", [1, 20, 50])
def test_the_first_sentences_of_the_smallest_set(count: int, data: Path) -> None:
    own = load_sentences(count, data)
    assert (own.name, own.texts) == ("sentences_50", tuple(f"Own sentence {n}." for n in range(count)))
    official(data, 50, 50)
    official(data, 1000, 1000)
    found = load_sentences(count, data)
    assert (found.name, found.texts) == ("ME-PPL_50", tuple(f"Official 50-{n}." for n in range(count)))
    assert found.sha256 != own.sha256
    assert found.to_json() == {"name": found.name, "path": found.path, "sha256": found.sha256, "sentences": count}


@pytest.mark.parametrize(
    ("count", "size", "name"), [(51, 1000, "ME-PPL_1k"), (1000, 1000, "ME-PPL_1k"), (1001, 10000, "ME-PPL")]
)
def test_more_sentences_are_the_papers_only(count: int, size: int, name: str, data: Path) -> None:
    with pytest.raises(DataError, match=rf"{count} sentences need .*{name}\.json, which is not there; take .* from"):
        load_sentences(count, data)
    official(data, size, count - 1)
    with pytest.raises(DataError, match=f"has {count - 1} sentences, {count} were asked for"):
        load_sentences(count, data)
    official(data, size, count)
    found = load_sentences(count, data)
    assert (found.name, len(found.texts), found.texts[-1]) == (name, count, f"Official {size}-{count - 1}.")


@pytest.mark.parametrize("count", [0, -1, 10001])
def test_counts_out_of_range_are_refused(count: int, data: Path) -> None:
    with pytest.raises(DataError, match=f"{count} sentences asked for; allowed: 1 to 10000"):
        load_sentences(count, data)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", b'[{"Text": "One two."}, "Three four."]', ("One two.", "Three four.")),
        ("a.txt", "One zwei.\nÄrger.\n".encode(), ("One zwei.", "Ärger.")),
        ("a.txt", b"One two.\nThree four.", ("One two.", "Three four.")),
        ("a.txt", b"One two.\r\nThree four.\r\n", ("One two.", "Three four.")),
        ("a.txt", b'["One two."]', ("One two.",)),
    ],
)
def test_sentence_files(name: str, content: bytes, texts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_sentences(tmp_path / name).texts == texts


@pytest.mark.parametrize("replay", [True, False], ids=["fast", "plain"])
def test_sentences_beyond_max_length_are_refused(replay: bool) -> None:
    editor = editor_of(ppl_sentence_num=5, max_length=8, replay=replay)
    with pytest.raises(DataError, match=r"\d+ tokens; the limit is 8"):
        editor.perplexity()


# The verdict


@pytest.mark.parametrize(
    ("before", "after", "limit", "collapsed"),
    [
        (50, 1000, 1000, False),
        (50, 1000.5, 1000, True),
        (50, 60, 1000, False),
        (200, 1000.5, 1000, True),
        (201, 1004, 1005, False),
        (201, 1006, 1005, True),
        (5000, 20000, 25000, False),
        (5000, 26000, 25000, True),
        (50, math.nan, 1000, True),
        (50, math.inf, 1000, True),
        (math.inf, 900, 1000, False),
        (math.nan, 1001, 1000, True),
        (math.inf, math.inf, 1000, True),
    ],
)
def test_the_verdict(before: float, after: float, limit: float, collapsed: bool) -> None:
    found = verdict(before, after, threshold=1000, ratio=5)
    assert (found.collapsed, found.limit, found.finite) == (collapsed, limit, math.isfinite(after))
    assert found.to_json()["collapsed"] is collapsed


def test_the_last_layer_cannot_reach_an_answer_behind_more_text(caplog: pytest.LogCaptureFixture) -> None:
    requests = [made("Bay, which is", "Bay"), made("Cay, which is", "Cay"), made("They went to Bay", "Bay")]
    for layers, subjects, warnings in (([3], [0, 1], 1), ([3], [2], 0), ([2], [0], 0)):
        caplog.clear()
        editor_of(layers=layers).method.edit([requests[n] for n in subjects])
        assert caplog.text.count("is the last, and text follows the token it edits") == warnings


@pytest.mark.parametrize(
    ("kind", "layer", "window", "warned"),
    [
        ("mistral", 2, 4, True),  # one layer above, and it sees 3 tokens back
        ("mistral", 0, 4, False),  # three of them hand it on
        ("mistral", 2, 40, False),
        ("gemma2", 2, 4, False),  # the layer above sees everything
        ("llama", 2, 4, False),  # not an architecture with windows
    ],
)
def test_windows_that_end_before_the_answer_are_warned_of(
    caplog: pytest.LogCaptureFixture, kind: str, layer: int, window: int, warned: bool
) -> None:
    changes = {} if kind == "llama" else {"sliding_window": window}
    editor = BaseEditor(rome_hparams((build(kind, **changes), tokenizer()), layers=[layer]))
    request = made("Bay, wet, is in", "Bay")
    editor.method.edit([request])
    assert caplog.text.count("further than sliding attention carries it (3)") == warned
    assert moved(editor, request, layer) is not warned


def moved(editor: Any, request: Any, layer: int) -> bool:
    """Whether another output of the edited MLP at the subject's last token changes the answer's logits."""
    rows, _ = editor.method.search_rows(request, [SLOT])
    forward = row_forward(editor.method.parts, editor.method.parts.mlp(layer), layer, [rows[:1]], replay=False)
    still, pushed = (forward(value + torch.zeros_like(forward.initial_BD)) for value in (0.0, 5.0))
    return not torch.equal(still, pushed)


ASKED = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")


@pytest.mark.parametrize("mode", ["autocast", "inference_mode"])
def test_modes_of_torch_that_change_an_edit_are_refused(mode: str) -> None:
    editor = editor_of()
    edit = editor.compute(ASKED)
    before = editor.fingerprint()
    asked: list[Callable[[], Any]] = [
        *(editor_of, lambda: editor.compute(ASKED), lambda: editor.compute_each([ASKED])),
        *(lambda: editor.commit(edit), editor.perplexity, lambda: editor.examine(ASKED)),
        *(lambda: editor.applied(edit).__enter__(), lambda: editor.revert(edit), editor.revert_all),
    ]
    for ask in asked:
        block: Any = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()
        with pytest.raises(ConfigError, match=f"inside torch.{mode}"), block:
            ask()
    assert editor.fingerprint() == before
    with torch.no_grad():
        assert editor.compute(ASKED).sha256() == edit.sha256()


def test_a_model_made_for_inference_alone_is_refused() -> None:
    with torch.inference_mode():
        model = build("llama")
    with pytest.raises(ModelError, match="was made inside torch"):
        BaseEditor(rome_hparams((model, tokenizer())))
