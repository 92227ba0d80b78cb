"""The papers' numbers, printed next to ours: Fall of ROME (arXiv 2406.11263), Butterfly Effect (arXiv 2402.09656)."""

from __future__ import annotations

MODELS = ("GPT-2-XL", "GPT-J", "Llama2-7b")

UPDATE_NORMS = {  # Fall of ROME, table 2: mean numerator norm and |denominator| over cases
    "collapse": {"GPT-2-XL": (168.55, 0.04), "GPT-J": (140.27, 0.04), "Llama2-7b": (4.57, 0.01)},
    "normal": {"GPT-2-XL": (79.91, 9.60), "GPT-J": (88.69, 12.78), "Llama2-7b": (16.52, 2.63)},
}
MAX_PERPLEXITY = {  # Fall of ROME: maximum perplexity over cases
    "original": {"GPT-2-XL": 68.77, "GPT-J": 49.04, "Llama2-7b": 33.18},
    "ROME, collapse": {"GPT-2-XL": 26084.66, "GPT-J": 25909.24, "Llama2-7b": 10574.76},
    "ROME, normal": {"GPT-2-XL": 74.32, "GPT-J": 50.77, "Llama2-7b": 36.68},
    "C-ROME, collapse": {"GPT-2-XL": 70.71, "GPT-J": 51.77, "Llama2-7b": 33.20},
    "C-ROME, normal": {"GPT-2-XL": 70.28, "GPT-J": 50.57, "Llama2-7b": 33.55},
}
POSITION_SWAP = {  # Fall of ROME: perplexity of collapse cases (min, mean, max), as it is and with the position copied
    "GPT-2-XL": ((2177.8, 19877.8, 179186.0), (1008.2, 1397.9, 2153.9)),
    "GPT-J": ((5094.7, 28835.0, 85936.0), (8153.7, 26978.0, 124982.0)),
    "Llama2-7b": ((16280.0, 67437.0, 206308.0), (17562.0, 72693.0, 349578.0)),
}
PREFIX_TEST = {  # Fall of ROME: C-ROME's efficacy, generalization, locality in percent
    ("collapse", "no prefix"): {
        "GPT-2-XL": (5.19, 14.29, 97.40),
        "GPT-J": (30.59, 30.77, 82.35),
        "Llama2-7b": (18.65, 12.70, 100.0),
    },
    ("collapse", "prefix"): {
        "GPT-2-XL": (100.0, 16.88, 100.0),
        "GPT-J": (100.0, 32.94, 89.41),
        "Llama2-7b": (91.27, 29.37, 100.0),
    },
    ("normal", "prefix"): {
        "GPT-2-XL": (96.16, 41.88, 97.34),
        "GPT-J": (99.77, 50.00, 95.61),
        "Llama2-7b": (91.95, 46.73, 97.56),
    },
}
SPEARMAN = {  # Butterfly Effect, figure: perplexity against task performance
    "GPT-2-XL": {"PIQA": -0.97, "Hellaswag": -0.90, "LAMBADA": -0.88},
    "GPT-J": {"PIQA": -0.95, "Hellaswag": -0.96, "LAMBADA": -0.87},
    "Llama2-7b": {"PIQA": -1.00, "Hellaswag": -1.00, "LAMBADA": -0.85},
}
WORST_MODELS = {  # Butterfly Effect: perplexity, PIQA, Hellaswag, LAMBADA of the worst edited model
    "GPT-2-XL": (179837.93, 0.5272, 0.2568, 0.0),
    "GPT-J": (184391.46, 0.5185, 0.2617, 0.0),
    "Llama2-7b": (7751.07, 0.5087, 0.2610, 0.0008),
}
