"""`--dry-run`'s estimate against the memory of cards that are not there: what torch says of them is patched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, tokenizer

from easyeditor.commands import estimate as estimating
from easyeditor.commands.cli import memory
from easyeditor.commands.estimate import GIB, estimate
from easyeditor.lm.budget import PLANNED, tokens_for
from easyeditor.lm.discover import anatomy
from easyeditor.lm.loading import save
from easyeditor.methods.base import EditMethod, MemoryNeeds
from easyeditor.methods.mend.hparams import MENDHyperParams, MENDTrainingHparams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.registry import load_hparams
from easyeditor.methods.table import METHODS

FREE = [6 * GIB, 2 * GIB]


@pytest.fixture
def model(tmp_path: Path) -> str:
    save(build("llama"), tokenizer(), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def cards(model: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two cards, with so many bytes free; the model is made before torch is told of them."""
    free = list(FREE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 8 * GIB))
    return free


def rome(model: Any, **changes: Any) -> Any:
    values = {"alg_name": "ROME", "model_name": model, "layers": [1], "mom2_adjustment": False, "v_lr": 0.5}
    values |= {"v_num_grad_steps": 4, "v_loss_layer": 3, "v_weight_decay": 0.5, "clamp_norm_factor": 4}
    return load_hparams({**values, "kl_factor": 0.0625, **changes})


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, 6.0),
        ({"device": 1}, 2.0),
        ({"device": "cuda"}, 6.0),
        ({"device": "cuda:1"}, 2.0),
        ({"model_parallel": True}, 8.0),
        ({"model_parallel": True, "device": "cpu"}, 8.0),  # it goes over the cards, whatever `device` says
    ],
)
@pytest.mark.usefixtures("cards")
def test_free_is_what_the_cards_of_the_run_have(changes: dict[str, Any], free: float, model: str) -> None:
    said = memory(rome(model, **changes))
    assert said["free_gib"] == free
    assert said["advice"] is None


@pytest.mark.usefixtures("cards")
def test_a_run_on_the_cpu_has_the_cpus_memory(model: str) -> None:
    said = memory(rome(model, device="cpu"))
    assert said["free_gib"] == pytest.approx(estimating.available() / GIB, rel=0.2)


@pytest.mark.usefixtures("cards")
def test_a_card_that_is_not_there_is_said(model: str) -> None:
    for device in (2, "cuda:2", "nonsense"):
        said = memory(rome(model, device=device))
        assert said["estimate_gib"] is None
        assert "the free memory of device" in said["why"]
        assert "\n" not in said["why"]


def test_what_a_cpu_has_is_what_it_can_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the cache make way, so they count as free; without the kernel's word unused pages are all that is."""
    text = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"
    (tmp_path / "meminfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr("easyeditor.commands.estimate.MEMINFO", tmp_path / "meminfo")
    assert estimating.available() == 20_000_000 * 1024
    monkeypatch.setattr("easyeditor.commands.estimate.MEMINFO", tmp_path / "none")
    assert estimating.available() > 0


def test_a_batch_is_half_of_what_a_card_has_beside_the_weights() -> None:
    """As the run plans it, unless `batch_tokens` is given."""
    model, free = build("llama"), 10**8
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    made = estimate(model.config, rome("x"), free=free)
    assert made.batch == PLANNED * (free - weights)
    assert estimate(model.config, rome("x"), free=1).batch > 0
    without = estimate(model.config, rome("x"))
    assert estimate(model.config, rome("x", batch_tokens=8192), free=free) == without
    assert estimate(model.config, rome("x", batch_tokens=4096)).batch == without.batch // 2
    assert estimate(model.config, rome("x"), free=free, gpu=False).batch < without.batch


@pytest.mark.parametrize("given", [None, 320, 65536])
def test_the_tokens_of_a_batch_are_counted_as_the_run_counts_them(given: int | None) -> None:
    """Width 32, keys 48, four blocks, 400 words: logits and their float32 copies are in it."""
    model, free = build("llama"), 10**8
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    forward, search = (tokens_for(anatomy(model), given, gradients=g, free=free - weights) for g in (False, True))
    block = 4 * (8 * 32 + 4 * 48)
    by_hand = max(forward * (block + (4 + 4) * 400), search * (4 * block + (4 + 8) * 400))
    found = estimate(model.config, rome("x", batch_tokens=given), free=free).batch
    assert found == pytest.approx(by_hand, rel=1e-3)


class Toy(EditMethod[Any]):
    """A method that nothing else knows."""

    gradient_cost = 1

    @classmethod
    def memory(cls, hparams: Any, parts: Any, *, training: bool = False) -> MemoryNeeds:
        return MemoryNeeds(matrices=3, of_edited=100, network=7)


def test_a_method_says_itself_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("llama"), rome("x", batch_tokens=320)
    without = estimate(model.config, given)
    monkeypatch.setitem(METHODS, "ROME", replace(METHODS["ROME"], method="test_estimate:Toy"))
    made = estimate(model.config, given)
    assert made.hypernetwork == 7
    assert made.edited == 32 * 48 * (4 + 100)
    assert made.statistics == (1 * 3 + 3) * 48 * 48 * 8
    assert made.batch > without.batch  # 320 tokens with gradients, not 20


@pytest.mark.parametrize("kind", ["IDMLP", "MLP"])
def test_mends_networks_are_counted_as_they_are_built(kind: str) -> None:
    model, names = build("llama"), [f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)]
    values = {"alg_name": "MEND", "model_name": "x", "inner_params": names, "mlp_class": kind, "cache_mb": 3}
    given = MENDTrainingHparams.from_dict(values)
    built = Hypernetwork(
        NetworkSpec.of(given), edited_weights(anatomy(model), names), edit_lr=0.0, generator=torch.Generator()
    )
    size = 4 * sum(p.numel() for p in built.parameters())
    assert estimate(model.config, given, training=True).hypernetwork == 4 * size + 3 * 2**20
    edits = MENDHyperParams.from_dict({key: value for key, value in values.items() if key != "cache_mb"})
    assert estimate(model.config, edits).hypernetwork == size


@pytest.mark.parametrize("parallel", [False, True])
def test_who_has_spread_the_model_is_not_told_to_spread_it(parallel: bool, model: str, cards: list[int]) -> None:
    cards[:] = [10**5, 10**5]
    said = memory(rome(model, model_parallel=parallel, batch_tokens=1))
    assert said["free_gib"] == round((1 + parallel) * 10**5 / GIB, 3)
    assert said["advice"].startswith("it may not fit: dtype: bfloat16")
    assert ("model_parallel: true" in said["advice"]) is not parallel


def test_one_card_is_nothing_to_spread_over(model: str, cards: list[int]) -> None:
    cards[:] = [10**5]
    said = memory(rome(model, batch_tokens=1))
    assert "dtype: bfloat16" in said["advice"]
    assert "model_parallel" not in said["advice"]
