"""Models of known shapes with random weights, a tokenizer and requests of this repository's: nothing is fetched."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[1] / "data"
WORDS = 8000  # of the tokenizer: about as many tokens to a text as the models' own have
NOISE = 16_777_213  # random values drawn, repeated to fill a weight; prime, so that no two rows are alike
LLAMA = {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 8192, "rope_theta": 5e5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257}),
    "gptj-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400}),
    "llama3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128256, **LLAMA},
    ),
    "small": ("gpt2", {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": WORDS}),
}
LAYERS = {"gpt2-xl": [13, 14, 15, 16, 17], "gptj-6b": [3, 4, 5, 6, 7, 8], "llama3-8b": [4, 5, 6, 7, 8], "small": [2, 3]}
"""MEMIT's; ROME edits the last of them (the papers' choices, and EasyEdit's for Llama)."""
INNER = {
    "gpt2": ("transformer.h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_proj.weight"),
    "gptj": ("transformer.h.{}.mlp.fc_in.weight", "transformer.h.{}.mlp.fc_out.weight"),
    "llama": ("model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"),
}


def config_of(shape: str, blocks: int | None = None) -> PretrainedConfig:
    """A shape's configuration, with fewer blocks if asked."""
    kind, values = SHAPES[shape]
    depth = "num_hidden_layers" if kind == "llama" else "n_layer"
    return AutoConfig.for_model(kind, **{**values, depth: blocks or values[depth]})


def random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model on its device, matrices of small noise, norms 1, biases 0; no weight exists twice on the way."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                _fill(weight.view(-1), noise)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        model.tie_weights()
        _tables(model, config)
    return model.eval()


def _fill(flat: Tensor, noise: Tensor) -> None:
    for start in range(0, len(flat), NOISE):
        part = flat[start : start + NOISE]
        part.copy_(noise[: len(part)])


def _tables(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Rotary tables and masks, which no weight file holds, from a model of one block of the same widths."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 64
    tables = dict(AutoModelForCausalLM.from_config(small).named_buffers())
    for name, table in model.named_buffers():
        table.copy_(tables[re.sub(r"\.\d+\.", ".0.", name)])


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts in `data/`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*sentences(), *documents()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")


def sentences() -> list[str]:
    """The perplexity set."""
    return [item["Text"] for item in json.loads((DATA / "sentences_50.json").read_text(encoding="utf-8"))]


def documents(words: int = 400) -> list[str]:
    """Texts of about so many words: the prompts of all facts with their answers, one after another."""
    facts = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    said = [
        text for fact in facts for text in (*fact["paraphrase_prompts"], *fact["generation_prompts"]) if text.strip()
    ]
    flat = " ".join(f"{text}." for text in said).split()
    return [" ".join(flat[start : start + words]) for start in range(0, len(flat), words)]


def contexts(short: int, long: int) -> list[str]:
    """The bare prompt, and texts of five and of ten words before it, in place of generated ones."""
    found = ["{}"]
    for n, text in enumerate(sentences()[: short + long]):
        start = text.replace("{", "").replace("}", "").split()[: 5 if n < short else 10]
        found.append(" ".join(start) + ". {}")
    return found
