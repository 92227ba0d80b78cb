"""EditTrainer: trains MEND's hypernetwork on requests, with EasyEdit's name and arguments."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from easyeditor.base.errors import ConfigError, NumericalError
from easyeditor.base.files import to_json
from easyeditor.base.progress import progress_bar
from easyeditor.lm.architectures import longest
from easyeditor.lm.discover import anatomy
from easyeditor.lm.loading import load
from easyeditor.lm.precision import products
from easyeditor.lm.prompting import Prompting
from easyeditor.lm.weights import frozen, sample
from easyeditor.methods.mend.archive import read_archive, write_archive
from easyeditor.methods.mend.hparams import STOP_KEYS, MENDTrainingHparams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.results.journal import Journal, rewind
from easyeditor.results.lines import TrainingLine
from easyeditor.results.run import TRAINING
from easyeditor.trainer import measure
from easyeditor.trainer.passes import PlainPasses, SharedPasses, StepResult
from easyeditor.trainer.state import STATE, MadeFrom, Progressed, check_place, read_state, training_folder, write_state
from easyeditor.trainer.tasks import Tasks
from easyeditor.values.edit import EditRequest

LOG = logging.getLogger(__name__)

LAST = "last"
VALIDATED_TOGETHER = 8  # requests whose head rows are computed together; each is an edit of its own
FREE = {
    *("max_iters", "log_interval", "val_interval", "val_steps", "final_eval", "eval_only", "model_save_pt"),
    *("early_stop_patience", "early_stop_key", "results_dir", "model_name", "archive", "device", "cache_mb"),
    *("silent", "verbose", "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp"),
    *("ln_f_module", "lm_head_module"),
}
"""Settings in which a resumed run may differ from the one it goes on from."""
OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended: the folder with the best archive, steps done, why it stopped, the best validation."""

    folder: Path
    steps: int
    reason: str
    best: dict[str, float] | None


class EditTrainer(MadeFrom):
    """Trains the hypernetwork; the edited model stays as it is.

    Every step edits `batch_size` requests with the present hypernetwork and lowers cedit * (NLL of the new answers
    after the edit) + cloc * KL(before || after) on locality prompts (MEND, sec. 3.3); `accumulate_bs` steps make an
    update. `run` writes to `folder`: the best archive so far, `last.safetensors` to go on from, `log.jsonl`, and at the
    end the last archive in `last/`.
    """

    def __init__(
        self,
        config: MENDTrainingHparams,
        train_set: Sequence[EditRequest],
        val_set: Sequence[EditRequest] | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        store_dtype: str = "float32",
    ) -> None:
        """`folder` defaults to <results_dir>/models/MEND/<model>; `store_dtype` is what the archive is stored in.

        Raises:
            ConfigError: wrong settings, or `resume` finds a run with others. OutputError: a run is there already.
        """
        if not isinstance(config, MENDTrainingHparams):
            raise ConfigError(f"EditTrainer needs MENDTrainingHparams, found {type(config).__name__}")
        self.config = h = config.checked()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder = training_folder(h, folder)
        self._store_dtype = store_dtype
        if self.rank == 0:
            check_place(self.folder, resume)
        self.model, self.tok = load(
            h.model_name, device=h.device, dtype=h.dtype, fp16=h.fp16, model_parallel=h.model_parallel
        )
        self.parts = anatomy(self.model, **h.templates)
        self.hypernet = self._start()
        networks = [p for name, p in self.hypernet.named_parameters() if name != "edit_lrs"]
        groups = [{"params": networks, "lr": h.lr}, {"params": [self.hypernet.edit_lrs], "lr": h.lr_lr}]
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[h.opt](groups)
        passes = SharedPasses if h.replay and self.parts.architecture.replay else PlainPasses
        options = {"cache_bytes": h.cache_mb * 2**20} if passes is SharedPasses else {}
        self._passes: Any = passes(self.parts, self.hypernet, **options)
        self._train = self._tasks(train_set)
        self._val = None if val_set is None else self._tasks(val_set, "validation")
        self._identity = self._identify(train_set)
        self.progressed = Progressed()
        if resume:
            self._resume()

    def run(self) -> Trained:
        """Train until `max_iters` steps, or until validation has not got better for `early_stop_patience` steps.

        Raises:
            NumericalError: the loss is not finite; the last checkpoint and the best archive stay.
        """
        h, now = self.config, self.progressed
        started, first, clock = time.perf_counter() - now.seconds, now.step, time.perf_counter()
        reason = "max_iters reached"
        bar = progress_bar("training MEND", self.rank == 0 and not h.silent)
        with frozen(self.model), products(h.matmul, h.cpu_products), bar as show:
            if h.eval_only:
                self._validate()
                return self._ended("validation only")
            while now.step < h.max_iters:
                before = now.step
                found = self._steps(range(before, min(before + h.accumulate_bs, h.max_iters)))
                now.step, now.seconds = before + len(found), time.perf_counter() - started
                if show is not None:
                    speed = (now.step - first) / (time.perf_counter() - clock)
                    show(now.step, h.max_iters, measure.note(found[-1], speed))
                last = now.step == h.max_iters
                if measure.passed(before, now.step, h.log_interval):
                    self._log_training()
                validated = measure.passed(before, now.step, h.val_interval) or (last and h.final_eval)
                if validated:
                    self._validate()
                if validated or last or measure.passed(before, now.step, h.model_save_pt):
                    self._save()
                if self._val is not None and now.step - now.best_step > h.early_stop_patience:
                    reason = f"no better validation for {h.early_stop_patience} steps"
                    break
        if self.hypernet.trained:
            self._write_archive(self.folder / LAST, {})
        return self._ended(reason)

    # -- one update -----------------------------------------------------------------------------------------------

    def _steps(self, steps: range) -> list[dict[str, float]]:
        """The steps of one update, and their numbers. The host reads from the device once, when all is on its way."""
        h = self.config
        self.hypernet.train()
        tasks = [self._train.training(step, h.batch_size, self.rank, self.world) for step in steps]
        outcomes: list[StepResult] = self._passes(tasks)
        losses = torch.stack([h.cedit * o.edit_loss + h.cloc * o.locality_loss for o in outcomes])
        torch.autograd.backward(losses.sum() / h.accumulate_bs)
        norm, diverged = self._clipped(), measure.anywhere(~losses.isfinite().all())
        found, read = measure.numbers(outcomes, h.cedit, h.cloc, norm, diverged, *losses)
        if read[1]:
            bad = next((pair for pair in zip(steps, read[2:], strict=True) if not math.isfinite(pair[1])), None)
            where = "on another rank" if bad is None else f"{bad[1]} in training step {bad[0] + 1}"
            raise self._diverged(f"the loss is not finite ({where})")
        for own in found:
            measure.add(self.progressed.sums, own)
        if math.isfinite(read[0]):
            self._update()
        else:
            self.progressed.skipped += 1
            LOG.warning("step %d: the gradient is not finite; this update is left out", self.progressed.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _update(self) -> None:
        self.optimizer.step()

    def _clipped(self) -> Tensor:
        """The norm of the gradient over all ranks, before it was cut to `grad_clip`."""
        parameters = list(self.hypernet.parameters())
        if self.world > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)

    def _diverged(self, what: str) -> NumericalError:
        state = self.folder / STATE
        kept = f"the last good checkpoint is {state}" if state.exists() else "no checkpoint was written before it"
        return NumericalError(f"{what}; {kept}. Try a smaller lr, lr_lr or edit_lr")

    # -- measuring ------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Edit validation requests one at a time; keep the archive if they came out better than ever."""
        if self._val is None:
            return
        self.hypernet.eval()
        count = min(len(self._val), self.config.val_steps)
        totals: dict[str, float] = {}
        with torch.no_grad():
            mine = list(range(self.rank, count, self.world))
            for start in range(0, len(mine), VALIDATED_TOGETHER):
                tasks = [self._val.validation(number) for number in mine[start : start + VALIDATED_TOGETHER]]
                found, _ = measure.numbers(self._passes(tasks), self.config.cedit, self.config.cloc)
                for own in found:
                    measure.add(totals, own)
        means = measure.means(totals)
        self._log({"requests": count, **means}, validation=True)
        key = STOP_KEYS[self.config.early_stop_key]
        value = -means[key] if key == "edit_acc" else means[key]
        if math.isfinite(value) and (self.progressed.best is None or value < self.progressed.best):
            self.progressed.best, self.progressed.best_step = value, self.progressed.step
            self._write_archive(self.folder, means)

    def _log_training(self) -> None:
        now = self.progressed
        means, now.sums = measure.means(now.sums), {}
        run = {"skipped_updates": now.skipped, "seconds": now.seconds, "steps_per_s": now.step / now.seconds}
        self._log({**means, **run}, validation=False)

    def _log(self, values: dict[str, float], *, validation: bool) -> None:
        if self.rank == 0:
            line = TrainingLine(validation=validation, step=self.progressed.step, values=values)
            with Journal(self.folder / TRAINING) as journal:
                journal.append(line.to_json())

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Checkpoint; a hypernetwork that is not finite never replaces a good one."""
        if not bool(torch.stack([value.isfinite().all() for value in self.hypernet.state_dict().values()]).all()):
            raise self._diverged(f"the hypernetwork is not finite after step {self.progressed.step}")
        self.progressed.all_sums = measure.gathered(self.progressed.sums)
        if self.rank == 0:
            write_state(self.folder / STATE, self.hypernet, self.optimizer, self.progressed, self._identity)
            if self._val is None:
                self._write_archive(self.folder, {})

    def _write_archive(self, folder: Path, means: dict[str, float]) -> None:
        if self.rank == 0:
            training = {"step": self.progressed.step, "validation": means, "hparams": self.config.to_dict()}
            training["data"] = self._identity["data"]
            write_archive(folder, self.hypernet, self.parts, training=training, dtype=self._store_dtype)

    def _ended(self, reason: str) -> Trained:
        best = self.progressed.best
        key = STOP_KEYS[self.config.early_stop_key]
        shown = None if best is None else {"step": self.progressed.best_step, key: abs(best)}
        return Trained(folder=self.folder, steps=self.progressed.step, reason=reason, best=shown)

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            LOG.info("%s is not there; training starts from the beginning", path)
            return
        self.progressed = read_state(path, self.hypernet, self.optimizer, self._identity)
        if self.progressed.all_sums:
            self.progressed.sums = self.progressed.all_sums[self.rank]
        if self.rank == 0:
            rewind(self.folder / TRAINING, self.progressed.step)
        LOG.info("going on after step %d of %s", self.progressed.step, path)

    # -- making ---------------------------------------------------------------------------------------------------

    def _start(self) -> Hypernetwork:
        h = self.config
        if h.archive is not None:
            return read_archive(h.archive, self.parts, inner_params=h.inner_params).train()
        weights = edited_weights(self.parts, h.inner_params or [])
        generator = torch.Generator().manual_seed(h.seed)
        made = Hypernetwork(NetworkSpec.of(h), weights, edit_lr=h.edit_lr, generator=generator)
        return made.to(self.model.get_parameter(weights[0].name).device)

    def _tasks(self, requests: Sequence[EditRequest], name: str = "train") -> Tasks:
        h = self.config
        return Tasks(
            self.tok,
            requests,
            seed=h.seed,
            outer=h.outer_prompts,
            locality=h.locality_prompts,
            longest=longest(self.model, h.max_length),
            name=name,
            prompting=Prompting.of(h).checked(self.tok),
        )

    def _identify(self, requests: Sequence[EditRequest]) -> dict[str, str]:
        """What a run must share with the one it goes on from."""
        identity = {key: to_json(value) for key, value in self.config.to_dict().items() if key not in FREE}
        digest = hashlib.sha256(to_json([request.to_json() for request in requests]).encode()).hexdigest()[:16]
        start = "new" if self.config.archive is None else hashlib.sha256(repr(self.config.archive).encode()).hexdigest()
        data = f"{len(requests)} requests {digest}"
        return {**identity, "weights": sample(self.model), "data": data, "ranks": str(self.world), "start": start}
