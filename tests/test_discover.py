"""A decoder's parts found from its module tree; replay checked against the plain path on the very model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, build, rome_hparams, same, states, tokenizer
from strangers import CachedStranger, Stranger, StrangerConfig, stranger
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from easyeditor.easyedit import BaseEditor
from easyeditor.errors import ConfigError, ModelError
from easyeditor.lm.architectures import anatomy, attention_of
from easyeditor.lm.discover import discover, module_name, replay_checked
from easyeditor.methods.locate.method import LocateMethod

OTHERS: dict[str, dict[str, Any]] = {  # real types that the table has not, and their parts
    "stablelm": {"rewrite": "model.layers.{}.mlp.down_proj", "mlp": "model.layers.{}.mlp"},
    "starcoder2": {"rewrite": "model.layers.{}.mlp.c_proj", "mlp": "model.layers.{}.mlp"},
    "phi": {"rewrite": "model.layers.{}.mlp.fc2", "mlp": "model.layers.{}.mlp"},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_known_types_are_found_as_the_table_has_them(kind: str) -> None:
    model = build(kind)
    before, known = states(model), anatomy(model).architecture
    found = discover(model)
    assert (found.block, found.mlp, found.rewrite) == (known.block, known.mlp, known.rewrite)
    assert not found.replay
    parts = anatomy(model)
    unsure = type(parts)(model=model, architecture=found)
    checked, said = replay_checked(unsure)
    assert checked.architecture.replay
    assert "it is on" in said
    assert checked.architecture.mlp_adds == known.mlp_adds
    assert attention_of(parts, 0) is not None
    assert same(model, before)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_types_are_found(kind: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=400, num_hidden_layers=3, **small, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = discover(model)
    assert found.rewrite == OTHERS[kind]["rewrite"]
    assert found.mlp == OTHERS[kind]["mlp"]


@pytest.mark.parametrize(("kind", "on"), [(Stranger, False), (CachedStranger, True)])
def test_replay_is_on_only_where_it_gives_the_plain_numbers(kind: type[Stranger], on: bool) -> None:
    model = stranger(kind)
    found = discover(model)
    assert found.block == "trunk.tiers.{}"
    assert found.mlp == found.rewrite == "trunk.tiers.{}.narrow"
    checked, said = replay_checked(type(anatomy(build("llama")))(model=model, architecture=found))
    assert checked.architecture.replay is on
    assert ("it is on" in said) is on
    assert module_name(model, model.get_output_embeddings()) == "speak"


@pytest.mark.parametrize(("kind", "on"), [(Stranger, False), (CachedStranger, True)])
def test_a_method_asks_for_the_check(kind: type[Stranger], on: bool) -> None:
    names = {"rewrite_module_tmp": "trunk.tiers.{}.narrow", "mlp_module_tmp": "trunk.tiers.{}.narrow"}
    names["layer_module_tmp"] = "trunk.tiers.{}"
    pair = (stranger(kind), tokenizer())
    for replay, expected in (("check", on), (True, False), (False, False)):
        editor = BaseEditor.from_hparams(rome_hparams(pair, v_loss_layer=2, replay=replay, **names))
        assert isinstance(editor.method, LocateMethod)
        assert editor.method.parts.architecture.replay is expected
    with pytest.raises(ConfigError, match="replay is 'maybe'"):
        rome_hparams(pair, replay="maybe")


def without_mlp() -> Stranger:
    model = stranger(Stranger)
    for tier in model.trunk.tiers:
        tier.wide = tier.narrow = nn.Identity()
    return model


class Headless(Stranger):
    """No output head."""

    def get_output_embeddings(self) -> Any:
        return None


class Listless(Stranger):
    """No list of blocks."""

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.trunk.tiers = nn.Sequential(*self.trunk.tiers)


class Shy(Stranger):
    """A forward that does not take positions."""

    def forward(self, input_ids: torch.Tensor, **_others: Any) -> Any:
        raise RuntimeError("only odd lengths")


def uneven() -> Stranger:
    model = stranger(Stranger)
    model.trunk.tiers[1].narrow = nn.Sequential(model.trunk.tiers[1].narrow)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without_mlp, "no MLP output projection"),
        (lambda: stranger(Headless), "no output head"),
        (lambda: stranger(Listless), "no list of blocks"),
        (lambda: stranger(Shy), "only odd lengths"),
        (uneven, "tiers.1 has no projection narrow"),
    ],
)
def test_what_cannot_be_found_is_said(make: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        discover(make())
