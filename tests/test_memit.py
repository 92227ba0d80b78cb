"""MEMIT against the reference's numbers, batched against one at a time, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GOLDEN, build, needs_shared, relative, same, states, tokenizer
from test_golden import MODELS, TOLERANCE, pair, read, request, tensors

from easyeditor import EditRequest, MEMITHyperParams
from easyeditor.errors import ConfigError, StatsError
from easyeditor.methods.memit.method import MEMIT

LAYERS = (2, 3, 4)


def golden_method(model: str, **changes: Any) -> MEMIT:
    inputs = read("inputs.json")
    values = {
        **inputs["hparams"]["MEMIT"][model],
        "stats_dir": str(GOLDEN / "stats"),
        "context_templates": inputs["context_templates_memit"],
        **changes,
    }
    return MEMIT(*pair(model), MEMITHyperParams.from_dict(values))


@needs_shared
@pytest.mark.parametrize("replay", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["replay", "plain"])
@pytest.mark.parametrize(("batch", "numbers"), [("batch6", range(6)), ("batch1", [1])])
@pytest.mark.parametrize("model", MODELS)
def test_targets_keys_and_deltas(model: str, batch: str, numbers: Any, replay: bool) -> None:
    golden = tensors(f"memit_{model}.safetensors")
    before = states(pair(model)[0])
    result = golden_method(model, replay=replay).edit([request(n) for n in numbers])
    assert same(pair(model)[0], before)
    targets = torch.stack([trace[4].vectors["target"] for trace in result.traces])
    assert relative(targets, golden[f"f32/{batch}/z"]) < TOLERANCE
    for delta, layer in zip(result.deltas, LAYERS, strict=True):
        keys = torch.stack([trace[layer].vectors["key"] for trace in result.traces])
        assert relative(keys, golden[f"f32/{batch}/layer{layer}/keys"]) < TOLERANCE
        assert relative(delta.dense(), golden[f"f32/{batch}/layer{layer}/delta_W"]) < TOLERANCE
    for trace, rows in zip(result.traces, read(f"memit_{model}.json")[f"f32/{batch}"]["trajectory"], strict=True):
        assert len(trace[4].losses) == len(rows)
        for ours, theirs in zip(trace[4].losses, rows, strict=True):
            assert ours == pytest.approx(theirs[:4], rel=1e-4, abs=2e-5)


@needs_shared
@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_a_batch_gives_what_one_at_a_time_gives_also_when_rows_leave(
    replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyeditor.methods.locate.targets.STOP_LOSS", 5.0)
    settings = {"clamp_norm_factor": 4.0, "replay": replay}
    requests = [request(n) for n in (1, 2, 4, 5)]
    together = golden_method("tiny-llama", **settings).edit(requests)
    steps = [trace[4].steps for trace in together.traces]
    assert len(set(steps)) > 1, f"no row left before another ({steps}): the test tests nothing"
    for made, trace in zip(requests, together.traces, strict=True):
        alone = golden_method("tiny-llama", **settings).edit([made]).trace[4]
        assert alone.steps == trace[4].steps
        assert relative(trace[4].vectors["target"], alone.vectors["target"]) < 1e-4


@needs_shared
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
