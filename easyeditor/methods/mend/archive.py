"""A trained hypernetwork on disk: archive.json (how it is built, for which model, how it was trained) and one
safetensors file that the JSON names, so that replacing the JSON replaces both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.base.files import read_json, write_json, write_tensors
from easyeditor.base.hparams import coerce, field_types
from easyeditor.base.reading import read_tensors
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.weights import alike, sample
from easyeditor.methods.mend.hparams import HOW, JSON, MENDHyperParams, find_archive
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_archive(
    folder: Path, hypernet: Hypernetwork, parts: Anatomy, *, training: Mapping[str, Any], dtype: str = "float32"
) -> Path:
    """Write an archive, whole or not at all; one already in `folder` is replaced. Normalisation statistics are part of
    it, in float32 whatever `dtype` the rest is stored in."""
    name = f"hypernet-{training.get('step', 0)}.safetensors"
    write_tensors(folder / name, {key: _stored(key, value, dtype) for key, value in hypernet.state_dict().items()})
    description = {
        "format": FORMAT,
        "method": "MEND",
        "tensors": name,
        "dtype": dtype,
        "network": hypernet.spec.to_json(),
        "inner_params": [{"name": w.name, "inputs": w.inputs, "outputs": w.outputs} for w in hypernet.weights],
        "model": {
            "name": Path(str(parts.model.config.name_or_path)).name,  # a folder elsewhere means nothing to a reader
            "class": type(parts.model).__name__,
            "weights": sample(parts.model),
        },
        "training": dict(training),
    }
    write_json(folder / JSON, description)
    for old in folder.glob("hypernet-*.safetensors"):
        if old.name != name:
            with suppress(OSError):
                old.unlink()
    return folder


def read_archive(name: str | None, parts: Anatomy, *, inner_params: list[str] | None = None) -> Hypernetwork:
    """The hypernetwork of an archive, in float32 on the model's device, in evaluation mode.

    `name` is a folder, looked for from here and then from the repository. `inner_params`, if given, must be the
    archive's.

    Raises:
        ConfigError: no archive there, or other weights named. ModelError: an archive of another model.
        DataError: a damaged archive.
    """
    folder = find_archive(name)
    raw = read_json(folder / JSON)
    try:
        if raw["format"] != FORMAT or raw["method"] != "MEND":
            raise DataError(
                f"format {raw['format']!r} of {raw['method']!r}; this version reads format {FORMAT} of MEND"
            )
        types = field_types(MENDHyperParams)
        spec = NetworkSpec(**{key: coerce(value, types[key], key) for key, value in raw["network"].items()})
        shapes = {w["name"]: (w["inputs"], w["outputs"]) for w in raw["inner_params"]}
        if Path(raw["tensors"]).name != raw["tensors"] or not shapes:
            raise ValueError(f"tensors {raw['tensors']!r}, {len(shapes)} weights: not a file's name, or no weight")
        model, tensors = raw["model"], read_tensors(folder / raw["tensors"])
        _check_size(spec, tensors)
        _check_model(folder, shapes, model, parts)
        _check_names(folder, list(shapes), inner_params)
        weights = edited_weights(parts, list(shapes))
        hypernet = Hypernetwork(spec, weights, edit_lr=0.0, generator=torch.Generator())
        fill(hypernet, tensors, str(folder))
    except (DataError, KeyError, TypeError, ValueError, OSError, SafetensorError, AttributeError, ConfigError) as error:
        if isinstance(error, ConfigError) and str(error).startswith("inner_params"):
            raise
        if isinstance(error, DataError) and str(error).startswith(str(folder)):
            raise
        raise DataError(f"{folder}: not a whole MEND archive ({type(error).__name__}: {error}); {HOW}") from error
    device = parts.model.get_parameter(weights[0].name).device
    return hypernet.to(device).eval()


def fill(hypernet: Hypernetwork, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put stored tensors into a hypernetwork.

    Raises:
        DataError: missing or surplus tensors, other shapes, non-finite numbers, normalisation never trained.
    """
    expected = hypernet.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors or key not in expected:
            found = "is missing" if key not in tensors else "is not part of such a network"
            raise DataError(f"{where}: tensor {key!r} {found}; the archive is damaged or was made with other settings")
        if tensors[key].shape != expected[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, {tuple(expected[key].shape)} is needed"
            raise DataError(f"{where}: tensor {key!r} has shape {shapes}; the archive was made with other settings")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise DataError(f"{where}: tensor {key!r} is not finite; {HOW}")
    hypernet.load_state_dict({key: value.to(expected[key].dtype) for key, value in tensors.items()})
    if not hypernet.trained:
        raise DataError(f"{where}: its normalisation has seen fewer than 2 tokens, so it was never trained; {HOW}")


def _check_size(spec: NetworkSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, before a network is built, for one that these tensors cannot be: it may claim a billion."""
    widest = max((size for tensor in tensors.values() if tensor.numel() for size in tensor.shape), default=0)
    if not 0 <= spec.n_hidden < len(tensors):
        raise ValueError(f"n_hidden is {spec.n_hidden}, and the archive holds {len(tensors)} tensors")
    if spec.hidden_dim is not None and not 0 < spec.hidden_dim <= widest:
        raise ValueError(f"hidden_dim is {spec.hidden_dim}, and the widest tensor has {widest}")
    if spec.rank is not None and spec.rank < 1:
        raise ValueError(f"rank is {spec.rank}")


def _check_model(folder: Path, shapes: Mapping[str, tuple[int, int]], made: Mapping[str, Any], parts: Anatomy) -> None:
    """Names and shapes first (another architecture), then the sample of weights (another checkpoint)."""
    kind = f"{type(parts.model).__name__} {parts.model.config.name_or_path!r}"
    trained = f"{folder}: trained for {made['class']} {made['name']!r}, not for this {kind}"
    try:
        present = {w.name: (w.inputs, w.outputs) for w in edited_weights(parts, list(shapes))}
    except ConfigError as error:
        raise ModelError(f"{trained} ({error}); {HOW}") from error
    for name, shape in shapes.items():
        if present[name] != shape:
            raise ModelError(f"{trained}: {name} maps {present[name]}, the archive edits {shape}; {HOW}")
    if made["weights"] is not None and not alike(sample(parts.model), made["weights"]):
        raise ModelError(f"{trained}: the weights differ; {HOW}")


def _check_names(folder: Path, archived: list[str], given: list[str] | None) -> None:
    if given is not None and set(given) != set(archived):
        differing = sorted(set(given) ^ set(archived))
        raise ConfigError(
            f"inner_params: {differing[0]} is named in only one of the YAML and {folder}, which edits {len(archived)} "
            "weights; leave inner_params out to edit those"
        )


def _stored(key: str, value: Tensor, dtype: str) -> Tensor:
    learned = key.endswith((".u", ".v", ".weight", ".bias"))
    return value.to(DTYPES[dtype]) if learned else value.float()
