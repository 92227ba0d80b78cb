"""How much memory a run will need: an estimate from shapes alone. No weight is loaded, nothing is measured.

Axes: K key width, D model width, V vocabulary, L blocks, T tokens of a batch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from easyeditor.evaluate.perplexity import TOKENS_PER_FORWARD
from easyeditor.hparams import HyperParams
from easyeditor.lm.architectures import anatomy
from easyeditor.lm.budget import GRADIENT_COST, USUAL_TOKENS, block_values
from easyeditor.lm.checks import check_config

GIB = 2**30
SOLVE = 3  # matrices (K, K) beside the statistics while one is factored: itself, its factor, both packed in one


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, by what takes them."""

    weights: int
    edited: int
    """Copies of the edited weights and their updates; for trained weights also gradient and Adam's moments."""
    statistics: int
    """Matrices (K, K) in float64: those that live on at every layer of a sequence (`_matrices`), and three at work."""
    batch: int
    """The larger of a forward (logits and one block) and a value search (all blocks, with what gradients need)."""
    hypernetwork: int
    """MEND's: with `training` also gradient, Adam's moments and what is kept of the requests."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.edited + self.statistics + self.batch + self.hypernetwork


def estimate(config: PretrainedConfig, hparams: HyperParams, *, training: bool = False, gpu: bool = True) -> Estimate:
    """The memory of a run with these hyper-parameters on a model of this shape."""
    values = hparams.to_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts, layers = anatomy(model), [n for n in values.get("layers", []) if n < config.num_hidden_layers]
    size = _bytes(values, config)
    d, v, count = config.hidden_size, config.vocab_size, config.num_hidden_layers
    k = parts.key_width(0)
    names = values.get("inner_params") or [parts.weight_name(layer) for layer in layers]
    edited = sum(model.get_parameter(name.removesuffix(".weight") + ".weight").numel() for name in names)
    trained = values.get("num_steps") is not None  # fine-tuned: value, start, gradient, two moments in float32
    matrices = _matrices(values)
    tokens = TOKENS_PER_FORWARD["cuda" if gpu else "cpu"]
    per_token = block_values(d, k)
    search = (values["batch_tokens"] or USUAL_TOKENS) // GRADIENT_COST * count * per_token
    return Estimate(
        weights=sum(p.numel() for p in model.parameters()) * size,
        edited=edited * (size + (20 if trained else 4)),
        statistics=(len(layers) * matrices + SOLVE) * k * k * 8 if matrices else 0,
        batch=size * max(tokens * (v + per_token), search),
        hypernetwork=_hypernetwork(values, model, names, training=training) if "mlp_class" in values else 0,
    )


def report(hparams: HyperParams, folder: Path, *, training: bool = False) -> dict[str, Any]:
    """The estimate for the model in `folder` against what is free now, as plain data; where it does not fit, what to
    change."""
    try:
        check_config(str(folder))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        gpu = torch.cuda.is_available() and str(hparams.device) != "cpu"
        made = estimate(config, hparams, training=training, gpu=gpu)
        free = _free(gpu, hparams.device)
    except Exception as error:  # a config that is wrong fails in many ways; the run itself says how
        return {
            "estimate_gib": None,
            "why": f"{folder}: no model whose memory can be estimated ({type(error).__name__})",
        }
    parts = {key: round(getattr(made, key) / GIB, 3) for key in Estimate.__dataclass_fields__}
    return {
        "estimate_gib": {**parts, "total": round(made.total / GIB, 3)},
        "free_gib": round(free / GIB, 3),
        "advice": None if made.total <= free else advice(made),
    }


def advice(made: Estimate) -> str:
    """What to change where memory does not do: what takes the most, first."""
    said = {
        "weights": "dtype: bfloat16 halves the weights of float32, model_parallel: true spreads them over cards",
        "batch": "a batch halves by itself when memory runs out; a smaller batch_tokens saves the tries",
        "statistics": "fewer layers, or mom2_adjustment: false where the method allows it",
        "edited": "fewer layers or inner_params",
        "hypernetwork": "a smaller rank, fewer inner_params, or a smaller cache_mb",
    }
    most = sorted(said, key=lambda key: -int(getattr(made, key)))[:2]
    return "it may not fit: " + "; ".join(said[key] for key in most)


def _matrices(values: Mapping[str, Any]) -> int:
    """How many matrices (K, K) a method holds at every layer once a sequence goes on."""
    projects = "nullspace_threshold" in values
    held = {
        "C, factored": values.get("mom2_adjustment") or values.get("mom2_update_weight"),
        "C and first tokens' moment, factored": values.get("protect_first_tokens"),
        "C + gamma I, factored": values.get("update_norm_lambda"),
        "AlphaEdit's P": projects,
        "the inverse with earlier keys": projects or values.get("earlier_keys", "forgotten") != "forgotten",
    }
    return sum(map(bool, held.values()))


def _bytes(values: Mapping[str, Any], config: PretrainedConfig) -> int:
    name = "float16" if values.get("fp16") else values.get("dtype", "float32")
    dtype = config.dtype or torch.float32 if name == "auto" else getattr(torch, name)
    return int(torch.empty(0, dtype=dtype).element_size())


def _hypernetwork(values: Mapping[str, Any], model: Any, names: list[str], *, training: bool) -> int:
    shapes = sorted({tuple(model.get_parameter(name).shape) for name in names} if values["shared"] else names)
    weights = 0
    for shape in shapes:
        a, b = shape if isinstance(shape, tuple) else model.get_parameter(shape).shape
        for width in [a + b] if values["combine"] else [a, b]:
            if values["mlp_class"] == "IDMLP":
                rank = min(values["rank"] or width, width)
                weights += (values["n_hidden"] + 1) * (2 * width * rank + width)
            else:
                sizes = [width] + [values["hidden_dim"] or 2 * width] * values["n_hidden"] + [width]
                weights += sum(x * y + y for x, y in itertools.pairwise(sizes))
    return 4 * weights * (4 if training else 1) + (values.get("cache_mb", 0) * 2**20 if training else 0)


def _free(gpu: bool, device: int | str) -> int:
    if gpu:
        return int(torch.cuda.mem_get_info(torch.device("cuda", int(str(device).removeprefix("cuda:") or 0)))[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
