"""Makes the files of this folder from a folder of the reference's full numbers.

    python -m tests.golden.make FOLDER HPARAMS.json

Keeps what the tests read and what cannot be computed from the rest; README.md says what that is.
"""

from __future__ import annotations

import json
import lzma
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from tests.golden_numbers import HERE, MODELS, fold

XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lp": 2, "lc": 2, "pb": 2}  # for four-byte numbers
FORWARDS = ("denominator", "numerator_vec_norm", "target_ids", "lookup_idxs", "input_ids", "attention_lengths")
NEWER = ("alphaedit", "memit_seq", "emmet", "rrome", "encore", "nas", "post", "locft", "ultraedit")
NEWER_FOLDED = (
    *("delta_W", "keys_after", "keys", "values_grad", "cur_z", "residual_target", "v0"),
    *("adj_k", "resid", "key_mean", "cur_input", "cur_output", "target", "delta_total"),
)
DROPPED = ("trajectory", "vstar", "layers", "num_correct", "delta_norm", "init_norm", "batch_norms", "stats")
MEND_FULL = ("u_mean", "u_s", "v_mean", "v_s", ".k")

Tensors = dict[str, torch.Tensor]


def pack(name: str, content: bytes) -> None:
    """Write `content` as NAME.xz."""
    (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    (HERE / f"{name}.xz").write_bytes(lzma.compress(content, filters=[XZ]))


def pack_json(name: str, content: Any) -> None:
    pack(name, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())


def pack_tensors(name: str, content: Tensors) -> None:
    pack(name, save({key: content[key].contiguous() for key in sorted(content)}))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    """Stop where what is dropped does not follow from what is kept."""
    a, b = a.double(), b.double()
    if float((a - b).norm()) > tolerance * float(b.norm()):
        raise SystemExit(f"a dropped tensor differs by {float((a - b).norm() / b.norm()):.1e}")


def models(full: Path, name: str) -> None:
    source, target = full / "models" / name, f"models/{name}"
    for file in ("tokenizer.json", "model.safetensors"):
        pack(f"{target}/{file}", (source / file).read_bytes())
    for file in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, HERE / target / file)
    pack(f"mend_{name}_hypernet.safetensors", (full / f"mend_{name}_hypernet.safetensors").read_bytes())


def statistics(full: Path, name: str) -> dict[str, Any]:
    """The upper triangles of the sums; returns what the files hold besides."""
    kept, rest = {}, {}
    for file in sorted((full / "stats" / name / "wikipedia_stats").glob("*_float32_mom2_50.npz")):
        with np.load(file) as arrays:
            total = arrays["mom2.mom2"]
            if not np.array_equal(total, total.T):
                raise SystemExit(f"{file}: not symmetric")
            kept[file.name.removesuffix("_float32_mom2_50.npz")] = torch.from_numpy(total[np.triu_indices(len(total))])
            rest = {
                "count": int(arrays["mom2.count"]),
                "constructor": str(arrays["mom2.constructor"]),
                "sample_size": int(arrays["sample_size"]),
            }
    pack_tensors(f"stats_{name}.safetensors", kept)
    return rest


def losses(entry: dict[str, Any]) -> dict[str, Any]:
    """What the tests read of a ROME entry; a pass keeps total loss, nll, KL, decay."""
    kept = {key: entry[key] for key in ("overrides", "request", "post_ppl", *FORWARDS) if key in entry}
    errors = {key: value for key, value in entry.items() if key.endswith("_vs_f64")}
    return {**kept, **errors, "trajectory": [row[:4] for row in entry["trajectory"]]}


def rome(full: Path, stem: str) -> None:
    """u, v and target; the delta is their outer product."""
    meta, stored = (
        json.loads((full / f"{stem}.json").read_text(encoding="utf-8")),
        load_file(full / f"{stem}.safetensors"),
    )
    for key in (key for key in stored if key.startswith("f32/") and key.endswith("/delta_W")):
        entry = key.removesuffix("/delta_W")
        outer = torch.outer(stored[f"{entry}/v"], stored[f"{entry}/u"])
        close(outer if outer.shape == stored[key].shape else outer.T, stored[key], 1e-6)
    pack_tensors(f"{stem}.safetensors", {
        key: value for key, value in stored.items()
        if key.startswith("f32/") and key.rsplit("/", 1)[1] in ("u", "v", "target")
    })  # fmt: skip
    pack_json(f"{stem}.json", {key: losses(entry) for key, entry in meta.items() if key.startswith("f32/")})


def memit(full: Path, name: str) -> None:
    """z, keys, and each layer's delta as residual^T x adjusted keys."""
    meta = json.loads((full / f"memit_{name}.json").read_text(encoding="utf-8"))
    stored = load_file(full / f"memit_{name}.safetensors")
    kept = {}
    for key, value in stored.items():
        entry, tensor = key.rsplit("/", 1)
        if key.startswith("f32/") and tensor in ("z", "keys", "adj_k", "resid"):
            kept[key] = value.float()
        if key.startswith("f32/") and tensor == "delta_W":
            delta = stored[f"{entry}/resid"].T @ stored[f"{entry}/adj_k"]
            close(delta if delta.shape == value.shape else delta.T, value, 1e-6)
    pack_tensors(f"memit_{name}.safetensors", kept)
    pack_json(f"memit_{name}.json", {
        key: {"trajectory": [[row[:4] for row in rows] for rows in entry["trajectory"]]}
        for key, entry in meta.items() if key.startswith("f32/")
    })  # fmt: skip


def fine_tuning(full: Path, name: str) -> None:
    """Deltas, folded; the weights themselves are the model's plus these."""
    stored = load_file(full / f"ft_{name}.safetensors")
    pack_tensors(
        f"ft_{name}.safetensors", {key: fold(value) for key, value in stored.items() if key.endswith("/delta")}
    )
    pack("ft_" + name + ".json", (full / f"ft_{name}.json").read_bytes())


def mend(full: Path, name: str) -> None:
    """Statistics whole; factors at real tokens, updates and gradients folded."""
    meta = json.loads((full / f"mend_{name}.json").read_text(encoding="utf-8"))
    kept = {}
    for key, value in load_file(full / f"mend_{name}.safetensors").items():
        run = key.split("/")[1]
        if key.startswith("f32/") and "/stats_after/" in key:
            if key.endswith(MEND_FULL):
                kept[key] = value
        elif key.startswith("f32/"):
            if key.endswith("/x") and run[-2:] in meta["batches"]:
                value = value[torch.tensor(meta["batches"][run[-2:]]["edit_inner"]["attention_mask"]).bool()]
            kept[key] = fold(value).float()
    pack_tensors(f"mend_{name}.safetensors", kept)
    pack_json(f"mend_{name}.json", meta)


def embedded(full: Path) -> None:
    """SmolLM2: u, v, target, and perplexities (of sentences that are not here)."""
    meta = json.loads((full / "smollm2.json").read_text(encoding="utf-8"))
    kept = {"hparams": meta["hparams"], "ppl": meta["ppl"]}
    pack_json("smollm2.json", {**kept, "rome": {key: losses(entry) for key, entry in meta["rome"].items()}})
    stored = load_file(full / "smollm2_rome.safetensors")
    pack_tensors("smollm2_rome.safetensors", {
        key: value for key, value in stored.items() if key.rsplit("/", 1)[1] in ("u", "v", "target")
    })  # fmt: skip


def newer(full: Path, name: str) -> None:
    """The methods since 2024: settings, counts and anchors; values whole, matrices folded."""
    kept: Tensors = {}
    meta: dict[str, Any] = {}
    for method in NEWER:
        stem = f"{method}_{name}"
        raw = json.loads((full / "methods" / f"{stem}.json").read_text(encoding="utf-8"))
        meta[method] = {
            entry: {key: item for key, item in value.items() if key not in DROPPED}
            if entry.startswith(("f32/", "pilot"))
            else value
            for entry, value in raw.items()
        }
        for key, value in load_file(full / "methods" / f"{stem}.safetensors").items():
            tensor = key.rsplit("/", 1)[1]
            if tensor in ("u", "v", "z", "mean", "std", "n"):
                kept[f"{method}/{key}"] = value.float()
            elif tensor in NEWER_FOLDED or "/P/" in key:
                kept[f"{method}/{key}"] = fold(value).float()
    pack_tensors(f"newer_{name}.safetensors", kept)
    pack_json(f"newer_{name}.json", meta)


def main(full: Path, hparams: Path) -> None:
    pack_json("hparams_upstream.json", json.loads(hparams.read_text(encoding="utf-8"))["hparams"])
    inputs = json.loads((full / "inputs.json").read_text(encoding="utf-8"))
    del inputs["ppl_sentences"]
    for name in MODELS:
        models(full, name)
        inputs.setdefault("stats", {})[name] = statistics(full, name)
        rome(full, f"rome_{name}")
        rome(full, f"rome_extra_{name}")
        memit(full, name)
        fine_tuning(full, name)
        mend(full, name)
        newer(full, name)
        pack(f"eval_{name}.json", (full / f"eval_{name}.json").read_bytes())
    embedded(full)
    text = json.dumps(inputs, ensure_ascii=False, indent=1)
    (HERE / "inputs.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
