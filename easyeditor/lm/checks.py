"""What makes a checkpoint a whole causal language model: transformers warns of most of this, or says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from easyeditor.base.errors import ConfigError, ModelError
from easyeditor.base.files import parse_json
from easyeditor.base.reading import MOST_TEXT, check_file, read_text
from easyeditor.lm.architectures import is_encoder, is_old_buffer
from easyeditor.lm.tokens import tell_unembedded

TEXTS = (".json", ".jinja", ".txt", ".model")  # what is read whole
MOST_LAYERS = 10_000  # far above any model's; a config that claims more would take for ever to build


def check_config(path: str) -> str | None:
    """Refuse, before anything is built, what config.json cannot mean. Returns the kind of quantisation, if any.

    Raises:
        ModelError: no layers or endless ones, or a quantisation that transformers would leave out.
    """
    _check_files(path)
    raw, _ = PretrainedConfig.get_config_dict(path)
    quantised = raw.get("quantization_config")
    kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    if quantised is not None:
        if isinstance(quantised, Mapping) and (quantised.get("load_in_4bit") or quantised.get("load_in_8bit")):
            kind = (
                "bitsandbytes_4bit" if quantised.get("load_in_4bit") else "bitsandbytes_8bit"
            )  # as transformers has it
        if not isinstance(kind, str) or kind not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise ModelError(
                f"{path}: quantization_config names the method {kind!r}, which transformers does not know ({known}); "
                "take an unquantised checkpoint"
            )
    layers = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().num_hidden_layers
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"{path}: num_hidden_layers is {layers!r} in config.json; allowed: 1 to {MOST_LAYERS}")
    return kind


def quantised_error(path: str, kind: object) -> ModelError:
    """An edit needs weights that numbers can be added to."""
    return ModelError(
        f"{path}: its weights are quantised ({kind}), and an edit is added to weights of full precision: edit the "
        "model that it was made from; ppl.py and python -m easyeditor.evaluate measure this one as it is"
    )


def _check_files(path: str) -> None:
    """Raise ModelError for a file of a model's folder that transformers must not open."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{path}: is not a folder; a model is a folder, or a name on the hub")
    for file in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        if file.suffix not in (".safetensors", *TEXTS) or not file.exists():
            continue
        try:
            check_file(file, MOST_TEXT if file.suffix in TEXTS else None)
            named = parse_json(read_text(file))["weight_map"] if file.name.endswith(".index.json") else {}
            if outside := [name for name in named.values() if Path(name).name != name]:
                raise ValueError(f"its weight_map names {outside[0]!r}, which is no file of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: {file.name} cannot be used: {error}") from error
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{path}: holds an adapter (adapter_config.json), whose model is elsewhere; merge the two first"
        )


def check_modes() -> None:
    """Raise ConfigError inside torch's autocast, which would compute an edit in a narrower dtype, or inference_mode,
    which lets nothing be computed."""
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ConfigError("inside torch.autocast edits and measurements are not the same; leave it, and load the dtype")
    if torch.is_inference_mode_enabled():
        raise ConfigError("inside torch.inference_mode no edit can be made; leave it (torch.no_grad may stay)")


def check_in_memory(path: str, model: PreTrainedModel) -> None:
    """Raise ModelError for weights that were left on disk or in the CPU's memory next to a GPU model: they are fetched
    for each forward, so an edit of them would be lost."""
    if any(weight.is_inference() for weight in model.parameters()):
        raise ModelError(f"{path}: was made inside torch.inference_mode, so it cannot be edited; load it outside")
    left = [name for name, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise ModelError(
            f"{path}: {len(left)} weights do not fit on the cards and are not in memory ({_first(left)}); use more or "
            "larger cards, a narrower dtype (dtype: bfloat16), or the CPU (device: cpu, model_parallel: false)"
        )


def check_loaded(path: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a model that does not hold exactly the checkpoint's tensors, all of them numbers.

    Raises:
        ModelError: tensors without a place, places without a tensor, NaN or infinity.
    """
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(f"{path}: the checkpoint lacks {len(lacking)} tensors ({_first(lacking)})")
    surplus = sorted(name for name in report["unexpected_keys"] if not is_old_buffer(name))
    if surplus:
        raise ModelError(
            f"{path}: the checkpoint holds {len(surplus)} tensors without a place in a {type(model).__name__} "
            f"({_first(surplus)}): it has parts that this class does not run (a vision tower, say), or config.json is "
            "not the one of these weights"
        )
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.element_size() > 1 and weight.numel() and not _finite(weight):
            raise ModelError(
                f"{path}: {name} holds NaN or infinity; the checkpoint is damaged, or its dtype too narrow"
            )


def check_causal(path: str, model: PreTrainedModel) -> None:
    """Raise ModelError for an encoder, whose tokens see those after them, so that it has no perplexity."""
    if is_encoder(model):
        kind = type(model).__name__
        raise ModelError(f"{path}: a {kind} is an encoder, whose tokens see those after them; give a causal model")


def check_tokenizer(path: str, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if the tokenizer gives ids the model has no embedding for. Special tokens may: only a text that
    holds one is refused."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    special = set(tok.all_special_ids)
    beyond = sorted(i for i in tok.get_vocab().values() if i >= rows)
    if unmeant := [i for i in beyond if i not in special]:
        raise ModelError(
            f"{path}: the tokenizer has {len(unmeant)} tokens (up to id {unmeant[-1]}) beyond the model's {rows} "
            "embeddings; it is another model's"
        )
    if beyond:
        tell_unembedded(tok, beyond)


@torch.no_grad()
def _finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight.detach())  # NaN passes through; no copy of the weight is made
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
