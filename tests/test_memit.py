"""MEMIT against the reference's numbers, batched against one at a time, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, relative, rome_hparams, same, states, tokenizer
from golden_numbers import MODELS, TOLERANCE, as_stored, folder, pair, read, request, solved, tensors

from easyeditor import BaseEditor, EditRequest, MEMITHyperParams
from easyeditor.base.errors import ConfigError, DataError, StatsError
from easyeditor.lm.discover import anatomy
from easyeditor.lm.weights import applied
from easyeditor.methods.memit.method import MEMIT
from easyeditor.methods.rome.method import ROME
from easyeditor.stats.gather import gather

LAYERS = (2, 3, 4)


def golden_method(model: str, **changes: Any) -> MEMIT:
    inputs = read("inputs.json")
    values = {
        **inputs["hparams"]["MEMIT"][model],
        "stats_dir": str(folder() / "stats"),
        "context_templates": inputs["context_templates_memit"],
        **changes,
    }
    return MEMIT(*pair(model), MEMITHyperParams.from_dict(values))


@pytest.mark.parametrize("replay", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["replay", "plain"])
@pytest.mark.parametrize(("batch", "numbers"), [("batch6", range(6)), ("batch1", [1])])
@pytest.mark.parametrize("model", MODELS)
def test_targets_keys_and_deltas(model: str, batch: str, numbers: Any, replay: bool) -> None:
    golden = tensors(f"memit_{model}.safetensors")
    before = states(pair(model)[0])
    method = golden_method(model, replay=replay)
    seen = solved(method)
    result = method.edit([request(n) for n in numbers])
    assert same(pair(model)[0], before)
    targets = torch.stack([trace[4].vectors["target"] for trace in result.traces])
    assert relative(targets, golden[f"f32/{batch}/z"]) < TOLERANCE
    for delta, layer in zip(result.deltas, LAYERS, strict=True):
        assert relative(seen[layer][0], golden[f"f32/{batch}/layer{layer}/keys"]) < TOLERANCE
        residuals, adjusted = (golden[f"f32/{batch}/layer{layer}/{part}"] for part in ("resid", "adj_k"))
        written = as_stored(residuals.T @ adjusted, pair(model)[0], delta.name)
        assert relative(delta.dense(), written) < TOLERANCE
    for trace, rows in zip(result.traces, read(f"memit_{model}.json")[f"f32/{batch}"]["trajectory"], strict=True):
        assert len(trace[4].losses) == len(rows)
        for ours, theirs in zip(trace[4].losses, rows, strict=True):
            assert ours == pytest.approx(theirs[:4], rel=1e-4, abs=2e-5)


def test_an_edit_carries_the_vectors_of_its_last_layer() -> None:
    """Of GPT-J's five layers all would be nearly a megabyte for each request of a batch."""
    method = golden_method("tiny-llama", v_num_grad_steps=2)
    seen = solved(method)
    result = method.edit([request(n) for n in (1, 2)])
    for n, trace in enumerate(result.traces):
        assert [len(trace[layer].vectors) for layer in LAYERS] == [0, 0, 5]
        assert torch.equal(trace[4].vectors["prefixed_key"], seen[4][0][n])
        assert torch.equal(trace[4].vectors["residual"], seen[4][1][n])
        assert all(trace[layer].prefixed_key_norm == pytest.approx(float(seen[layer][0][n].norm())) for layer in LAYERS)


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_a_batch_gives_what_one_at_a_time_gives_also_when_rows_leave(
    replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyeditor.methods.locate.value_search.STOP_LOSS", 5.0)
    settings = {"clamp_norm_factor": 4.0, "replay": replay}
    requests = [request(n) for n in (1, 2, 4, 5)]
    together = golden_method("tiny-llama", **settings).edit(requests)
    steps = [trace[4].steps for trace in together.traces]
    assert len(set(steps)) > 1, f"no row left before another ({steps}): the test tests nothing"
    for made, trace in zip(requests, together.traces, strict=True):
        alone = golden_method("tiny-llama", **settings).edit([made]).trace[4]
        assert alone.steps == trace[4].steps
        assert relative(trace[4].vectors["target"], alone.vectors["target"]) < 1e-4


@pytest.mark.parametrize("anchor", [False, True])
def test_edits_of_their_own_share_their_searches(anchor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests of mode single: one batch of searches, and what each alone gives."""
    changes = {"v_num_grad_steps": 6, "norm_anchor": anchor, "norm_anchor_value": 9.0}
    requests = [request(n) for n in (1, 2, 4)]
    alone = [golden_method("tiny-llama", **changes).edit([one]) for one in requests]
    together = golden_method("tiny-llama", **changes)
    searched: list[int] = []
    values = together.values
    monkeypatch.setattr(
        together, "values", lambda some, *rest, **how: searched.append(len(some)) or values(some, *rest, **how)
    )
    made = together.edit_each(requests)
    assert searched == [3]
    for one, result, wanted in zip(requests, made, alone, strict=True):
        assert result.requests == (one,)
        for layer in LAYERS:
            ours, theirs = result.trace[layer], wanted.trace[layer]
            assert torch.tensor(ours.losses) == pytest.approx(torch.tensor(theirs.losses), rel=1e-4, abs=2e-5)
            assert (len(ours.notes) > 0) == anchor
            assert ours.notes == pytest.approx(theirs.notes, rel=1e-4)
        for delta, other in zip(result.deltas, wanted.deltas, strict=True):
            assert relative(delta.dense(), other.dense()) < 1e-4


def test_saved_targets_are_read_and_belong_to_their_request(tmp_path: Any) -> None:
    settings = {"targets_dir": str(tmp_path / "z"), "v_num_grad_steps": 4}
    first = golden_method("tiny-gpt2", **settings).edit([request(1), request(2)])
    assert len(list((tmp_path / "z").iterdir())) == 2
    passes: list[str] = []
    again = golden_method("tiny-gpt2", **settings).edit([request(1)], lambda *step: passes.append(step[2]))
    assert passes == []
    assert torch.equal(again.traces[0][4].vectors["target"], first.traces[0][4].vectors["target"])
    other = EditRequest.make("The mother tongue of {} is", subject="Danielle Darrieux", target_new="Dutch")
    golden_method("tiny-gpt2", **settings).edit([other], lambda *step: passes.append(step[2]))
    assert passes


def test_rome_and_c_rome_share_saved_searches_and_another_start_does_not(tmp_path: Any) -> None:
    pair_ = (build("llama"), tokenizer())
    made = EditRequest.make("{} was developed by", subject="Xbox", target_new="Apple")

    def run(**changes: Any) -> tuple[Any, int]:
        passes: list[str] = []
        hparams = rome_hparams(pair_, **{"targets_dir": str(tmp_path), "v_num_grad_steps": 3, **changes})
        result = ROME(*pair_, hparams).edit([made], lambda *step: passes.append(step[2]))
        return result, len(passes)

    (rome, searched), (again, repeated), (c_rome, shared) = run(), run(), run(if_c_rome=True)
    assert (searched, repeated, shared) == (3, 0, 0)
    assert torch.equal(rome.deltas[0].dense(), again.deltas[0].dense())
    plain, searched = run(if_c_rome=True, targets_dir=None)
    assert searched == 3
    assert relative(plain.deltas[0].dense(), c_rome.deltas[0].dense()) < 1e-5  # its keys came with the search
    for other in ({"if_c_rome": True, "consistent_value": True}, {"layers": [2]}, {"v_lr": 0.1}):
        assert run(**other)[1] == 3, other


def test_a_search_behind_a_bos_is_not_one_without(tmp_path: Any) -> None:
    """The same model, request and contexts, and other tokens."""
    made = EditRequest.make("{} was developed by", subject="Xbox", target_new="Apple")
    counts = []
    for tok in (tokenizer(), tokenizer(bos=True), tokenizer(), tokenizer(bos=True)):
        passes: list[str] = []
        pair_ = (build("llama"), tok)
        hparams = rome_hparams(pair_, targets_dir=str(tmp_path), v_num_grad_steps=3)
        ROME(*pair_, hparams).edit([made], lambda *step, passes=passes: passes.append(step[2]))
        counts.append(len(passes))
    assert counts == [3, 3, 0, 0]


def tiny_hparams(**changes: Any) -> MEMITHyperParams:
    values = {
        "model_name": (build("llama"), tokenizer()),
        "layers": [1, 2],
        "v_num_grad_steps": 3,
        "v_lr": 0.5,
        "v_loss_layer": 3,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 0.75,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "mom2_update_weight": 10,
    }
    return MEMITHyperParams.from_dict({**values, **changes})


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_one_layer_writes_its_target_also_where_a_norm_follows_the_mlp(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to hold in place and one context, the edited model's value is the target that was searched."""
    monkeypatch.setattr(MEMIT, "prepare", lambda self: None)
    monkeypatch.setattr(MEMIT, "unedited", lambda self, layer, keys_KN: keys_KN * 1e9)
    pair_ = build(kind), tokenizer()
    hparams = tiny_hparams(
        model_name=pair_, layers=[1], context_templates=["{}"], v_num_grad_steps=8, clamp_norm_factor=4.0, kl_factor=0.0
    )
    made = EditRequest.make("{} was developed by", subject="Xbox", target_new="Apple")
    method = MEMIT(*pair_, hparams)
    result = method.edit([made])
    (trace,) = result.traces[0].values()
    with applied(pair_[0], result.deltas):
        again = method.edit([made]).traces[0][1]
    assert relative(trace.vectors["target"], trace.vectors["target_init"]) > 0.1
    assert relative(again.vectors["target_init"], trace.vectors["target"]) < 1e-3
    assert again.loss_first < trace.loss_first - 0.1


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"mom2_update_weight": 0}, "mom2_update_weight is 0.0"),
        ({"mom2_adjustment": False}, "MEMIT needs statistics"),
        ({"layers": [2, 1]}, "ascending"),
        ({"layer_selection": "random"}, "layer_selection is 'random'"),
    ],
)
def test_settings_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        tiny_hparams(**changes)


def test_missing_statistics_are_named_before_any_search(tmp_path: Any) -> None:
    hparams = tiny_hparams(stats_dir=str(tmp_path))
    made = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")
    with pytest.raises(StatsError, match=r"mlp\.down_proj_float32_mom2_100000\.npz.*python -m easyeditor\.stats"):
        MEMIT(*hparams.model_name, hparams).edit(
            [made], lambda *_: pytest.fail("searched before statistics were there")
        )


def test_batch_edit_repeats_collisions_and_contradictions(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    hparams = tiny_hparams(
        stats_dir=str(tmp_path), ppl_sentence_num=0, device="cpu", context_templates=["{}", "So. {}"]
    )
    parts, tok = anatomy(hparams.model_name[0]), hparams.model_name[1]
    corpus = tmp_path / "own.txt"
    corpus.write_text("\n".join(["Some words about a place by the sea, and others."] * 70), encoding="utf-8")
    editor = BaseEditor(hparams)
    keys = {layer: editor.method.statistics.key(layer) for layer in (1, 2)}  # type: ignore[attr-defined]
    gather(parts, tok, keys, corpus=str(corpus), sums="float64")
    for key in keys.values():
        with np.load(key.paths[0]) as archive:
            arrays = dict(archive)
        arrays["mom2.mom2"] = arrays["mom2.mom2"] + np.eye(len(arrays["mom2.mom2"]), dtype=np.float32)
        np.savez(key.paths[0], **arrays)  # a text this small does not fill the space of keys
    before = states(editor.model)
    prompts = ["Bay is in", "Roland speaks", "Bay is in", "Bay was found by"]
    targets, subjects = ["Italy", "Dutch", "Italy", "Nell"], ["Bay", "Roland", "Bay", "Bay"]
    records, model, copy = editor.batch_edit(prompts, targets, subject=subjects, verbose=False)
    assert same(model, before)
    assert copy == {}
    together = [record["trace"] for record in records]
    records, model, copy = editor.batch_edit(
        prompts, targets, subject=subjects, keep_original_weight=False, verbose=False
    )
    assert [record["trace"] for record in records] == together
    assert [r["requested_rewrite"]["prompt"] for r in records] == prompts
    assert "request 2 repeats 0" in caplog.text
    assert "share the subject 'Bay'" in caplog.text
    assert not same(model, before)
    assert set(copy) == {parts.weight_name(1), parts.weight_name(2)}
    editor.revert_all()
    assert same(model, before)
    text = "Roland came to Bay and was"  # two facts in one prompt: each record carries its own subject's trace
    two, _, _ = editor.batch_edit([text, text], ["Italy", "Dutch"], subject=["Roland", "Bay"], verbose=False)
    assert two[0]["trace"]["1"]["key_norm"] != two[1]["trace"]["1"]["key_norm"]
    editor.revert_all()
    editor.hparams.batch_size = 3  # chunk by chunk: the last fact is an edit of its own, on what the first ones left
    for sequential in (False, True):
        chunks, _, copy = editor.batch_edit(
            prompts, targets, subject=subjects, sequential_edit=sequential, verbose=False
        )
        assert [record["case_id"] for record in chunks] == [0, 1, 2, 3]
        assert (chunks[3]["just_before"] is not None) == sequential
        assert set(copy) == ({parts.weight_name(1), parts.weight_name(2)} if sequential else set())
        alone = editor.compute(EditRequest.make(prompts[3], subject=subjects[3], target_new=targets[3]))
        assert (chunks[3]["trace"] == alone.trace_json()[0]) != sequential
        editor.revert_all()
        assert same(model, before)
    editor.method.edit = None  # found before any batch is edited
    with pytest.raises(DataError, match="requests 3 and 4 contradict"):
        editor.batch_edit([*prompts, prompts[3]], [*targets, "Spain"], subject=[*subjects, subjects[3]], verbose=False)
    assert same(model, before)
