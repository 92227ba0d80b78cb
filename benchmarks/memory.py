"""Print the table of docs/performance.md: estimated memory by model, method and dtype, from shapes alone.

python benchmarks/memory.py          seconds on a laptop; nothing is fetched, loaded or measured
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from shapes import INNER, config_of  # noqa: E402

MODELS = {"GPT-2-XL": "gpt2-xl", "GPT-J-6B": "gptj-6b", "Llama-3-8B": "llama3-8b"}
SEARCH = {"v_num_grad_steps": 20, "v_lr": 0.5, "v_weight_decay": 0.5, "clamp_norm_factor": 4, "kl_factor": 0.0625}


def methods(kind: str, layers: int) -> dict[str, tuple[dict[str, Any], bool]]:
    """(hyper-parameters, training?) by the name of a row."""
    search = {**SEARCH, "v_loss_layer": layers - 1}
    inner = [name.format(n) for n in range(layers - 3, layers) for name in INNER[kind]]
    return {
        "ROME, without C": ({"alg_name": "ROME", "layers": [5], "mom2_adjustment": False, **search}, False),
        "ROME, with C": ({"alg_name": "ROME", "layers": [5], "mom2_adjustment": True, **search}, False),
        "MEMIT, 5 layers": (
            {
                "alg_name": "MEMIT",
                "layers": [3, 4, 5, 6, 7],
                "mom2_update_weight": 15000,
                "mom2_adjustment": True,
                **search,
            },
            False,
        ),
        "AlphaEdit, 5 layers": (
            {
                "alg_name": "AlphaEdit",
                "layers": [3, 4, 5, 6, 7],
                "mom2_adjustment": True,
                **search,
            },
            False,
        ),
        "FT, 1 layer": ({"alg_name": "FT", "layers": [5], "num_steps": 25, "lr": 5e-4}, False),
        "MEND, 6 weights: editing": ({"alg_name": "MEND", "inner_params": inner, "archive": "x"}, False),
        "MEND, 6 weights: training": ({"alg_name": "MEND", "inner_params": inner}, True),
    }


def main() -> None:
    from easyeditor.commands.estimate import GIB, estimate
    from easyeditor.methods.registry import load_hparams

    print("| model | method | float32 | bfloat16 | of it weights (float32) | statistics | hypernetwork |")
    print("|---|---|---|---|---|---|---|")
    for title, shape in MODELS.items():
        config = config_of(shape)
        for method, (values, training) in methods(config.model_type, config.num_hidden_layers).items():
            made = {
                dtype: estimate(
                    config, load_hparams({**values, "model_name": title, "dtype": dtype}), training=training
                )
                for dtype in ("float32", "bfloat16")
            }
            wide, narrow = made["float32"], made["bfloat16"]
            shown = (wide.total, narrow.total, wide.weights, wide.statistics, wide.hypernetwork)
            print(f"| {title} | {method} | " + " | ".join(f"{x / GIB:.1f}" for x in shown) + " |")


if __name__ == "__main__":
    main()
