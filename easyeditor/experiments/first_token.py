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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.errors import DataError
from easyeditor.base.places import declare
from easyeditor.base.progress import steps
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome, ResultTable
from easyeditor.drawing.palette import BLUE, GREY, ORANGE, SKY, VERMILLION
from easyeditor.experiments.tools.capture import decoder_keys, encoder_keys
from easyeditor.experiments.tools.lab import Lab, common_flags, set_flags
from easyeditor.experiments.tools.projection import cosine_distances, pca_plane, silhouette, tsne_plane, unit
from easyeditor.lm.loading import load_encoder_decoder
from easyeditor.lm.tokens import SLOT, encode
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


@dataclass(frozen=True)
class Clouds:
    """Keys (samples, L, K) by kind: first, later, and for a decoder bare and prefixed."""

    keys: dict[str, Array]

    def at(self, layer: int) -> dict[str, Array]:
        """The keys (samples, K) of one layer."""
        return {kind: keys[:, layer] for kind, keys in self.keys.items()}

    @property
    def layers(self) -> int:
        """Number of layers L."""
        return int(self.keys["first"].shape[1])

    def norms(self) -> dict[str, Array]:
        """Norm of each key (samples, L)."""
        return {kind: np.linalg.norm(keys, axis=2) for kind, keys in self.keys.items()}

    def distances(self) -> dict[str, Array]:
        """Cosine distance of each key from the mean later-token key of its layer (samples, L)."""
        centres_LK = self.keys["later"].mean(0)
        return {
            kind: np.stack(
                [cosine_distances(keys[:, layer], centres_LK[layer]) for layer in range(self.layers)], axis=1
            )
            for kind, keys in self.keys.items()
        }


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
    tables = [_summary(clouds.at(lab.layer), f"keys at layer {lab.layer}")]
    tables += [_layer_table("layers", f"keys by layer (edited layer: {lab.layer})", clouds)]
    drawn = {"first_token": _draw(clouds, lab.layer, lab.hparams.seed)}
    findings = _findings(clouds.at(lab.layer))
    result = {}
    if args.encoder_decoder is not None:
        encoder = _encoder_clouds(args.encoder_decoder, lab)
        middle = round(lab.layer / clouds.layers * encoder.layers)
        tables.append(_summary(encoder.at(middle), f"encoder, layer {middle}", "encoder"))
        tables.append(_layer_table("encoder_layers", f"encoder of {args.encoder_decoder} by layer", encoder))
        drawn["encoder"] = _draw(encoder, middle, lab.hparams.seed)
        findings.append(_encoder_finding(encoder.at(middle), middle))
        result = {"encoder_decoder": args.encoder_decoder, "encoder_layer": middle}
    else:
        findings.append(
            Finding(
                claim="In an encoder first and later tokens mix", holds=None, because="give --encoder-decoder MODEL"
            )
        )
    return Outcome(
        tables=tables,
        figures=drawn,
        findings=findings,
        look_for="first-token keys (squares) where the collapse keys (triangles up) are, away from later tokens "
        "(circles); prefixed collapse keys (triangles down) among the later ones.",
        config=lab.config(),
        manifest=lab.manifest("first-token"),
        result=result,
    )


def _decoder_clouds(lab: Lab) -> Clouds:
    first: list[Array] = []
    later: list[Array] = []
    bare: list[Array] = []
    prefixed: list[Array] = []
    tok, parts, token = lab.editor.tok, lab.method.parts, lab.hparams.fact_token
    texts = [context for context in lab.method.contexts if context != SLOT]
    if not texts:
        raise DataError("first-token needs contexts with text in them; context_templates has only '{}'")
    chosen = texts[:: max(1, len(texts) // PREFIXES)][:PREFIXES]
    with steps("keys of every token") as show:
        for number, request in enumerate(lab.normal.requests, 1):
            keys_LTK = decoder_keys(parts, encode(tok, request.prompt))
            first.append(keys_LTK[:, 0])
            later += list(keys_LTK[:, 1:].swapaxes(0, 1))
            show(number, len(lab.normal.requests) + len(lab.collapse.requests), "normal")
        for number, request in enumerate(lab.collapse.requests, len(lab.normal.requests) + 1):
            for context in (SLOT, *chosen):
                row = prompt_row(tok, request, context, token)
                key_LK = decoder_keys(parts, row.ids[: row.lookup + 1])[:, row.lookup]
                (bare if context == SLOT else prefixed).append(key_LK)
            show(number, len(lab.normal.requests) + len(lab.collapse.requests), "collapse")
    kinds = {"first": first, "later": later, "bare": bare, "prefixed": prefixed}
    return Clouds({kind: _stacked(keys) for kind, keys in kinds.items()})


def _encoder_clouds(name: str, lab: Lab) -> Clouds:
    model, tok = load_encoder_decoder(name, device=lab.hparams.device)
    first, later = [], []
    for request in lab.normal.requests:
        keys_LTK = encoder_keys(model, encode(tok, request.prompt))
        first.append(keys_LTK[:, 0])
        later += list(keys_LTK[:, 1:].swapaxes(0, 1))
    return Clouds({"first": _stacked(first), "later": _stacked(later)})


def _stacked(keys: Sequence[Array]) -> Array:
    if not keys:
        raise DataError(
            "the normal set's prompts have no second token, so there is nothing to compare first tokens with"
        )
    return np.stack(keys)


def _layer_table(name: str, title: str, clouds: Clouds) -> ResultTable:
    norms, distances = clouds.norms(), clouds.distances()
    kinds = list(clouds.keys)
    rows = []
    for layer in range(clouds.layers):
        at = clouds.at(layer)
        means = [float(values[kind][:, layer].mean()) for values in (norms, distances) for kind in kinds]
        rows.append([layer, *means, silhouette(at["first"], at["later"])])
    columns = ["layer", *(f"|key| {kind}" for kind in kinds), *(f"distance {kind}" for kind in kinds)]
    return ResultTable(name=name, title=title, columns=[*columns, "silhouette first"], rows=rows, printed=False)


def _summary(at: dict[str, Array], title: str, name: str = "summary") -> ResultTable:
    centre_K = at["first"].mean(0)
    rows = [
        [
            LOOK[kind]["label"],
            len(keys),
            float(np.linalg.norm(keys, axis=1).mean()),
            float(1 - cosine_distances(keys, centre_K).mean()),
        ]
        for kind, keys in at.items()
    ]
    columns = ["tokens", "keys", "mean norm", "mean cosine with the mean first-token key"]
    return ResultTable(name=name, title=title, columns=columns, rows=rows)


def _findings(at: dict[str, Array]) -> list[Finding]:
    centre_K = at["first"].mean(0)
    near = {kind: float(1 - cosine_distances(at[kind], centre_K).mean()) for kind in ("bare", "prefixed", "later")}
    apart = silhouette(at["first"], at["later"])
    shown = "too few prompts" if apart is None else f"silhouette of the first tokens {apart:.2f}, border {BORDER}"
    return [
        Finding(
            claim="First tokens of normal prompts have keys unlike later tokens'",
            holds=None if apart is None else apart > BORDER,
            because=shown,
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


def _encoder_finding(at: dict[str, Array], layer: int) -> Finding:
    apart = silhouette(at["first"], at["later"])
    shown = (
        "too few prompts"
        if apart is None
        else f"silhouette of the first tokens {apart:.2f} at layer {layer}, border {BORDER}"
    )
    holds = None if apart is None else apart <= BORDER
    return Finding(claim="In an encoder first and later tokens mix", holds=holds, because=shown)


def _draw(clouds: Clouds, layer: int, seed: int) -> Figure:
    titles = [
        "Key norm by layer",
        "Distance from the mean later-token key",
        f"Layer {layer}, PCA",
        f"Layer {layer}, t-SNE",
    ]
    figure = figures.panels(titles, columns=2)
    norm_ax, distance_ax, pca_ax, tsne_ax = figure.get_axes()
    depth = list(range(clouds.layers))
    norms, distances, at = clouds.norms(), clouds.distances(), clouds.at(layer)

    def groups(values: dict[str, Array]) -> list[Group]:
        return [Group(values=values[kind], **LOOK[kind]) for kind in clouds.keys]

    figures.bands(norm_ax, depth, groups(norms), "layer", "key norm (mean, min to max)")
    figures.log_scale(norm_ax, "y")
    figures.bands(distance_ax, depth, groups(distances), "layer", "cosine distance")
    for ax in (norm_ax, distance_ax):
        ax.axvline(layer, color=GREY, linestyle=":", linewidth=1)
    points = unit(np.concatenate(list(at.values())))
    plane, shares = pca_plane(points)
    cuts = np.cumsum([len(cloud) for cloud in at.values()])[:-1]
    shown = [(pca_ax, plane, f"PC 1 ({shares[0]:.0%} of variance)", f"PC 2 ({shares[1]:.0%})")]
    flat = tsne_plane(points, seed)
    if flat is not None:
        shown.append((tsne_ax, flat, "t-SNE 1", "t-SNE 2"))
    for ax, where, xlabel, ylabel in shown:
        figures.cloud(ax, groups(dict(zip(at, np.split(where, cuts), strict=True))), xlabel, ylabel)
    figures.legend_below(figure, norm_ax, len(clouds.keys))
    return figure
