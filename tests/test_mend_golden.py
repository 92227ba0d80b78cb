"""MEND against the reference's own numbers (tests/golden): factors, transforms, updates, losses, gradients.

The reference's inputs are given as they are, with its mistakes: labels without the space, positions that count left
pads, locality scored one token late, and (in `apply`) learning rates by the order of the model's parameters.
"""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from golden_numbers import MODELS, TOLERANCE, fold, pair, read, tensors

from easyeditor.lm.discover import anatomy
from easyeditor.lm.weights import frozen
from easyeditor.methods.mend.hparams import MENDHyperParams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights, nonzero_rows
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.mend.passes import Batch, read_factors
from easyeditor.trainer.passes import PlainPasses

RUNS = ["1_train_b1", "2_train_b2", "3_eval_b1", "4_eval_b2"]


class Setting:
    """A golden model with the golden hypernetwork."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.raw, self.tensors, self.inputs = (
            read(f"mend_{name}.json"),
            tensors(f"mend_{name}.safetensors"),
            read("inputs.json"),
        )
        self.model, self.tok = pair(name, dtype)
        hparams = MENDHyperParams.from_dict(self.inputs["hparams"]["MEND"][name])
        self.parts = anatomy(self.model)
        weights = edited_weights(self.parts, hparams.inner_params or [])
        self.net = Hypernetwork(NetworkSpec.of(hparams), weights, edit_lr=0.01, generator=torch.Generator())
        stored = tensors(f"mend_{name}_hypernet.safetensors")
        found = self.net.load_state_dict(stored, strict=False)
        assert found.unexpected_keys == []
        assert all(key.endswith(("_mean", "_s", ".k")) for key in found.missing_keys)
        self.net.to(dtype)
        self.passes = PlainPasses(self.parts, self.net)

    def batch(self, run: str, part: str) -> Batch:
        """A golden batch as it is: left pads counted as positions, labels at the end."""
        raw = self.raw["batches"][run[-2:]][part]
        ids, mask = torch.tensor(raw["input_ids"]), torch.tensor(raw["attention_mask"])
        locality = part == "loc"
        wanted = torch.tensor(raw["decoder_attention_mask"]) == 1 if locality else torch.tensor(raw["labels"]) != -100
        rows, columns = wanted.nonzero(as_tuple=True)
        shift = 0 if locality else 1
        return Batch(
            inputs={
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
            },
            rows_N=rows,
            positions_N=columns + ids.shape[1] - wanted.shape[1] - shift,
            labels_N=torch.tensor(raw["labels"])[rows, columns].clamp(min=0),
            weights_N=torch.full((len(rows),), 1 / len(rows), dtype=torch.float64),
        )


@pytest.mark.parametrize("model", MODELS)
def test_factors_transforms_and_statistics(model: str) -> None:
    """The four runs in order on one network, because training mode moves the statistics."""
    s = Setting(model)
    for run in RUNS:
        s.net.train("train" in run)
        batch = s.batch(run, "edit_inner")
        with frozen(s.model), torch.no_grad():
            factors, _ = read_factors(s.parts, s.net.weights, batch)
            transformed = s.net.transform(factors)
            real = batch.inputs["attention_mask"].bool()
            for weight in s.net.weights:
                key = f"f32/{run}/{weight.name}"
                raw, new = factors[weight.name], transformed[weight.name]
                assert relative(fold(raw.x_NK[real]), s.tensors[f"{key}/x"]) < TOLERANCE
                assert relative(fold(raw.delta_ND), s.tensors[f"{key}/delta"]) < TOLERANCE
                assert len(nonzero_rows({"": raw})[""].x_NK) == s.raw[f"f32/{run}"]["rows_kept"][weight.name]
                assert relative(fold(new.x_NK), s.tensors[f"{key}/x_tilde"]) < TOLERANCE
                assert relative(fold(new.delta_ND), s.tensors[f"{key}/delta_tilde"]) < TOLERANCE
                update = torch.mm(*s.net.factors_of(weight, new))
                norm = s.raw[f"f32/{run}"]["weight_delta_norm"][weight.name]
                assert float(update.norm()) == pytest.approx(norm, rel=TOLERANCE)
                if f"{key}/weight_delta" in s.tensors:
                    assert relative(fold(update), s.tensors[f"{key}/weight_delta"]) < TOLERANCE
        for shape, net in s.net.mend.items():
            for name in ("u_mean", "u_s", "v_mean", "v_s", "k"):
                stored = s.tensors[f"f32/{run}/stats_after/{shape}.{name}"]
                assert relative(getattr(net, name), stored) < TOLERANCE


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients(model: str, dtype: str) -> None:
    s = Setting(model, torch.float64 if dtype == "f64" else torch.float32)
    for run in RUNS:
        s.net.train("train" in run)
        s.net.zero_grad()
        with frozen(s.model):
            found = s.passes.run(s.batch(run, "edit_inner"), s.batch(run, "edit_inner"), s.batch(run, "loc"))
        expected = s.raw[f"{dtype}/{run}"]
        total = 0.1 * found.edit_loss + 1.0 * found.locality_loss
        assert float(found.edit_loss.detach()) == pytest.approx(expected["l_edit"], rel=TOLERANCE)
        assert float(found.locality_loss.detach()) == pytest.approx(expected["l_loc"], rel=TOLERANCE)
        assert float(total.detach()) == pytest.approx(expected["l_total"], rel=TOLERANCE)
        if "train" not in run or dtype == "f64":
            continue
        total.backward()
        for name, parameter in s.net.named_parameters():
            norm = expected["grad_norms"][name.removeprefix("mend.")]
            assert float(parameter.grad.norm()) == pytest.approx(norm, rel=TOLERANCE), name
            if run == "1_train_b1":
                stored = s.tensors[f"f32/{run}/grad/{name.removeprefix('mend.')}"]
                assert relative(fold(parameter.grad), stored) < TOLERANCE, name


@pytest.mark.parametrize("run", ["apply_r1", "apply_r4"])
@pytest.mark.parametrize("model", MODELS)
def test_edits_with_the_statistics_of_training(model: str, run: str) -> None:
    s = Setting(model)
    for name in RUNS:  # the statistics move as they did there
        s.net.train("train" in name)
        with frozen(s.model), torch.no_grad():
            s.net.transform(read_factors(s.parts, s.net.weights, s.batch(name, "edit_inner"))[0])
    s.net.eval()
    request = s.inputs["requests"][int(run[-1])]
    prompt = request["prompt"].replace("{}", request["subject"])
    ids, target = (s.tok.encode(f"{before} {request['target_new']}") for before in (prompt, ""))
    batch = Batch(
        inputs={"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)},
        rows_N=torch.zeros(len(target), dtype=torch.long),
        positions_N=torch.arange(len(ids) - 1 - len(target), len(ids) - 1),
        labels_N=torch.tensor(target),
        weights_N=torch.full((len(target),), 1 / len(target), dtype=torch.float64),
    )
    rates = dict(zip(s.raw[f"f32/{run}"]["order"], s.net.edit_lrs.tolist(), strict=True))  # dealt out in this order
    own = dict(zip([weight.name for weight in s.net.weights], s.net.edit_lrs.tolist(), strict=True))
    with frozen(s.model), torch.no_grad():
        transformed = s.net.transform(read_factors(s.parts, s.net.weights, batch)[0])
        for weight in s.net.weights:
            update = torch.mm(*s.net.factors_of(weight, transformed[weight.name])) * rates[weight.name]
            stored = s.tensors[f"f32/{run}/{weight.name}/weight_delta"]
            assert relative(fold(update / own[weight.name]), stored) < TOLERANCE
