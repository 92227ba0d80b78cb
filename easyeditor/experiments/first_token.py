"""The anomaly of first tokens: their keys against later tokens' keys, layer by layer, and what a prefix changes.

  python -m easyeditor.analysis first-token                       under a minute on two CPU cores: no value search
  python -m easyeditor.analysis first-token --encoder-decoder google-t5/t5-3b
        the same prompts through a T5 encoder, where attention looks both ways (any T5, mT5, umT5: a name or a folder)

Fall of ROME, section 4: in collapse cases the subject is a single token in first place, and its key lies far from the
keys of other tokens; first tokens of *normal* prompts show the same shift; with a prefix before it the collapse
prompt's key is ordinary; in an encoder (T5-3B) first and later tokens mix. "First token" is the first one the model
sees, a BOS where the tokenizer adds one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel

from easyeditor.base.errors import DataError
from easyeditor.base.places import declare
from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLUE, GREY, ORANGE, SKY, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools.lab import Lab, common_flags, set_flags
from easyeditor.experiments.tools.projection import cosine_distances, draw_planes, silhouette
from easyeditor.lm.architectures import Anatomy, encoder_projections
from easyeditor.lm.hooks import captured
from easyeditor.lm.loading import input_device, load_encoder_decoder
from easyeditor.lm.tokens import SLOT, encode, model_inputs, pad
from easyeditor.lm.weights import frozen
from easyeditor.methods.locate.rows import prompt_row

Array = np.ndarray[Any, np.dtype[Any]]
BORDER = 0.25  # silhouettes above: two clouds; below: mixed
PREFIXES = 3  # contexts put before each collapse prompt

LOOK: dict[str, dict[str, Any]] = {
    "first": {"label": "normal, first token", "color": BLUE, "marker": "s"},
    "later": {"label": "normal, later tokens", "color": SKY, "marker": "o", "line": "--"},
    "bare": {"label": "collapse, bare prompt", "color": VERMILLION, "marker": "^"},
    "prefixed": {"label": "collapse, behind a prefix", "color": ORANGE, "marker": "v", "line": ":"},
}


Clouds = dict[str, Array]
"""Keys (samples, L, K) by kind: first, later, and for a decoder bare and prefixed."""


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets, and an encoder-decoder to compare with."""
    common_flags(p)
    set_flags(p, limit=24)
    p.add_argument("--encoder-decoder", metavar="MODEL", help="a T5: folder or hub name, looked at as well")
    declare(p, "encoder_decoder")


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Capture the keys, compare and draw them."""
    lab = Lab.of(args)
    clouds = _decoder_clouds(lab)
    at = _at(clouds, lab.layer)
    tables = [
        _summary(at, "summary", f"keys at layer {lab.layer}"),
        _layer_table("layers", f"keys by layer (edited layer: {lab.layer})", clouds),
    ]
    drawn = {"first_token": _draw(clouds, lab.layer, lab.hparams.seed)}
    encoder_apart, because, result = None, "give --encoder-decoder MODEL", {}
    if args.encoder_decoder is not None:
        encoder = _encoder_clouds(args.encoder_decoder, lab)
        depth = encoder["first"].shape[1]
        middle = round(lab.layer / clouds["first"].shape[1] * depth)
        tables.append(_summary(_at(encoder, middle), "encoder", f"encoder, layer {middle}"))
        tables.append(_layer_table("encoder_layers", f"encoder of {args.encoder_decoder} by layer", encoder))
        drawn["encoder"] = _draw(encoder, middle, lab.hparams.seed)
        encoder_apart, because = _apart(_at(encoder, middle), f" at layer {middle}")
        result = {"encoder_decoder": args.encoder_decoder, "encoder_layer": middle}
    mixed = Finding(
        claim="In an encoder first and later tokens mix",
        holds=None if encoder_apart is None else encoder_apart <= BORDER,
        because=because,
    )
    return Outcome(
        tables=tables,
        figures=drawn,
        findings=[*_findings(at), mixed],
        look_for="first-token keys (squares) where the collapse keys (triangles up) are, away from later tokens "
        "(circles); prefixed collapse keys (triangles down) among the later ones.",
        **lab.recorded("first-token"),
        result=result,
    )


def _decoder_clouds(lab: Lab) -> Clouds:
    found: dict[str, list[Array]] = {kind: [] for kind in LOOK}
    tok, parts = lab.editor.tok, lab.method.parts
    texts = [context for context in lab.method.contexts if context != SLOT]
    if not texts:
        raise DataError("first-token needs contexts with text in them; context_templates has only '{}'")
    chosen = texts[:: max(1, len(texts) // PREFIXES)][:PREFIXES]
    with steps("keys of every token") as show:
        for number, (name, request) in enumerate(lab.requests, 1):
            if name == "normal":
                _add_tokens(found, decoder_keys(parts, encode(tok, request.prompt)))
            else:
                for context in (SLOT, *chosen):
                    row = prompt_row(tok, request, context, lab.hparams.fact_token)
                    keys_LTK = decoder_keys(parts, row.ids[: row.lookup + 1])
                    found["bare" if context == SLOT else "prefixed"].append(keys_LTK[:, row.lookup])
            show(number, len(lab.requests), name)
    return _stacked(found)


def _encoder_clouds(name: str, lab: Lab) -> Clouds:
    model, tok = load_encoder_decoder(name, device=lab.hparams.device)
    found: dict[str, list[Array]] = {"first": [], "later": []}
    for request in lab.normal.requests:
        _add_tokens(found, encoder_keys(model, encode(tok, request.prompt)))
    return _stacked(found)


def _add_tokens(found: dict[str, list[Array]], keys_LTK: Array) -> None:
    found["first"].append(keys_LTK[:, 0])
    found["later"] += list(keys_LTK[:, 1:].swapaxes(0, 1))


def _stacked(found: dict[str, list[Array]]) -> Clouds:
    if not all(found.values()):
        raise DataError(
            "the normal set's prompts have no second token, so there is nothing to compare first tokens with"
        )
    return {kind: np.stack(keys) for kind, keys in found.items()}


def _at(clouds: Clouds, layer: int) -> dict[str, Array]:
    """The keys (samples, K) of one layer."""
    return {kind: keys[:, layer] for kind, keys in clouds.items()}


def _norms(clouds: Clouds) -> dict[str, Array]:
    """Norm of each key (samples, L)."""
    return {kind: np.linalg.norm(keys, axis=2) for kind, keys in clouds.items()}


def _distances(clouds: Clouds) -> dict[str, Array]:
    """Cosine distance of each key from the mean later-token key of its layer (samples, L)."""
    centres_LK = clouds["later"].mean(0)
    return {
        kind: np.stack([cosine_distances(keys[:, n], centre_K) for n, centre_K in enumerate(centres_LK)], axis=1)
        for kind, keys in clouds.items()
    }


def _layer_table(name: str, title: str, clouds: Clouds) -> Table:
    measured = {"|key|": _norms(clouds), "distance": _distances(clouds)}
    rows = []
    for layer in range(clouds["first"].shape[1]):
        means = [float(keys[:, layer].mean()) for kinds in measured.values() for keys in kinds.values()]
        rows.append([layer, *means, silhouette(clouds["first"][:, layer], clouds["later"][:, layer])])
    columns = ["layer", *(f"{what} {kind}" for what in measured for kind in clouds), "silhouette first"]
    return Table.of(name, title, columns, rows, longest=0)


def _summary(at: dict[str, Array], name: str, title: str) -> Table:
    near = _near(at)
    rows = [
        [LOOK[kind]["label"], len(keys), float(np.linalg.norm(keys, axis=1).mean()), near[kind]]
        for kind, keys in at.items()
    ]
    columns = ["tokens", "keys", "mean norm", "mean cosine with the mean first-token key"]
    return Table.of(name, title, columns, rows)


def _near(at: dict[str, Array]) -> dict[str, float]:
    """Mean cosine of each kind's keys with the mean first-token key."""
    centre_K = at["first"].mean(0)
    return {kind: float(1 - cosine_distances(keys, centre_K).mean()) for kind, keys in at.items()}


def _apart(at: dict[str, Array], where: str = "") -> tuple[float | None, str]:
    """Silhouette of the first tokens among the later, and in words."""
    apart = silhouette(at["first"], at["later"])
    shown = f"silhouette of the first tokens {apart:.2f}{where}, border {BORDER}" if apart is not None else ""
    return apart, shown or "too few prompts"


def _findings(at: dict[str, Array]) -> list[Finding]:
    near, (apart, because) = _near(at), _apart(at)
    return [
        Finding(
            claim="First tokens of normal prompts have keys unlike later tokens'",
            holds=None if apart is None else apart > BORDER,
            because=because,
        ),
        Finding(
            claim="The keys of collapse cases are first-token keys",
            holds=near["bare"] > 0.5 > near["later"],
            because=f"mean cosine with the mean first-token key: collapse {near['bare']:.2f}, "
            f"later tokens {near['later']:.2f}",
        ),
        Finding(
            claim="A prefix before the prompt takes the collapse cases' keys back among ordinary ones",
            holds=near["prefixed"] < 0.5 < near["bare"],
            because=f"the same cosine: bare {near['bare']:.2f}, behind a prefix {near['prefixed']:.2f}",
        ),
    ]


def _draw(clouds: Clouds, layer: int, seed: int) -> Figure:
    titles = ["Key norm by layer", "Distance from the mean later-token key"]
    figure = canvas.panels([*titles, f"Layer {layer}, PCA", f"Layer {layer}, t-SNE"], columns=2)
    norm_ax, distance_ax, *planes = figure.get_axes()
    depth = range(clouds["first"].shape[1])

    def groups(values: dict[str, Array]) -> list[figures.Group]:
        return [figures.Group(values=values[kind], **LOOK[kind]) for kind in clouds]

    figures.curves(norm_ax, depth, groups(_norms(clouds)), "layer", "key norm (mean, min to max)")
    canvas.log_axis(norm_ax, "y")
    figures.curves(distance_ax, depth, groups(_distances(clouds)), "layer", "cosine distance")
    for ax in (norm_ax, distance_ax):
        ax.axvline(layer, color=GREY, linestyle=":", linewidth=1)
    draw_planes(planes, groups(_at(clouds, layer)), seed)
    canvas.legend_below(figure, norm_ax, len(clouds))
    return figure


def decoder_keys(parts: Anatomy, ids: Sequence[int]) -> Array:
    """Inputs (L, T, K) of every block's edited projection for one text."""
    modules = [parts.rewrite(layer) for layer in range(len(parts.blocks))]
    inputs = model_inputs([ids], input_device(parts.model))
    return _captured(parts.model, modules, {**inputs, "use_cache": False}, parts.model)


def encoder_keys(model: PreTrainedModel, ids: Sequence[int]) -> Array:
    """Inputs (L, T, K) of the encoder's MLP output projections for one text."""
    ids_1T, mask_1T = pad([ids], input_device(model))
    inputs = {"input_ids": ids_1T, "attention_mask": mask_1T}
    return _captured(model, encoder_projections(model), inputs, model.get_encoder())


@torch.no_grad()
def _captured(
    model: PreTrainedModel, modules: Sequence[nn.Module], inputs: dict[str, Any], forward: nn.Module
) -> Array:
    with frozen(model), ExitStack() as stack:
        seen = [stack.enter_context(captured(module)) for module in modules]
        forward(**inputs)
    return np.stack([own.given[0].float().cpu().numpy() for own in seen])
