"""MEND on tiny models: the edit as a value, the shared passes against the plain ones, archives, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, relative, same, states, tokenizer
from safetensors.torch import load_file, save_file

from easyeditor import BaseEditor, EditRequest, MENDHyperParams
from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.discover import anatomy
from easyeditor.lm.scored import Batch, line, nll, scored_logits
from easyeditor.lm.weights import applied, frozen
from easyeditor.methods.mend.archive import read_archive, write_archive
from easyeditor.methods.mend.convert import Inert, load_tensors, read_upstream
from easyeditor.methods.mend.hypernet import Factors, Hypernetwork, edited_weights
from easyeditor.methods.mend.method import MEND
from easyeditor.methods.mend.network import NetworkSpec
from easyeditor.methods.mend.passes import read_factors
from easyeditor.trainer.passes import PlainPasses, SharedPasses
from easyeditor.trainer.tasks import Tasks

KINDS = ["llama", "gpt2", "gemma2"]
FACTS = [
    (
        "The river was",
        "river",
        "high tide",
        ["A wide river was"],
        [("A museum is", "closed"), ("The lake was", "cold")],
    ),
    ("Paris is in", "Paris", "Italy", ["Go to Paris in", "Paris lies in"], [("Lyon is in", "France")]),
    ("A bank can", "bank", "reopen", ["Any bank can"], [("A shop can", "close soon"), ("The mill can", "turn")]),
]


def requests() -> list[EditRequest]:
    return [
        EditRequest.make(
            prompt,
            subject=subject,
            target_new=target,
            rephrase_prompts=rephrase,
            locality={"near": {"prompt": [p for p, _ in near], "ground_truth": [a for _, a in near]}},
            case_id=number,
        )
        for number, (prompt, subject, target, rephrase, near) in enumerate(FACTS)
    ]


def names_of(parts: Anatomy, layers: tuple[int, ...] = (2, 3)) -> list[str]:
    """Input and output projections of the MLPs of some layers."""
    inner = {"llama": "up_proj", "gemma2": "gate_proj", "gpt2": "c_fc"}[parts.model.config.model_type]
    mlps = [parts.architecture.mlp.format(layer) for layer in layers]
    return [
        name
        for layer, mlp in zip(layers, mlps, strict=True)
        for name in (f"{mlp}.{inner}.weight", parts.weight_name(layer))
    ]


def hparams(**changes: Any) -> MENDHyperParams:
    return MENDHyperParams.from_dict(
        {"model_name": "tiny", "rank": 6, "device": "cpu", "ppl_sentence_num": 0, **changes}
    )


def hypernet(parts: Anatomy, *, edit_lr: float = 0.02, **changes: Any) -> Hypernetwork:
    """Random parameters, and statistics of a few random rows."""
    generator = torch.Generator().manual_seed(1)
    weights = edited_weights(parts, names_of(parts))
    dtype = parts.model.dtype
    made = Hypernetwork(NetworkSpec.of(hparams(**changes)), weights, edit_lr=edit_lr, generator=generator).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        made.train()
        rows = {
            w.name: Factors(
                torch.randn(7, w.inputs, generator=generator, dtype=dtype),
                0.1 * torch.randn(7, w.outputs, generator=generator, dtype=dtype),
            )
            for w in weights
        }
        made.transform(rows)
    return made.eval()


@pytest.fixture
def archived(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """archived(kind) -> a tiny (model, tokenizer) and the folder of an archive for it."""

    def make(kind: str = "llama", **changes: Any) -> tuple[Any, Path]:
        pair = (build(kind), tokenizer())
        parts = anatomy(pair[0])
        return pair, write_archive(tmp_path / "archive", hypernet(parts, **changes), parts, training={"step": 3})

    return make


# The edit


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_low_rank_and_leaves_the_model_alone(kind: str, archived: Any) -> None:
    pair, folder = archived(kind)
    before = states(pair[0])
    result = MEND(*pair, hparams(model_name=pair, archive=str(folder))).edit(requests()[:1])
    assert same(pair[0], before)
    assert [delta.name for delta in result.deltas] == names_of(anatomy(pair[0]))
    for delta in result.deltas:
        assert delta.left is not None
        assert delta.left.shape[1] <= len(line(pair[1], *FACTS[0][0:3:2]).ids)
        assert delta.dense().shape == pair[0].get_parameter(delta.name).shape
    assert sorted(result.trace) == [2, 3]
    trace = result.trace[3]
    assert trace.denominator is None
    last = [delta.dense().double().norm() for delta in result.deltas if ".3." in delta.name]
    assert trace.delta_norm == pytest.approx(float(torch.stack(last).norm()), rel=1e-5)


def test_the_update_is_the_learned_rate_times_the_transformed_gradient(archived: Any) -> None:
    """By hand: with the identity network and no normalisation the edit is lr * gradient."""
    pair, folder = archived(norm=False)
    parts = anatomy(pair[0])
    net = Hypernetwork(
        NetworkSpec.of(hparams(norm=False)),
        edited_weights(parts, names_of(parts)),
        edit_lr=-0.5,
        generator=torch.Generator(),
    )
    write_archive(folder, net, parts, training={})
    request = requests()[1]
    result = MEND(*pair, hparams(model_name=pair, archive=str(folder))).edit([request])
    for parameter in pair[0].parameters():
        parameter.requires_grad_(True)
    text = line(pair[1], request.prompt, request.target_new)
    ids = torch.tensor([text.ids])
    logits = pair[0](input_ids=ids).logits[0, list(text.scored)]
    torch.nn.functional.cross_entropy(logits, torch.tensor(text.labels)).backward()
    for delta in result.deltas:
        gradient = pair[0].get_parameter(delta.name).grad
        assert relative(delta.dense(), -0.5 * gradient) < 1e-5


def test_an_edit_of_several_requests_is_the_sum_of_single_edits(archived: Any) -> None:
    pair, folder = archived()
    method = MEND(*pair, hparams(model_name=pair, archive=str(folder)))
    together = method.edit(requests())
    singles = [method.edit([request]) for request in requests()]
    for number, delta in enumerate(together.deltas):
        assert relative(delta.dense(), sum(single.deltas[number].dense() for single in singles)) < 1e-5
    assert [t[2].loss_first for t in together.traces] == pytest.approx(
        [s.trace[2].loss_first for s in singles], rel=1e-5
    )


def test_many_requests_come_as_one_matrix_rather_than_larger_factors(archived: Any) -> None:
    pair, folder = archived()
    method = MEND(*pair, hparams(model_name=pair, archive=str(folder), batch_tokens=64))
    many = [EditRequest.make(f"Number {i} is a", subject=str(i), target_new="river", case_id=i) for i in range(12)]
    result = method.edit(many)
    assert all(delta.full is not None for delta in result.deltas)
    singles = [method.edit([request]) for request in many]
    assert relative(result.deltas[0].dense(), sum(single.deltas[0].dense() for single in singles)) < 1e-5


def test_the_traced_losses_are_those_of_the_model_before_and_after(archived: Any) -> None:
    pair, folder = archived()
    result = MEND(*pair, hparams(model_name=pair, archive=str(folder))).edit(requests()[:1])
    batch = Batch.of([line(pair[1], FACTS[0][0], FACTS[0][2])], torch.device("cpu"), mean=True)
    with torch.no_grad():
        assert result.trace[2].loss_first == pytest.approx(float(nll(scored_logits(pair[0], batch), batch)), rel=1e-5)
        with applied(pair[0], result.deltas):
            assert result.trace[2].loss_last == pytest.approx(
                float(nll(scored_logits(pair[0], batch), batch)), rel=1e-5
            )


def test_lr_scale_scales_the_edit(archived: Any) -> None:
    pair, folder = archived()
    one, half = (
        MEND(*pair, hparams(model_name=pair, archive=str(folder), lr_scale=scale)).edit(requests()[:1])
        for scale in (1.0, 0.5)
    )
    assert relative(half.deltas[1].dense(), 0.5 * one.deltas[1].dense()) < 1e-6


def test_labels_have_the_space_the_input_has() -> None:
    """The reference's training labels lack it; here what is scored is what is read."""
    text = line(tokenizer(bos=True), "The river was", "high")
    ids = tokenizer()("The river was high")["input_ids"]
    assert [*text.ids[1:], text.labels[-1]] == ids
    assert text.ids[0] == 0
    assert 0 not in text.labels
    assert [(*text.ids, text.labels[-1])[p + 1] for p in text.scored] == list(text.labels)


def test_padding_changes_nothing(archived: Any) -> None:
    """A short request beside a long one has the factors it has alone."""
    pair, _ = archived("gpt2")
    parts = anatomy(pair[0])
    weights = edited_weights(parts, names_of(parts))
    lines = [line(pair[1], r.prompt, r.target_new) for r in requests()]
    with frozen(pair[0]):
        together, _ = read_factors(parts, weights, Batch.of(lines, torch.device("cpu"), mean=False))
        for row, text in enumerate(lines):
            alone, _ = read_factors(parts, weights, Batch.of([text], torch.device("cpu"), mean=False))
            for name, pair_ in alone.items():
                assert relative(together[name].delta_ND[row, : len(text.ids)], pair_.delta_ND[0]) < 1e-5


def test_through_the_editor(archived: Any) -> None:
    pair, folder = archived()
    before = states(pair[0])
    editor = BaseEditor(hparams(model_name=pair, archive=str(folder), ppl_sentence_num=4))
    metrics, _, _ = editor.edit(["Paris is in"], ["Italy"], subject=["Paris"], keep_original_weight=True, verbose=False)
    assert metrics[0]["method"] == "MEND"
    assert set(metrics[0]["trace"]) == {"2", "3"}
    assert metrics[0]["post"]["ppl"] is not None
    assert same(pair[0], before)
    editor.edit(["Paris is in", "A bank can"], ["Italy", "reopen"], subject=["Paris", "bank"], verbose=False)
    assert not same(pair[0], before)
    editor.revert_all()
    assert same(pair[0], before)


# Training's two ways are one


VARIANTS = {
    "combined": {},
    "two networks": {"combine": False},
    "one side": {"combine": False, "one_sided": True},
    "x only": {"combine": False, "x_only": True},
    "delta only": {"combine": False, "delta_only": True},
    "a network each": {"shared": False},
    "no norm": {"norm": False},
    "xavier": {"init": "xavier"},
    "mlp": {"mlp_class": "MLP", "hidden_dim": 9, "act": "gelu"},
    "xavier mlp": {"mlp_class": "MLP", "init": "xavier", "n_hidden": 2, "act": "tanh"},
    "no hidden layer": {"n_hidden": 0},
    "full rank": {"rank": None},
}


def passes_agree(kind: str, size: int, **changes: Any) -> None:
    window = {"sliding_window": 64} if kind == "gemma2" else {}  # of 6, pads would have nothing to look at
    model = build(kind, dtype=torch.float64, **window)
    parts = anatomy(model)
    tasks = Tasks(tokenizer(), requests(), seed=0, outer=2, locality=1, longest=128)
    group = [tasks.training(step, size, 0, 1) for step in range(3)]
    found = []
    for make in (PlainPasses, SharedPasses):
        net = hypernet(parts, **changes).train()
        passes = make(parts, net, **({} if make is PlainPasses else {"cache_bytes": 2**20}))
        with frozen(model):
            outcomes = [*passes(group[:1]), *passes(group[1:])]
            torch.stack([o.edit_loss + o.locality_loss for o in outcomes]).sum().backward()
        found.append((outcomes, {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())))
    (plain, plain_grads, plain_stats), (fast, fast_grads, fast_stats) = found
    for a, b in zip(plain, fast, strict=True):
        assert float(a.edit_loss) == pytest.approx(float(b.edit_loss), rel=1e-6)
        assert float(a.locality_loss) == pytest.approx(float(b.locality_loss), rel=1e-5, abs=1e-9)
        assert (a.accuracy, a.locality_drawdown) == (b.accuracy, b.locality_drawdown)
    moved = [name for name, grad in plain_grads.items() if grad is not None and float(grad.norm()) > 0]
    assert moved
    for name in moved:
        assert relative(fast_grads[name], plain_grads[name]) < 1e-5, name
    for name, value in plain_stats.items():
        torch.testing.assert_close(fast_stats[name], value, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_passes_equal_the_plain_ones(kind: str, size: int) -> None:
    passes_agree(kind, size)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_kind_of_network_trains(variant: str) -> None:
    passes_agree("llama", 1, **VARIANTS[variant])


def test_identity_at_the_start_can_learn() -> None:
    """At the start every unit is exactly 0; the gradient there must not be."""
    parts = anatomy(build("llama"))
    weights = edited_weights(parts, names_of(parts))
    net = Hypernetwork(NetworkSpec.of(hparams(norm=False)), weights, edit_lr=1.0, generator=torch.Generator())
    rows = {w.name: Factors(torch.ones(2, w.inputs), torch.ones(2, w.outputs)) for w in weights}
    out = net.transform(rows)
    assert all(torch.equal(out[name].x_NK, rows[name].x_NK) for name in rows)
    sum(pair.x_NK.sum() + pair.delta_ND.sum() for pair in out.values()).backward()
    assert all(float(p.grad.norm()) > 0 for name, p in net.named_parameters() if name.endswith(".u"))


# Archives


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_archive_reads_back(dtype: str, tmp_path: Path) -> None:
    parts = anatomy(build("llama"))
    net = hypernet(parts)
    write_archive(tmp_path, net, parts, training={"step": 1}, dtype=dtype)
    write_archive(tmp_path, net, parts, training={"step": 2}, dtype=dtype)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["hypernet-2.safetensors"]
    again = read_archive(str(tmp_path), parts)
    tolerance = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for key, value in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=max(tolerance, 1e-7), atol=tolerance)
    assert not again.training


def damage(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    raw = json.loads((folder / "archive.json").read_text())
    tensors = load_file(folder / raw["tensors"])
    change(raw, tensors)
    (folder / "archive.json").write_text(json.dumps(raw))
    save_file(tensors, folder / raw["tensors"])


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param(lambda raw, t: raw.pop("network"), DataError, ["not a whole MEND archive", "network"], id="key"),
        pytest.param(lambda raw, t: raw.update(format=9), DataError, ["format 9", "this version reads"], id="format"),
        pytest.param(lambda raw, t: t.pop("edit_lrs"), DataError, ["'edit_lrs' is missing"], id="tensor"),
        pytest.param(lambda raw, t: t.update(x=torch.ones(1)), DataError, ["'x' is not part"], id="surplus"),
        pytest.param(
            lambda raw, t: t.update(edit_lrs=torch.ones(3)), DataError, ["edit_lrs", "(3,), (4,) is needed"], id="shape"
        ),
        pytest.param(lambda raw, t: t["edit_lrs"].fill_(float("nan")), DataError, ["not finite"], id="nan"),
        pytest.param(
            lambda raw, t: [t[key].zero_() for key in t if key.endswith(".k")], DataError, ["never trained"], id="norm"
        ),
        pytest.param(
            lambda raw, t: raw["inner_params"][0].update(inputs=31),
            ModelError,
            ["maps (32, 48)", "(31, 48)"],
            id="width",
        ),
        pytest.param(
            lambda raw, t: raw["inner_params"][0].update(name="model.layers.9.mlp.up_proj.weight"),
            ModelError,
            ["trained for LlamaForCausalLM", "no parameter"],
            id="name",
        ),
        pytest.param(
            lambda raw, t: raw["model"].update(weights="00" * (len(raw["model"]["weights"]) // 2)),
            ModelError,
            ["not for this LlamaForCausalLM", "the weights differ"],
            id="another model",
        ),
    ],
)
def test_a_wrong_archive_is_refused(change: Any, error: Any, parts: list[str], archived: Any) -> None:
    pair, folder = archived()
    damage(folder, change)
    with pytest.raises(error) as caught:
        MEND(*pair, hparams(model_name=pair, archive=str(folder)))
    assert [part for part in (str(folder), *parts) if part not in str(caught.value)] == []


def test_another_architecture_is_refused(archived: Any) -> None:
    _, folder = archived("llama")
    other = (build("gpt2"), tokenizer())
    with pytest.raises(ModelError, match=r"trained for LlamaForCausalLM .* not for this GPT2LMHeadModel"):
        MEND(*other, hparams(model_name=other, archive=str(folder)))


def test_a_missing_archive_says_what_to_run(tmp_path: Path) -> None:
    pair = (build("llama"), tokenizer())
    for archive, part in ((None, "archive is null"), (str(tmp_path / "x"), "holds no archive.json")):
        with pytest.raises(ConfigError, match=part) as caught:
            MEND(*pair, hparams(model_name=pair, archive=archive))
        assert "pretrain_mend.py --hparams hparams/TRAINING/MEND" in str(caught.value)
    (tmp_path / "pickled").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="is a file, perhaps one of upstream's; convert it"):
        MEND(*pair, hparams(model_name=pair, archive=str(tmp_path / "pickled")))


def test_inner_params_must_be_those_of_the_archive(archived: Any) -> None:
    pair, folder = archived()
    names = names_of(anatomy(pair[0]))
    MEND(*pair, hparams(model_name=pair, archive=str(folder), inner_params=names[::-1]))  # the order is the archive's
    with pytest.raises(ConfigError, match="named in only one of the YAML"):
        MEND(*pair, hparams(model_name=pair, archive=str(folder), inner_params=names[:3]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.2.mlp.up.weight", "no parameter of LlamaForCausalLM; it has for example"),
        ("model.embed_tokens.weight", "not the weight of a layer inside"),
        ("model.layers.2.input_layernorm.weight", "not the weight of a layer inside"),
    ],
)
def test_a_weight_that_cannot_be_edited_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        edited_weights(anatomy(build("llama")), [name])


# Upstream's archives


def upstream_file(folder: Path, net: Hypernetwork, model: Any, **more: Any) -> Path:
    """What the reference saves: tensors, the model's config as a live object, the optimiser."""
    state = {key: value.float() for key, value in net.state_dict().items()}
    for key in [key for key in state if key.endswith("_s")]:
        state[key.removesuffix("_s") + "_std"] = torch.ones_like(state[key])
    state = {**state, "model_config": model.config}
    torch.save(
        {"model": state, "opt": {"state": {}}, "step": 70, "val_stats": {"loss": 1.5}, **more}, folder / "MEND.pt"
    )
    return folder / "MEND.pt"


def test_an_upstream_archive_is_read_and_put_right(tmp_path: Path) -> None:
    parts = anatomy(build("llama"))
    net = hypernet(parts)
    path = upstream_file(tmp_path, net, parts.model)
    found, training = read_upstream(path, hparams(inner_params=names_of(parts)), parts)
    assert training == {"step": 70, "converted_from": "MEND.pt"}
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    assert found.trained
    assert isinstance(load_tensors(path)["model"]["model_config"], Inert)


class Hostile:
    """Unpickled by an ordinary unpickler, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Indirect(Hostile):
    """The same through an attribute of an object."""

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_in_an_upstream_archive_runs(tmp_path: Path) -> None:
    parts = anatomy(build("llama"))
    for hostile in (Hostile, Indirect):
        path = upstream_file(tmp_path, hypernet(parts), parts.model, extra=hostile(tmp_path / "was-here"))
        with pytest.raises(DataError, match="cannot be read as a torch archive"):
            load_tensors(path)
        assert not (tmp_path / "was-here").exists()


def test_a_file_that_is_no_upstream_archive_is_refused(tmp_path: Path) -> None:
    parts = anatomy(build("llama"))
    settings = hparams(inner_params=names_of(parts))
    with pytest.raises(DataError, match="no such file"):
        read_upstream(tmp_path / "none", settings, parts)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as a torch archive"):
        read_upstream(tmp_path / "text", settings, parts)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(DataError, match="holds no MEND hypernetwork"):
        read_upstream(tmp_path / "other", settings, parts)
    path = upstream_file(tmp_path, hypernet(parts), parts.model)
    with pytest.raises(DataError, match="made with other settings"):
        read_upstream(path, hparams(inner_params=names_of(parts), rank=5), parts)
    with pytest.raises(ConfigError, match="must name them"):
        read_upstream(path, hparams(), parts)


def test_a_missing_archive_is_found_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"archive: /nowhere holds no archive\.json"):
        BaseEditor(hparams(model_name="/no/model", archive="/nowhere"))
