"""One door for models: a name, a folder or a (model, tokenizer) pair; one door each for device and dtype."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from easyeditor.base.errors import ConfigError, ModelError, OutputError
from easyeditor.base.fetch import hub
from easyeditor.base.files import whole_folder, write_text
from easyeditor.lm import embedded
from easyeditor.lm.checks import (
    check_causal,
    check_config,
    check_in_memory,
    check_loaded,
    check_tokenizer,
    quantised_error,
)

LOG = logging.getLogger(__name__)

_WARNED: set[str] = set()


def load(
    name: Any,
    *,
    device: int | str = 0,
    dtype: str = "float32",
    fp16: bool = False,
    model_parallel: bool = False,
    quantised: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; a given pair is passed through as it is.

    `name` may be an embedded model's (lm/embedded.py; fetched on first use), a folder, or a hub name. `quantised`:
    weights that stay quantised will do, for what measures and does not edit.

    Raises:
        ModelError: nothing loadable there, a corrupt file, or quantised weights. ConfigError: no such device or dtype.
    """
    if not isinstance(name, (str, Path)):
        return _pair(name)
    if (known := embedded.find(str(name))) is not None:
        name = embedded.ensure(known)
    target = None if model_parallel else resolve_device(device)
    kind: Any = torch.float16 if fp16 else ("auto" if dtype == "auto" else getattr(torch, dtype))
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": False, "use_safetensors": True}
    if model_parallel:
        options["device_map"] = "auto"
    path = str(name)
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(f"{path}: no such model folder; put the checkpoint there or give a hub name")
    model, tok = _from_pretrained(AutoModelForCausalLM, path, options, "a causal language model", quantised=quantised)
    check_causal(path, model)
    return model if target is None or getattr(model, "is_quantized", False) else model.to(target), tok


def load_encoder_decoder(name: str, *, device: int | str = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder-decoder (T5) in float32 and its tokenizer, for experiments that look at its encoder.

    Raises:
        ModelError: nothing loadable there. ConfigError: no such device.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    target = resolve_device(device)
    model, tok = _from_pretrained(AutoModelForSeq2SeqLM, name, options, "an encoder-decoder")
    return model.to(target), tok


def _from_pretrained(
    kind: Any, path: str, options: dict[str, Any], what: str, *, quantised: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    packed: str | None = None
    try:
        with nullcontext() if os.path.exists(path) else hub():
            packed = check_config(path)
            tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client raise many kinds
        if packed is not None and not quantised:
            raise quantised_error(path, packed) from error
        where = "" if os.path.exists(path) else "; neither a folder here nor, as far as the hub answers, a name there"
        raise ModelError(f"{path}: cannot be loaded as {what} ({_reason(error)}){where}") from error
    if getattr(model, "is_quantized", False) and not quantised:
        raise quantised_error(path, packed)
    check_in_memory(path, model)
    check_loaded(path, model, report)
    check_tokenizer(path, model, tok)
    return model.eval(), tok


def save(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, folder: Path, texts: Mapping[str, str] | None = None
) -> None:
    """Write a full Hugging Face checkpoint, whole or not at all; `from_pretrained` loads it without this library.

    `texts` are further files by name (a model card).

    Raises:
        OutputError: the folder holds something already, or cannot be written.
    """
    try:
        with whole_folder(folder) as part:
            model.save_pretrained(part)
            tok.save_pretrained(part)
            for name, text in (texts or {}).items():
                write_text(part / name, text)
    except SafetensorError as error:
        raise OutputError(f"{folder}: the checkpoint cannot be written ({_reason(error)})") from error


def resolve_device(device: int | str) -> torch.device:
    """A GPU number or torch device text to a device. A number without any GPU means CPU, with one warning."""
    if isinstance(device, int) or str(device).isdigit():
        if not torch.cuda.is_available():
            _warn_once(f"device: {device} asks for a GPU and there is none; using the CPU")
            return torch.device("cpu")
        device = f"cuda:{device}"
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU is available")
        if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used ({_reason(error)}); try cpu or a GPU number") from error
    return found


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the embedding, whatever the device map."""
    return model.get_input_embeddings().weight.device


def _pair(pair: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model, tok = pair
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model_name must be a text or a (model, tokenizer) pair, found {type(pair).__name__}"
        ) from error
    if not isinstance(model, PreTrainedModel) or not isinstance(tok, PreTrainedTokenizerBase):
        found = f"({type(model).__name__}, {type(tok).__name__})"
        raise ConfigError(f"model_name must be a (model, tokenizer) pair from transformers, found {found}")
    name = str(model.config.name_or_path or type(model).__name__)
    if getattr(model, "is_quantized", False):
        raise quantised_error(name, getattr(model, "quantization_method", "quantised"))
    check_in_memory(name, model)
    check_tokenizer(name, model, tok)
    return model, tok


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        LOG.warning(text)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
