"""MEND's hyper-parameters: every key of the upstream YAML files, for editing and for training, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import require
from easyeditor.base.paths import SHIPPED
from easyeditor.methods.hparams import ModuleHyperParams

STOP_KEYS = {"loss/total_edit_val": "total_loss", "edit/acc_val": "edit_acc"}
"""Upstream's name of what early stopping watches -> the name in the log."""

JSON = "archive.json"
HOW = (
    "train one with `python pretrain_mend.py --hparams hparams/TRAINING/MEND/<model>.yaml`, or convert one of "
    "upstream's with `python -m easyeditor.trainer convert`"
)


@dataclass(kw_only=True)
class MENDHyperParams(ModuleHyperParams):
    """MEND (Mitchell et al. 2022): edit with a trained hypernetwork.

    Upstream's editing files repeat the training keys. When editing, the archive says how its hypernetwork is built;
    keys of this file that describe the hypernetwork are used for training and for reading upstream's archives.
    """

    alg_name: str = "MEND"
    archive: str | None = None
    """Folder of a trained hypernetwork (archive.json + hypernet.safetensors). For training: where to start from."""
    inner_params: list[str] | None = None
    """Names of the edited weights; null: those of the archive."""

    combine: bool = True
    """One network for the pair (x, delta); false: one for each."""
    one_sided: bool = False
    """Transform only the narrower of x and delta (needs combine: false)."""
    x_only: bool = False
    """Transform only x, the input of the edited layer (needs combine: false)."""
    delta_only: bool = False
    """Transform only delta, the gradient at its output (needs combine: false)."""
    shared: bool = True
    """Weights of one shape share a network, with a scale and shift of their own; false: a network for each weight."""
    norm: bool = True
    """Normalise x and delta by running mean and standard deviation first."""
    n_hidden: int = 1
    """Hidden layers; the network has one layer more."""
    hidden_dim: int | None = None
    """Hidden width of an MLP; null: twice its input. An IDMLP keeps its width."""
    init: Literal["id", "xavier"] = "id"
    """`id`: every layer starts as the identity (skip connection); `xavier`: random, no skip connection."""
    act: Literal["relu", "tanh", "gelu"] = "relu"
    """Activation."""
    rank: int | None = 1920
    """Rank of an IDMLP's weights (cut to its width); null: full rank."""
    mlp_class: Literal["IDMLP", "MLP"] = "IDMLP"
    """`IDMLP`: low-rank layers of constant width; `MLP`: dense layers with a hidden width."""
    edit_lr: float = 1e-4
    """First value of the learned step size of every edited weight."""
    lr_scale: float = 1.0
    """Factor on every update when editing: 1 edits as trained."""

    lr: float = 1e-6
    """Step size of the hypernetwork's optimiser."""
    lr_lr: float = 1e-4
    """Step size for the learned step sizes."""
    opt: Literal["Adam", "AdamW", "SGD"] = "Adam"
    """Optimiser."""
    cedit: float = 0.1
    """Weight of the edit loss."""
    cloc: float = 1.0
    """Weight of the locality loss."""
    cbase: float = 1.0
    """Weight of the base model's own loss; there is none, because the base model stays as it is."""
    batch_size: int = 1
    """Requests edited together in one step."""
    accumulate_bs: int = 10
    """Steps whose gradients make one update."""
    grad_clip: float = 100.0
    """Largest L2 norm of the hypernetwork's gradient."""
    max_iters: int = 100000
    """Training steps (batches)."""
    log_interval: int = 1000
    """Steps between two lines of training numbers in the log."""
    val_interval: int = 1000
    """Steps between two validations."""
    val_steps: int = 500
    """Validation requests used."""
    val_batch_size: int = 5
    """Upstream's key; validation edits one request at a time, as users do."""
    eval_log_interval: int = 1000
    """Upstream's key; validation has one line in the log."""
    early_stop_patience: int = 20000
    """Stop when this many steps brought no better validation."""
    early_stop_key: Literal["loss/total_edit_val", "edit/acc_val"] = "loss/total_edit_val"
    """What is better: a smaller total loss, or a larger edit accuracy."""
    model_save_pt: int = 5000
    """Steps between two checkpoints, besides those after every validation."""
    final_eval: bool = True
    """Validate once more at the end."""
    results_dir: str = "./results"
    """The trained archive goes to <results_dir>/models/MEND/<model>."""
    train_base: bool = False
    """Upstream's switch to train the edited model too; refused."""
    dropout: float = 0.0
    """Dropout of the edited model in training; anything but 0 is refused."""
    no_grad_layers: int | None = None
    """Upstream's key; refused: nothing below the first edited block is differentiated anyway."""
    half: bool = False
    """Upstream's switch; refused: say `fp16: true` or `dtype: bfloat16`."""
    eval_only: bool = False
    """Training: validate once and stop."""

    alg: Literal["MEND"] = "MEND"
    """Upstream's second name of the method."""
    model_class: str | None = None
    """Upstream's key; the checkpoint's config says the class."""
    tokenizer_class: str | None = None
    """Upstream's key; the checkpoint says the class."""
    tokenizer_name: str | None = None
    """Upstream's key; the tokenizer next to the model is used."""
    silent: bool = False
    """No live line in training."""
    verbose: bool = True
    """Upstream's key."""
    debug: bool = False
    """Upstream's key."""
    max_output_length: int | None = None
    """EasyEdit's key, of its detoxifying experiment; not used."""
    save: bool = False
    """Upstream's key; checkpoints are always saved."""

    def reads(self) -> dict[str, Any]:
        return {**super().reads(), "archive": self.archive}

    def check_files(self) -> None:
        super().check_files()
        find_archive(self.archive)

    def validate(self, where: str) -> None:
        super().validate(where)
        sides = [key for key in ("one_sided", "x_only", "delta_only") if getattr(self, key)]
        if self.combine and sides:
            raise ConfigError(
                f"{where}: {sides[0]} and combine are true; a combined network has no sides: combine: false"
            )
        if len(sides) > 1:
            raise ConfigError(f"{where}: {' and '.join(sides)} are true; choose one")
        self.need_positive(where, "lr", "lr_lr", "lr_scale", "grad_clip")
        self.need_nonnegative(where, "cedit", "cloc", "n_hidden", "early_stop_patience", "max_iters")
        steps = "batch_size", "accumulate_bs", "log_interval", "val_interval", "val_steps", "model_save_pt"
        self.need_positive(where, *steps, allowed="1 or more")
        self.need_positive(where, "rank", "hidden_dim", allowed="1 or more, or null")
        named = self.inner_params
        require(named is None or len(set(named)) == len(named) > 0, where, "inner_params", named, "each weight once")
        require(not self.train_base, where, "train_base", self.train_base, "false: the edited model stays as it is")
        require(self.dropout == 0, where, "dropout", self.dropout, "0: the edited model runs without dropout")
        require(not self.half, where, "half", self.half, "false; say fp16: true or dtype: bfloat16")
        require(self.no_grad_layers is None, where, "no_grad_layers", self.no_grad_layers, "null; it is not needed")


@dataclass(kw_only=True)
class MENDTrainingHparams(MENDHyperParams):
    """What training a hypernetwork needs: `inner_params` must be named. Read from hparams/TRAINING/MEND/."""

    outer_prompts: int = 2
    """Texts that must give the new answer after the edit, drawn per step from prompt and paraphrases; 0: all."""
    locality_prompts: int = 2
    """Locality prompts held in place in each step, drawn from the request's; 0: all."""
    cache_mb: int = 2048
    """Most memory for what the frozen layers give, kept across steps and epochs; 0 keeps nothing."""

    def validate(self, where: str) -> None:
        super().validate(where)
        require(self.inner_params is not None, where, "inner_params", None, "the names of the weights to edit")
        self.need_nonnegative(where, "outer_prompts", "locality_prompts", "cache_mb")


def find_archive(name: str | None) -> Path:
    """The archive's folder. Raises ConfigError that says what to run."""
    if name is None:
        raise ConfigError(
            f"archive is null: MEND edits with a trained hypernetwork; {HOW}, and set archive to its folder"
        )
    for folder in (Path(name), SHIPPED / name):
        if (folder / JSON).is_file():
            return folder
    if Path(name).is_file():
        raise ConfigError(
            f"archive: {name} is a file, perhaps one of upstream's; convert it with `python -m easyeditor.trainer "
            f"convert --archive {name} --hparams <its YAML> --output DIR` and set archive to DIR"
        )
    raise ConfigError(f"archive: {name} holds no {JSON}; {HOW}")
