"""The reference implementation's own numbers (../shared/golden) and its tiny models, read once."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyeditor import EditRequest

MODELS = ["tiny-gpt2", "tiny-llama"]
TOLERANCE = 1e-5  # ten times tighter than asked; the reference itself is 2e-6 from float64


@lru_cache
def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@lru_cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name)


@lru_cache
def pair(name: str) -> tuple[Any, Any]:
    folder = GOLDEN / "models" / name
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def request(number: int) -> EditRequest:
    raw = read("inputs.json")["requests"][number]
    return EditRequest.make(raw["prompt"], subject=raw["subject"], target_new=raw["target_new"], case_id=raw["id"])
