"""Checkpoints that transformers loads and that are no whole causal language model: refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, tokenizer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from script_runs import call, save_tiny, stand_in, write_yaml
from transformers import BertConfig, BertForMaskedLM

from easyeditor.base.errors import DataError, ModelError
from easyeditor.commands import ppl, single_case_edit
from easyeditor.dataset.reader import read_dataset
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.loading import load


def configured(**changes: Any) -> Callable[[Path], None]:
    """A damage: other values in config.json."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**raw, **changes}), encoding="utf-8")

    return spoil


def weighted(name: str, value: float) -> Callable[[Path], None]:
    """A damage: one number of one tensor is another."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[-1] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def encoder_only(folder: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertForMaskedLM(BertConfig(vocab_size=400, **shape)).save_pretrained(folder)


def smaller_vocabulary(folder: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)


def indexed(file: Any) -> Callable[[Path], None]:
    """A damage: the weights are shards, and the index names another file for one of them."""

    def spoil(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors"), folder.parent / "elsewhere.safetensors", {"format": "pt"})
        (folder / "model.safetensors").unlink()
        named = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder.parent / "elsewhere.safetensors"), file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(named))

    return spoil


def unreadable(name: str, kind: str) -> Callable[[Path], None]:
    """A damage: something else than a regular file of a bounded size."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        stand_in(folder / name, kind)

    return spoil


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder), "r": 1}))


WEIGHT = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        pytest.param(configured(num_hidden_layers=2), "without a place", id="fewer-layers"),
        pytest.param(configured(num_hidden_layers=0), "num_hidden_layers", id="no-layers"),
        pytest.param(configured(num_hidden_layers=-1), "num_hidden_layers", id="minus-one-layers"),
        pytest.param(configured(num_hidden_layers=10**9), "num_hidden_layers", id="a-billion-layers"),
        pytest.param(configured(vocab_size=10**12), "./m", id="endless-vocabulary"),
        pytest.param(configured(quantization_config={"quant_method": "zipped"}), "zipped", id="unknown-quantisation"),
        pytest.param(configured(quantization_config={"bits": 4}), "quantization_config", id="nameless-quantisation"),
        pytest.param(configured(quantization_config="int4"), "quantization_config", id="quantisation-as-text"),
        pytest.param(encoder_only, "encoder", id="encoder-only"),
        pytest.param(smaller_vocabulary, "tokenizer", id="tokenizer-larger"),
        pytest.param(weighted(WEIGHT, float("nan")), WEIGHT, id="nan"),
        pytest.param(weighted(WEIGHT, float("inf")), WEIGHT, id="infinity"),
        pytest.param(weighted("model.norm.weight", float("-inf")), "model.norm.weight", id="norm"),
        pytest.param(indexed("../elsewhere.safetensors"), "weight_map names '../elsewhere", id="shard-above"),
        pytest.param(indexed("/elsewhere.safetensors"), "weight_map names '/elsewhere", id="shard-by-path"),
        pytest.param(indexed(5), "index.json cannot be used", id="shard-without-name"),
        pytest.param(
            unreadable("model.safetensors", "fifo"), "model.safetensors cannot be used: it is a FIFO", id="fifo"
        ),
        pytest.param(unreadable("config.json", "zero"), "config.json cannot be used: it is a device", id="zero"),
        pytest.param(unreadable("tokenizer.json", "huge"), "tokenizer.json cannot be used: it has", id="huge"),
        pytest.param(unreadable("chat_template.jinja", "fifo"), "chat_template.jinja cannot", id="template"),
        pytest.param(adapted, "holds an adapter", id="adapter"),
    ],
)
def test_what_is_no_whole_causal_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(save_tiny(tmp_path / "m"))
    with pytest.raises(ModelError, match=r"^\./m: ") as error:
        load("./m", device="cpu")
    assert part in str(error.value)


def quantised(folder: Path, **config: Any) -> Path:
    configured(quantization_config=config)(save_tiny(folder))
    return folder


@pytest.mark.parametrize(
    ("config", "kind", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes_4bit", "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes_8bit", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "gptq", "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, "awq", "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "compressed-tensors"),
    ],
)
def test_quantised_weights_are_measured_and_not_edited(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    kind: str,
    package: str,
) -> None:
    """None of the packages is here: what measures names it, what edits says what to edit instead."""
    monkeypatch.chdir(tmp_path)
    model = quantised(tmp_path / "m", **config)
    refused = call(single_case_edit, ["--hparams", write_yaml(tmp_path / "rome.yaml", model)], monkeypatch, capsys)
    assert refused.code == 2
    assert f"its weights are quantised ({kind})" in refused.err
    assert "edit the model that it was made from" in refused.err
    assert "install" not in refused.err
    measured = call(ppl, ["--model", model], monkeypatch, capsys)
    assert (measured.code, "pip install" in measured.err, package in measured.err) == (2, True, True), measured.err


def test_what_transformers_dequantises_is_measured_and_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 on a CPU; and a pair that stays quantised is refused."""
    monkeypatch.chdir(tmp_path)
    model = quantised(tmp_path / "m", quant_method="fp8")
    assert call(ppl, ["--model", model, "--device", "cpu"], monkeypatch, capsys).code == 0
    pair = load(str(model), device="cpu")
    pair[0].is_quantized = True
    with pytest.raises(ModelError, match="its weights are quantised"):
        load(pair)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"])
def test_a_mask_kept_by_an_old_checkpoint_has_no_place_and_needs_none(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path / "m", "gpt2")
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file({**tensors, name: torch.ones(1, 1, 4, 4)}, tmp_path / "m/model.safetensors", {"format": "pt"})
    load(tmp_path / "m", device="cpu")


def test_a_special_token_beyond_the_vocabulary_is_nothing_a_prompt_needs(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "m")
    tok = type(tokenizer()).from_pretrained(save_tiny(tmp_path / "other"))
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tok.save_pretrained(tmp_path / "m")
    load(tmp_path / "m", device="cpu")


def image_pair(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer knows `<image>`, and whose model has no row for it."""
    tok = type(tokenizer()).from_pretrained(save_tiny(tmp_path / "m"))
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tok.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("flag", ["--prompt", "--target-new", "--locality-prompt"])
def test_a_text_with_a_token_that_has_no_embedding_is_one_line(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = write_yaml(tmp_path / "h.yaml", image_pair(tmp_path), ppl_sentence_num=0)
    texts = {"--prompt": "The capital of France is", "--subject": "France", "--target-new": "Rome"}
    texts |= {"--locality-prompt": "The sea is", "--locality-ground-truth": "blue"}
    texts[flag] = f"{texts[flag]} <image>"
    monkeypatch.chdir(tmp_path)
    flags = [word for pair in texts.items() for word in pair]
    ran = call(single_case_edit, ["--hparams", yaml, *flags], monkeypatch, capsys)
    assert (ran.code, ran.out) == (2, "")
    assert "the token '<image>' (id 400), for which the model has no embedding" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_a_pair_from_python_is_told_so_too(tmp_path: Path) -> None:
    model, tok = load(image_pair(tmp_path), device="cpu")
    again = type(tok).from_pretrained(tmp_path / "m")
    for pair in ((model, tok), (model, again)):
        model, tok = load(pair, device="cpu")
        with pytest.raises(DataError, match="the token '<image>'"):
            generate(model, tok, ["a <image>"], Decoding(tokens=2))
        assert generate(model, tok, ["a"], Decoding(tokens=2))


def test_without_a_network_a_mistyped_name_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(ModelError, match=r"^gpt2-xll: .*hub"):
        load("gpt2-xll", device="cpu")
    with pytest.raises(DataError, match=r"^zsree: .*Hub"):
        read_dataset("zsree")
    assert not constants.HF_HUB_OFFLINE
