"""How much memory a run will need: an estimate from shapes alone. No weight is loaded, nothing is measured.

Axes: K key width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.base.hparams import HyperParams
from easyeditor.evaluate.perplexity import TOKENS_PER_FORWARD
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.budget import PLANNED, USUAL_TOKENS, token_bytes
from easyeditor.lm.checks import check_config
from easyeditor.lm.discover import anatomy
from easyeditor.methods.registry import method_class

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
SOLVE = 3  # matrices (K, K) besides the statistics while one is factored: itself, its factor, both packed in one


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes, by what takes them."""

    weights: int
    edited: int
    """Copies of the edited weights and their updates; for trained weights also gradient and Adam's moments."""
    statistics: int
    """Matrices (K, K) in float64: those that live at every layer of a sequence (`MemoryNeeds`), and three at work."""
    batch: int
    """The larger of a forward and a value search, of as many tokens as `lm.budget.tokens_for` lets run together."""
    hypernetwork: int
    """Networks of the method's own; with `training` also gradient, Adam's moments and what is kept of the requests."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.edited + self.statistics + self.batch + self.hypernetwork


def estimate(
    config: PretrainedConfig,
    hparams: HyperParams,
    *,
    training: bool = False,
    gpu: bool = True,
    free: int | None = None,
) -> MemoryEstimate:
    """The memory of a run with these hyper-parameters on a model of this shape.

    `free` bytes on GPUs: where no `batch_tokens` is given, half of what weights leave of them is planned for a batch.
    """
    values = hparams.to_dict()
    parts = on_meta(config)
    model, layers = parts.model, [n for n in values.get("layers", []) if n < config.num_hidden_layers]
    size = _bytes(values, config)
    d, v, count = config.hidden_size, config.vocab_size, config.num_hidden_layers
    k = parts.key_width(0)
    names = values.get("inner_params") or [parts.weight_name(layer) for layer in layers]
    edited = sum(model.get_parameter(name.removesuffix(".weight") + ".weight").numel() for name in names)
    method = method_class(hparams.alg_name)
    needs = method.memory(hparams, parts, training=training)
    weights = sum(p.numel() for p in model.parameters()) * size
    forward, search = (token_bytes(size, d, k, v, count, gradients=gradients) for gradients in (False, True))
    given = values["batch_tokens"]
    tokens = given or TOKENS_PER_FORWARD["cuda"] if gpu else min(given or USUAL_TOKENS, TOKENS_PER_FORWARD["cpu"])
    batch = max(tokens * forward, max(1, (given or USUAL_TOKENS) // method.gradient_cost) * search)
    if gpu and free is not None and given is None and not training:  # a step of training takes `batch_size` requests
        batch = max(int(PLANNED * (free - weights)), search)
    return MemoryEstimate(
        weights=weights,
        edited=edited * (size + needs.of_edited),
        statistics=(len(layers) * needs.matrices + SOLVE) * k * k * 8 if needs.matrices else 0,
        batch=batch,
        hypernetwork=needs.network,
    )


def report(hparams: HyperParams, folder: Path, *, training: bool = False) -> dict[str, Any]:
    """The estimate for the model in `folder` against what is free now, as plain data; where it does not fit, what to
    change."""
    return _compared(
        hparams.device,
        hparams.model_parallel,
        folder,
        lambda gpu, free: estimate(config_in(folder), hparams, training=training, gpu=gpu, free=free),
    )


def collecting(parts: Anatomy, layers: Sequence[int], *, tokens: int, sums: str) -> MemoryEstimate:
    """The memory of a pass over a corpus (`stats.collect`), in batches of `tokens`: at every layer totals and the sums
    of a window; of the model in float32 what one block makes."""
    width = parts.model.get_input_embeddings().weight.shape[1]
    keys = [parts.key_width(layer) for layer in layers]
    return MemoryEstimate(
        weights=4 * sum(p.numel() for p in parts.model.parameters()),
        edited=0,
        statistics=sum(k * k * (8 + (8 if sums == "float64" else 4)) for k in keys),
        batch=tokens * token_bytes(4, width, max(keys), 0, 1, gradients=False),
        hypernetwork=0,
    )


def collecting_report(
    parts: Anatomy, folder: Path, layers: Sequence[int], *, device: int | str, spread: bool, tokens: int, sums: str
) -> dict[str, Any]:
    """`report` of a collection; `spread` is model_parallel."""
    return _compared(device, spread, folder, lambda *_: collecting(parts, layers, tokens=tokens, sums=sums))


def config_in(folder: Path) -> PretrainedConfig:
    """The language model's config in a folder. Raises many kinds where that is damaged."""
    check_config(str(folder))
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


def on_meta(config: PretrainedConfig, **templates: str | None) -> Anatomy:
    """The parts of a model of this shape, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return anatomy(model, **templates)


def _compared(
    device: int | str,
    model_parallel: bool,
    folder: Path,
    estimated: Callable[[bool, int], MemoryEstimate],
) -> dict[str, Any]:
    try:
        cards = _cards(device, model_parallel)
        free = sum(int(torch.cuda.mem_get_info(card)[0]) for card in cards) if cards else available()
    except Exception as error:  # torch raises many kinds for a device that is not there
        return {"estimate_gib": None, "why": f"the free memory of device {device!r}: {type(error).__name__}"}
    try:
        made = estimated(bool(cards), free)
    except Exception as error:  # a config that is wrong fails in many ways; the run itself says how
        told = f": {error}" if isinstance(error, ModelError) else ""
        return {
            "estimate_gib": None,
            "why": f"{folder}: no model whose memory can be estimated ({type(error).__name__}{told})",
        }
    spread = bool(cards) and not model_parallel and torch.cuda.device_count() > 1
    parts = {key: round(getattr(made, key) / GIB, 3) for key in MemoryEstimate.__dataclass_fields__}
    return {
        "estimate_gib": {**parts, "total": round(made.total / GIB, 3)},
        "free_gib": round(free / GIB, 3),
        "advice": None if made.total <= free else advice(made, spread=spread),
    }


def advice(made: MemoryEstimate, *, spread: bool = True) -> str:
    """What to change where memory does not do: what takes the most, first. `spread`: are there cards to spread over?"""
    over = ", model_parallel: true spreads them over cards" if spread else ""
    causes = {
        "weights": f"dtype: bfloat16 halves the weights of float32{over}",
        "batch": "a batch halves by itself when memory runs out; a smaller batch_tokens saves the tries",
        "statistics": "fewer layers, or mom2_adjustment: false where the method allows it",
        "edited": "fewer layers or inner_params",
        "hypernetwork": "a smaller rank, fewer inner_params, or a smaller cache_mb",
    }
    most = sorted(causes, key=lambda key: -int(getattr(made, key)))[:2]
    return "it may not fit: " + "; ".join(causes[key] for key in most)


def _bytes(values: Mapping[str, Any], config: PretrainedConfig) -> int:
    name = "float16" if values.get("fp16") else values.get("dtype", "float32")
    dtype = config.dtype or torch.float32 if name == "auto" else getattr(torch, name)
    return int(torch.empty(0, dtype=dtype).element_size())


def _cards(device_name: int | str, model_parallel: bool) -> list[torch.device]:
    """The cards that the model is loaded on; none: the CPU."""
    if not torch.cuda.is_available():
        return []
    count, name = torch.cuda.device_count(), str(device_name)
    if model_parallel:
        return [torch.device("cuda", n) for n in range(count)]
    device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"there are {count} GPUs")
    return [device] if device.type == "cuda" else []


def available() -> int:
    """Bytes that a CPU's processes can have: what the kernel says it can give, else the pages that nothing uses."""
    if MEMINFO.exists():
        lines = (line.split() for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        found = {words[0]: int(words[1]) for words in lines if len(words) > 1}
        if "MemAvailable:" in found:
            return found["MemAvailable:"] * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
