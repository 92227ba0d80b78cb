"""The values that travel between the folders: requests (request.py), weight deltas, traces, results. All frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import parse_json, to_json, write_json, write_tensors
from easyeditor.base.reading import open_tensors, read_tensors, read_text
from easyeditor.values.record import LayerNumbers
from easyeditor.values.request import EditRequest as EditRequest
from easyeditor.values.request import Probe as Probe
from easyeditor.values.texts import is_text

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

EDIT_FORMAT = 1  # version of the saved-edit layout


@dataclass(frozen=True, kw_only=True)
class WeightDelta:
    """A change to one parameter: either `full`, or the product `left @ right` (low rank).

    All shapes are in the parameter's own orientation: `full` (rows, columns); `left` (rows, r), `right` (r, columns).
    For an nn.Linear weight rows are outputs, for a GPT-2 Conv1D weight rows are inputs.
    """

    name: str
    left: Tensor | None = None
    right: Tensor | None = None
    full: Tensor | None = None

    def __post_init__(self) -> None:
        low_rank = self.left is not None and self.right is not None
        assert low_rank != (self.full is not None), "give either left and right, or full"

    @staticmethod
    def of(
        name: str,
        left_Dr: Tensor,
        right_rK: Tensor | None = None,
        *,
        transposed: bool,
        dtype: dtype | None = None,
        contiguous: bool = False,
        smaller: bool = False,
    ) -> WeightDelta:
        """The change `left_Dr @ right_rK` (outputs D, inputs K), or `left_Dr` (D, K) alone, as a change of a weight.

        The weight is stored as (K, D) where `transposed`. Factors keep their memory layout unless `contiguous`;
        `smaller`: one matrix where the factors would have more numbers.
        """
        if right_rK is not None and smaller and left_Dr.numel() + right_rK.numel() > len(left_Dr) * right_rK.shape[1]:
            left_Dr, right_rK = left_Dr @ right_rK, None
        if right_rK is None:
            return WeightDelta(name=name, full=(left_Dr.T if transposed else left_Dr).to(dtype).contiguous())
        factors = (right_rK.T, left_Dr.T) if transposed else (left_Dr, right_rK)
        left, right = (f.to(dtype).contiguous() if contiguous else f.to(dtype) for f in factors)
        return WeightDelta(name=name, left=left, right=right)

    def dense(self, on: device | None = None) -> Tensor:
        """The whole change, in the weight's own orientation (rows, columns), made `on` a device (None: where it lies).

        Factors are laid out anew, so that a change that was saved and loaded is the same to the last bit.
        """
        if self.full is not None:
            return self.full.to(on)
        assert self.left is not None
        assert self.right is not None
        return self.left.to(on).contiguous() @ self.right.to(on).contiguous()

    def norm(self) -> float:
        """Frobenius norm of the change, in float64; for factors without making the product."""
        if self.full is not None:
            return float(self.full.double().norm())
        assert self.left is not None
        assert self.right is not None
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """The stored factors by name."""
        named = {"left": self.left, "right": self.right, "full": self.full}
        return {key: value for key, value in named.items() if value is not None}

    def save(self, path: str | Path) -> None:
        """Write this delta as one safetensors file, the parameter's name in its metadata."""
        write_tensors(Path(path), self.tensors(), {"name": self.name})

    @staticmethod
    def load(path: str | Path) -> WeightDelta:
        """Read what `save` wrote. Raises DataError if the file is not such a delta."""
        from safetensors import SafetensorError

        try:
            with open_tensors(Path(path)) as opened:
                name = (opened.metadata() or {}).get("name")
            tensors = read_tensors(Path(path))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: not a readable weight delta ({error})") from error
        return _checked_delta(name, tensors, str(path))


@dataclass(frozen=True, kw_only=True)
class LayerTrace(LayerNumbers):
    """What one edit did at one layer: its numbers, and the vectors that the papers plot.

    `vectors` (u, v, target, target_init; `key` is the bare prompt's, `prefixed_key` the mean over contexts) are in
    float32, on the CPU. A method that spreads an edit over layers has them, and `residual`, at the last one alone.
    """

    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def without_keys(
        cls, *, before: float, after: float, steps: int, delta_norm: float, losses: Sequence[float] = ()
    ) -> LayerTrace:
        """The trace of a method that has no keys and values: the request's loss and the size of the change."""
        return cls(
            numerator_norm=None,
            denominator=None,
            key_norm=None,
            prefixed_key_norm=None,
            value_norm_before=None,
            value_norm_after=None,
            loss_first=before,
            loss_last=after,
            steps=steps,
            delta_norm=delta_norm,
            losses=tuple((loss,) for loss in losses),
        )

    def numbers(self) -> LayerNumbers:
        """The trace without its vectors."""
        return LayerNumbers(**{f.name: getattr(self, f.name) for f in fields(LayerNumbers)})


EditTrace = Mapping[int, LayerTrace]


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """An edit as a value: computed on an unchanged model; apply it with `editor.applied` or `editor.commit`.

    `deltas` are added in order; `traces` has one mapping layer -> LayerTrace per request. `memory` is what the method
    must know of the edit when it makes later ones, once this one is committed. An edit that writes no weight has
    `facts`, a text for each request, which its method puts before questions. `folder` is where it is saved and stays,
    if it does: what is needed again is read there.
    """

    method: str
    requests: tuple[EditRequest, ...]
    deltas: tuple[WeightDelta, ...]
    traces: tuple[EditTrace, ...]
    contexts: tuple[str, ...] = ()
    seconds: float = 0.0
    model_fingerprint: str | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def trace(self) -> EditTrace:
        """The trace of the only request; with several requests use `traces`."""
        if len(self.traces) != 1:
            raise DataError(f"this edit holds {len(self.traces)} requests; read result.traces[i]")
        return self.traces[0]

    def trace_json(self) -> list[dict[str, dict[str, Any]]]:
        """Traces with layer numbers as text, as result files have them."""
        return [{str(layer): t.to_json() for layer, t in trace.items()} for trace in self.traces]

    def sha256(self) -> str:
        """Hash of the change itself: deltas with their bits, memory and facts; not of time or contexts."""
        import torch

        named = [(f"{d.name} {key}", value) for d in self.deltas for key, value in sorted(d.tensors().items())]
        named += [(f"memory {key}", value) for key, value in sorted(self.memory.items())]
        digest = hashlib.sha256()
        for name, tensor in named:
            digest.update(to_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update("".join(to_json(["fact", fact]) for fact in self.facts).encode())
        return digest.hexdigest()

    def check_weights(self, where: str, what: str) -> None:
        """Raise DataError for an edit that changes no weight: there is nothing to `what`."""
        if not self.deltas:
            raise DataError(
                f"{where}: an edit of {self.method} is a memory of facts that are put before questions; it changes no "
                f"weight, so there is nothing to {what}"
            )

    def save(self, folder: str | Path) -> Path:
        """Write the edit as `edit.safetensors` + `edit.json`; loadable with `load`, revertible with `editor.revert`."""
        folder = Path(folder)
        tensors = {f"{i}.{key}": value for i, delta in enumerate(self.deltas) for key, value in delta.tensors().items()}
        description = {
            "format": EDIT_FORMAT,
            "method": self.method,
            "model_fingerprint": self.model_fingerprint,
            "deltas": [{"name": d.name, "tensors": sorted(d.tensors())} for d in self.deltas],
            "requests": [r.to_json() for r in self.requests],
            "trace": self.trace_json(),
            "contexts": list(self.contexts),
            "seconds": self.seconds,
            "hparams": dict(self.hparams),
            "memory": sorted(self.memory),
            **({"facts": list(self.facts)} if self.facts else {}),
        }
        tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.items()}
        write_tensors(folder / "edit.safetensors", tensors)
        write_json(folder / "edit.json", description)
        return folder

    @staticmethod
    def load(folder: str | Path) -> EditResult:
        """Read what `save` wrote. Raises DataError with the reason if the folder is not a whole saved edit."""
        from safetensors import SafetensorError

        folder = Path(folder)
        try:
            raw = parse_json(read_text(folder / "edit.json"))
            tensors = read_tensors(folder / "edit.safetensors")
            if raw["format"] != EDIT_FORMAT:
                raise DataError(f"{folder}: saved edit of format {raw['format']!r}; this version reads {EDIT_FORMAT}")
            _check_description(raw, set(tensors))
            deltas = tuple(
                _checked_delta(d["name"], {key: tensors[f"{i}.{key}"] for key in d["tensors"]}, str(folder))
                for i, d in enumerate(raw["deltas"])
            )
            memory = {name: tensors[f"memory.{name}"] for name in raw["memory"]}
            if wrong := [name for name, value in memory.items() if not _is_finite(value)]:
                raise ValueError(f"memory {wrong[0]!r} holds NaN or infinity")
            return EditResult(
                method=raw["method"],
                requests=tuple(EditRequest.from_json(r) for r in raw["requests"]),
                deltas=deltas,
                traces=tuple(
                    {int(n): LayerTrace.from_json(layer) for n, layer in trace.items()} for trace in raw["trace"]
                ),
                contexts=tuple(raw["contexts"]),
                seconds=raw["seconds"],
                model_fingerprint=raw["model_fingerprint"],
                hparams=raw["hparams"],
                memory=memory,
                facts=tuple(raw.get("facts", ())),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, DataError) as error:
            raise DataError(
                f"{folder}: not a whole saved edit ({type(error).__name__}: {error}); it needs edit.json and "
                "edit.safetensors as --save-edit writes them"
            ) from error


def _checked_delta(name: Any, tensors: dict[str, Tensor], where: str) -> WeightDelta:
    """A delta read from a file. Raises DataError unless it is a whole weight, or the factors of one matrix."""
    kinds = {key: f"{value.dtype} {tuple(value.shape)}" for key, value in tensors.items()}
    whole = tensors.keys() == {"full"} or (
        tensors.keys() == {"left", "right"} and tensors["left"].shape[-1] == tensors["right"].shape[:1].numel()
    )
    shaped = all(value.ndim == 2 or (key == "full" and value.ndim > 0) for key, value in tensors.items())
    numbers = len({value.dtype for value in tensors.values()}) == 1 and all(map(_is_numbers, tensors.values()))
    if not isinstance(name, str) or not whole or not shaped or not numbers:
        raise DataError(
            f"{where}: not a weight delta (a weight or two factors: not empty, finite, one dtype of 16 bits or more): "
            f"name {name!r}, tensors {kinds}; it is damaged, or no edit of ours"
        )
    return WeightDelta(name=name, **tensors)


def _is_numbers(value: Tensor) -> bool:
    return value.is_floating_point() and value.element_size() > 1 and value.numel() > 0 and _is_finite(value)


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _check_description(raw: Mapping[str, Any], tensors: set[str]) -> None:
    """Raise ValueError unless edit.json has the types that `save` writes, and a place for every tensor."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("deltas", "requests", "trace", "contexts", "memory"), list),
        **{"method": str, "seconds": (int, float), "model_fingerprint": (str, type(None)), "hparams": dict},
    }
    for key, kind in kinds.items():
        if not isinstance(raw[key], kind):
            raise ValueError(f"{key} is {raw[key]!r:.40}")
    facts = raw.get("facts", [])
    if not raw["deltas"] and not facts:
        raise ValueError("it changes no weight (no deltas), and has no facts")
    if not raw["requests"]:
        raise ValueError("it is of no request")
    if not all(isinstance(text, str) for text in raw["contexts"]):
        raise ValueError("contexts are not texts")
    if facts and not (isinstance(facts, list) and len(facts) == len(raw["requests"]) and all(map(is_text, facts))):
        raise ValueError("facts are not a text for each request")
    placed = {f"{i}.{key}" for i, delta in enumerate(raw["deltas"]) for key in delta["tensors"]}
    if surplus := tensors - placed - {f"memory.{name}" for name in raw["memory"]}:
        raise ValueError(f"tensor {min(surplus)!r} belongs to no delta")
