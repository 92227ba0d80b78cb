"""The one table of methods. A new method, or a variant of one, is one row.

Texts only: what a row names is imported when it is asked for, so that reading this loads neither torch nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: where it lives (`module:Class`), and what its name stands for."""

    title: str
    """The method's name as a reader knows it."""
    hparams: str
    """Class of its hyper-parameters."""
    method: str
    """Class of its code."""
    paper: str
    """Where it is published."""
    needs_subject: bool = True
    """Does the method look the subject up in the prompt? False: requests may be without one."""
    writes: bool = True
    """Does an edit change weights? False: it is a memory that is looked up."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters the name stands for; another value is refused."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters taken where the file does not give them."""
    unused: tuple[str, ...] = ()
    """Keys of the field's files that no method here uses. A file of any method may give one, or one that only other
    methods use: a warning names it."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys of the field's files that have another name here."""
    spellings: tuple[str, ...] = ()
    """Other ways `alg_name` is written in the field's files."""
    training: str = ""
    """Class of the hyper-parameters of its training, where it has one."""


METHODS: dict[str, MethodRow] = {
    "ROME": MethodRow(
        title="ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2202.05262",
        unused=("bias_update", "dynamic"),
    ),
    "C-ROME": MethodRow(
        title="C-ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2406.11263",
        preset={"if_c_rome": True},
        defaults={"if_prefix": True},
        spellings=("C_ROME",),
    ),
    "R-ROME": MethodRow(
        title="R-ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="https://arxiv.org/abs/2403.07175",
        preset={"if_c_rome": True},
        unused=("enable_prompt_keys", "enable_random_prefix_keys", "original_implementation"),
        spellings=("R_ROME", "RROME"),
    ),
    "FTP-ROME": MethodRow(
        title="FTP-ROME",
        hparams="easyeditor.methods.rome.hparams:ROMEHyperParams",
        method="easyeditor.methods.rome.method:ROME",
        paper="docs/findings/first-token-protection.md",
        preset={"if_c_rome": True, "consistent_value": True, "protect_first_tokens": True, "both_keys": True},
    ),
    "MEMIT": MethodRow(
        title="MEMIT",
        hparams="easyeditor.methods.memit.hparams:MEMITHyperParams",
        method="easyeditor.methods.memit.method:MEMIT",
        paper="https://arxiv.org/abs/2210.07229",
    ),
    "MEMIT-Seq": MethodRow(
        title="MEMIT-Seq",
        hparams="easyeditor.methods.memit.hparams:MEMITHyperParams",
        method="easyeditor.methods.memit.method:MEMIT",
        paper="https://arxiv.org/abs/2605.26670",
        preset={"earlier_keys": "edited"},
        unused=("cov_matrix_weight", "lambda_reg"),
        spellings=("MEMIT_Seq", "MEMIT_seq", "MEMIT_SEQ", "memit_seq"),
    ),
    "ENCORE": MethodRow(
        title="ENCORE",
        hparams="easyeditor.methods.memit.hparams:MEMITHyperParams",
        method="easyeditor.methods.memit.method:MEMIT",
        paper="https://arxiv.org/abs/2502.01636",
        preset={"earlier_keys": "solved"},
        defaults={"update_norm_lambda": 10.0, "early_stop": "mpes"},
        unused=(
            *("add_prev_edits", "calculate_norm", "calculate_norms", "calculate_objective_value", "condition_num"),
            *("dynamic_multiplier", "emmet_lambda", "gd_lambda", "grad_desc_lr", "grad_desc_steps", "identity_cov"),
            *("norm_control", "proj_dim", "random_vector_preservation", "shuffle_text", "skill_lambda"),
            *("skill_preservation", "skill_sample_size", "spectral_norm", "use_gd", "wikipedia_lang"),
        ),
    ),
    "EMMET": MethodRow(
        title="EMMET",
        hparams="easyeditor.methods.emmet.hparams:EMMETHyperParams",
        method="easyeditor.methods.emmet.method:EMMET",
        paper="https://arxiv.org/abs/2403.14236",
    ),
    "AlphaEdit": MethodRow(
        title="AlphaEdit",
        hparams="easyeditor.methods.alphaedit.hparams:AlphaEditHyperParams",
        method="easyeditor.methods.alphaedit.method:AlphaEdit",
        paper="https://arxiv.org/abs/2410.02355",
        unused=("P_loc", "apply_woodbury", "edit_layer", "mu_reg", "weight_reg"),
    ),
    "NAS": MethodRow(
        title="NAS",
        hparams="easyeditor.methods.alphaedit.hparams:AlphaEditHyperParams",
        method="easyeditor.methods.alphaedit.method:AlphaEdit",
        paper="https://arxiv.org/abs/2602.02543",
        preset={"norm_anchor": True},
        unused=("use_nas",),
    ),
    "SPHERE": MethodRow(
        title="SPHERE",
        hparams="easyeditor.methods.alphaedit.hparams:AlphaEditHyperParams",
        method="easyeditor.methods.alphaedit.method:AlphaEdit",
        paper="https://arxiv.org/abs/2510.01172",
        preset={"filters": ["sphere"]},
        renamed={
            "cumulative_ratio": "sphere_ratio",
            "suppression_strength": "sphere_strength",
            "suppression strength": "sphere_strength",  # EasyEdit's llama3-8b
        },
    ),
    "MEND": MethodRow(
        title="MEND",
        hparams="easyeditor.methods.mend.hparams:MENDHyperParams",
        method="easyeditor.methods.mend.method:MEND",
        needs_subject=False,
        paper="https://arxiv.org/abs/2110.11309",
        unused=("counterfact", "mini", "n_toks", "zsre"),
        training="easyeditor.methods.mend.hparams:MENDTrainingHparams",
    ),
    "FT": MethodRow(
        title="FT",
        hparams="easyeditor.methods.ft.hparams:FTHyperParams",
        method="easyeditor.methods.ft.method:FT",
        needs_subject=False,
        paper="https://arxiv.org/abs/2012.00363",
        unused=("wd_power_law",),
    ),
    "FT-M": MethodRow(
        title="FT-M",
        hparams="easyeditor.methods.ft.hparams:FTHyperParams",
        method="easyeditor.methods.ft.method:FT",
        needs_subject=False,
        paper="https://arxiv.org/abs/2401.01286",
        preset={"objective_optimization": "target_new"},
        spellings=("FT_M", "FTM"),
    ),
    "LocFT-BF": MethodRow(
        title="LocFT-BF",
        hparams="easyeditor.methods.ft.hparams:FTHyperParams",
        method="easyeditor.methods.ft.method:FT",
        needs_subject=False,
        paper="https://arxiv.org/abs/2509.22072",
        preset={"objective_optimization": "target_new", "target_eos": True, "shuffle": True},
        defaults={"batch_size": 100, "num_steps": 25, "lr": 5e-4},
        unused=("data_path", "save_model_dir"),
        renamed={"model_name_or_path": "model_name", "rewrite_module": "rewrite_module_tmp"},
        spellings=("LocFT", "LocFT_BF", "LOCFT"),
    ),
    "UltraEdit": MethodRow(
        title="UltraEdit",
        hparams="easyeditor.methods.ultraedit.hparams:UltraEditHyperParams",
        method="easyeditor.methods.ultraedit.method:UltraEdit",
        needs_subject=False,
        paper="https://arxiv.org/abs/2505.14679",
        unused=("class_name", "editor_batch_size", "n_edits", "token"),
        renamed={"modules": "inner_params"},
        spellings=("ULTRAEDIT", "Ultraedit", "UltraEDIT"),
    ),
    "LoRA": MethodRow(
        title="LoRA",
        hparams="easyeditor.methods.lora.hparams:LoRAHyperParams",
        method="easyeditor.methods.lora.method:LoRA",
        needs_subject=False,
        paper="https://arxiv.org/abs/2106.09685",
        unused=("data_parallel", "lora_distributed", "merge", "merge_alpha"),
        renamed={"lora_r": "rank"},
        spellings=("LORA", "Lora"),
    ),
    "ICE": MethodRow(
        title="ICE",
        hparams="easyeditor.methods.in_context.hparams:InContextHyperParams",
        method="easyeditor.methods.in_context.method:ICE",
        needs_subject=False,
        writes=False,
        paper="https://arxiv.org/abs/2307.12976",
    ),
    "IKE": MethodRow(
        title="IKE",
        hparams="easyeditor.methods.in_context.hparams:IKEHyperParams",
        method="easyeditor.methods.in_context.ike:IKE",
        needs_subject=False,
        writes=False,
        paper="https://arxiv.org/abs/2305.12740",
        unused=("sentence_model_name", "results_dir", "use_icl_examples"),
    ),
    "SCR": MethodRow(
        title="SCR",
        hparams="easyeditor.methods.in_context.hparams:SCRHyperParams",
        method="easyeditor.methods.in_context.scr:SCR",
        needs_subject=False,
        writes=False,
        paper="https://arxiv.org/abs/2503.05212",
    ),
}
