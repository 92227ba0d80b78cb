"""A decoder's parts found from its module tree; replay checked against the plain path on the very model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, MIXTURES, NOT_KNOWN, RECURRENT, build, rome_hparams, same, states, tokenizer
from script_runs import call, save_tiny, write_yaml
from strangers import CachedStranger, Pool, Stranger, StrangerConfig, stranger
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from easyeditor.analysis.safety import safety_of
from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.commands import analysis as analysis
from easyeditor.commands import mass_edit, single_case_edit
from easyeditor.commands import stats as stats
from easyeditor.commands import tune as tune
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.lm.architectures import attention_of
from easyeditor.lm.discover import anatomy, discover, module_name, replay_checked
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.prefixes import caches
from easyeditor.lm.tokens import model_inputs
from easyeditor.methods.locate.contexts import sample
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.registry import load_hparams
from easyeditor.tune.start import Start
from easyeditor.values.edit import EditRequest

BAY = EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy")

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


# What is no MLP


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_attention_is_no_mlp_however_wide_it_is(kind: str) -> None:
    assert discover(build(kind)).rewrite == "model.layers.{}.mlp.down_proj"
    with pytest.raises(ModelError, match=r"no MLP output.*self_attn.o_proj is no MLP's: self_attn mixes tokens"):
        discover(build("cohere2", intermediate_size=16))


DENSE = {"deepseek_v2": [0], "glm4_moe": [0, 1], "llama4_text": [0, 2], "jamba": [0, 2]}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_refused_by_name_and_dense_layers_found(kind: str) -> None:
    model = build(kind)
    if kind not in DENSE:
        for names in ({}, {"block": "model.layers.{}", "mlp": "model.layers.{}.mlp", "rewrite": "lm_head{}"}):
            with pytest.raises(ModelError, match=r"layer 0 is a mixture of experts \(\w+\.experts\): "):
                anatomy(model, **names)
        return
    parts = anatomy(model)
    assert parts.dense == DENSE[kind]
    assert parts.key_width(parts.dense[-1]) == 48
    with pytest.raises(ModelError, match=rf"layer {len(parts.blocks) - 1} is a mixture.*: {str(DENSE[kind])[1:-1]}$"):
        parts.check_layers([0, len(parts.blocks) - 1])
    with pytest.raises(ModelError, match="layer 3 is a mixture"):
        parts.rewrite(3)


@pytest.mark.parametrize("listed", [True, False])
def test_experts_that_no_name_tells_are_found_by_their_shape(listed: bool) -> None:
    model = stranger(Stranger)
    for tier in model.trunk.tiers[:2]:
        tier.wide, tier.narrow = Pool(listed), nn.Identity()
    with pytest.raises(ModelError, match=rf"layer 1 is a .* \(wide.{'many' if listed else 'inner'}\).*: 2$"):
        anatomy(model).check_layers([1])


def test_every_script_says_which_layer_is_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "moe", "qwen3_moe")
    yaml = write_yaml(tmp_path / "rome.yaml", model, ppl_sentence_num=0)
    facts = tmp_path / "facts.json"
    facts.write_text('[{"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}]', encoding="utf-8")
    for module, flags in (
        (single_case_edit, ["--hparams", yaml]),
        (mass_edit, ["--hparams", yaml, "--data", facts]),
        (tune, ["--model", model, "--output", tmp_path / "found.yaml"]),
        (stats, ["--hparams", yaml, "--layers", "1"]),
        (analysis, ["trace", "--hparams", yaml, "--output", tmp_path / "trace", "--kept", tmp_path / "kept"]),
    ):
        ran = call(module, flags, monkeypatch, capsys)
        assert ran.code == 2, ran.err
        assert "layer 0 is a mixture of experts (mlp.experts): " in ran.err
    planned = call(single_case_edit, ["--hparams", yaml, "--dry-run"], monkeypatch, capsys)
    assert "layer 0 is a mixture of experts" in planned.out + planned.err


def test_a_search_keeps_to_dense_layers() -> None:
    """Layers 0 and 2 of four are dense."""
    pair = (build("llama4_text"), tokenizer())
    parts = anatomy(pair[0])
    start = Start(
        method="ROME", model=pair[0], tok=pair[1], parts=parts, values={}, settings=None, own=False, span=2, notes=()
    )
    assert (start.allowed, start.layers(2), start.layers(1)) == ([0, 2], [0, 2], [0])
    editor = BaseEditor.from_hparams(rome_hparams(pair, layers=[2]))
    assert isinstance(editor.method, LocateMethod)
    assert [one.layer for one in safety_of(editor.method, [BAY])] == [0, 2]
    assert float(editor.compute(BAY).deltas[0].dense().norm()) > 0


# A state that is no key-value cache


def reread(model: Any, prompt: str, tokens: int) -> tuple[int, ...]:
    """The likeliest continuation, every token from the whole text."""
    start = ids = tokenizer()(prompt)["input_ids"]
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(**model_inputs([ids], torch.device("cpu")), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return tuple(ids[len(start) :])


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_model_without_a_key_value_cache_writes_what_it_reads_whole(kind: str) -> None:
    """And is edited, contexts and all, where it has an MLP or one is named."""
    pair = (build(kind), tokenizer())
    assert not caches(pair[0])
    prompts = ["The", "You and the old house", "Because"]
    made = generate(*pair, prompts, Decoding(tokens=5, eos=False))
    assert [one.ids for one in made] == [reread(pair[0], prompt, 5) for prompt in prompts]
    changes: dict[str, Any] = {"context_templates": None, "context_template_length_params": [[3, 5]]}
    if kind == "mamba":
        with pytest.raises(ModelError, match=r"no MLP output projection.*mixer mixes tokens") as caught:
            discover(pair[0])
        changes |= dict(text.split("=") for text in str(caught.value).partition("--set ")[2].split())
    for hparams in (rome_hparams(pair, **changes), {"alg_name": "FT", "num_steps": 2, "lr": 1e-3}):
        if isinstance(hparams, dict):
            names = {key: value for key, value in changes.items() if key.endswith("_tmp")}
            hparams = load_hparams({"model_name": pair, "device": "cpu", "layers": [1], **hparams, **names})
        editor = BaseEditor.from_hparams(hparams)
        record = editor.edit(BAY.prompt, BAY.target_new, subject=BAY.subject)[0][0]
        assert editor.edited
        assert record["post"]["rewrite_acc"] is not None


def test_contexts_of_a_model_are_the_same_with_a_cache_and_without() -> None:
    with_, without = (
        sample(stranger(kind), tokenizer(), ["The", "You"], 6, torch.Generator().manual_seed(0))
        for kind in (CachedStranger, Stranger)
    )
    assert with_ == without
