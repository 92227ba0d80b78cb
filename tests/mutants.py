"""Do the tests notice? Each mutant is one wrong change to the library; a quick-tier test must fail for it.

    python tests/mutants.py              all of them (make mutants)
    python tests/mutants.py NAME ...     these

A mutant's text must stand exactly once in easyeditor/. It is replaced in a temporary copy of the tree, where no
../shared is, and the tests named for it run until the first failure; where all of them pass, the whole quick tier
runs. Prints a table; exits with 1 if a mutant survives or cannot be made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_S = 900


@dataclass(frozen=True)
class Mutant:
    """One wrong change: `old` becomes `new`; `tests` run first."""

    name: str
    old: str
    new: str
    tests: str


GOLDEN, OTHER, AFTER, PERPLEXITY = (
    f"test_golden.py::test_{name}"
    for name in (
        "rome_and_c_rome",
        "other_settings",
        "perplexity_and_metrics_after_an_edit",
        "perplexity_of_our_sentences",
    )
)
MEMIT, MEND, FT, GRADIENT = "test_memit.py", "test_mend_golden.py", "test_ft.py", "test_gradient_methods.py"
REFILL = "test_refill.py"
MUTANTS = [
    Mutant(
        "value search: KL direction reversed",
        "kl_logs_RV.exp() * (kl_logs_RV - known_RV)",
        "known_RV.exp() * (known_RV - kl_logs_RV)",
        GOLDEN,
    ),
    Mutant(
        "value search: KL row dropped", "kl_factor * drift_RV.sum(dim=1)", "kl_factor * 0 * drift_RV.sum(dim=1)", GOLDEN
    ),
    Mutant("value search: decay's norm not squared", "self.norm_R**2", "self.norm_R", GOLDEN),
    Mutant("value search: long targets weigh more", "1.0 / (len(target) * len(targets))", "1.0 / len(targets)", GOLDEN),
    Mutant("value search: no clamp", "_clamp(self._offsets, self.", "_clamp(self._offsets, 1e9 * self.", GOLDEN),
    Mutant(
        "value search: one pass fewer",
        "len(passes) == search.v_num_grad_steps",
        "len(passes) == search.v_num_grad_steps - 1",
        GOLDEN,
    ),
    Mutant("refill: Adam forgets when rows change", "if known and o in known", "if False", REFILL),
    Mutant(
        "refill: who joins is held to another's first distribution",
        "made._loss.kl_initial_RV = self._loss.kl_initial_RV\n",
        "made._loss.kl_initial_RV = self._loss.kl_initial_RV[:1].expand(len(made._running), -1)\n",
        REFILL,
    ),
    Mutant(
        "refill: nobody takes a place that is left",
        "while self.waiting and self._fits(",
        "while self.waiting and not self.running and self._fits(",
        REFILL,
    ),
    Mutant("value search: stops at ten times the loss", "STOP_LOSS = 0.05", "STOP_LOSS = 0.5", OTHER),
    Mutant("ROME: always C-ROME", "if h.if_c_rome else (plain_K", "if True else (plain_K", GOLDEN),
    Mutant("ROME: the two keys swapped", "rank_one(key_K, whitened_K,", "rank_one(whitened_K, key_K,", GOLDEN),
    Mutant("ROME: C instead of its inverse", "held.solve(keys)", "held.matrix_KK @ keys.double()", GOLDEN),
    Mutant("ROME: u not of unit length", "direction_K / direction_K.norm()", "direction_K", GOLDEN),
    Mutant(
        "delta transposed for Conv1D",
        "transposed = weight_is_transposed(self.parts.rewrite(layer))",
        "transposed = not weight_is_transposed(self.parts.rewrite(layer))",
        GOLDEN,
    ),
    Mutant(
        "tokens: lookup one token late",
        "len(before) + len(subject.rstrip()) - 1",
        "len(before) + len(subject.rstrip())",
        GOLDEN,
    ),
    Mutant(
        "tokens: positions count pads",
        "torch.arange(ids.shape[1], device=device).expand_as(ids)\n    return",
        "torch.arange(ids.shape[1], device=device) + (mask == 0).sum(1, keepdim=True)\n    return",
        GOLDEN,
    ),
    Mutant("tokens: target with two spaces", 'target if target[:1].isspace() else " " + target', '" " + target', FT),
    Mutant(
        "weights: not restored",
        "if not later:\n            restore(model, saved)",
        "if not later:\n            pass",
        AFTER,
    ),
    Mutant("MEMIT: residual not divided", "missing_ND / self.divided_by(i)", "missing_ND / 1", MEMIT),
    Mutant(
        "MEMIT: flat mean of keys",
        "torch.stack([keys_bK.double().mean(0) for keys_bK in own[-len(self.context_groups) :]]).mean(0)",
        "torch.cat(own).double().mean(0)",
        MEMIT,
    ),
    Mutant("MEMIT: C not weighted", ".solve(keys_KN) / self.hparams.scale", ".solve(keys_KN)", MEMIT),
    Mutant(
        "MEMIT: later layers do not see earlier ones",
        "with applied(self.model, deltas):\n                    keys_NK",
        "with applied(self.model, []):\n                    keys_NK",
        MEMIT,
    ),
    Mutant("MEND: sign", "scaled_ND = lr *", "scaled_ND = -lr *", MEND),
    Mutant("MEND: x not normalised", "self._normalised(x_NK, self.u_mean, self.u_s)", "x_NK", MEND),
    Mutant(
        "MEND: statistics move outside training", "if self._spec.norm and self.training:", "if self._spec.norm:", MEND
    ),
    Mutant("FT: no norm constraint", "_hold(copies, start, training.bound)", "_hold(copies, start, None)", FT),
    Mutant("FT: stops at ten times the loss", "DONE_LOSS = 0.01", "DONE_LOSS = 0.1", FT),
    Mutant("LocFT: no EOS", "[*ids, int(tok.eos_token_id)] if prompting.eos", "ids if prompting.eos", GRADIENT),
    Mutant("LocFT: one order for all epochs", "draw.shuffle(order)", "sorted(order)", GRADIENT),
    Mutant("UltraEdit: sign", "return -lr * hats_NW", "return lr * hats_NW", GRADIENT),
    Mutant("UltraEdit: earlier edits forgotten", "self._with(self._memory.state, own)", "own", GRADIENT),
    Mutant("LoRA: scale left out", "up_Dr * layer.scaling[NAME]", "up_Dr * 1", GRADIENT),
    Mutant("LoRA: no dropout", "layer.lora_dropout[NAME].train()", "layer.lora_dropout[NAME].eval()", GRADIENT),
    Mutant(
        "statistics: pads counted",
        "keys_BTK.flatten(0, 1)[place_N.to(keys_BTK.device, non_blocking=True)]",
        "keys_BTK.flatten(0, 1)",
        "test_first_token.py::test_the_moments_are_the_plain_means_over_tokens",
    ),
    Mutant("perplexity: with BOS", "[tok.bos_token_id] if add_start_token else []", "[tok.bos_token_id]", PERPLEXITY),
    Mutant(
        "perplexity: mean weighted by tokens",
        "math.fsum(self.perplexities) / len(self.perplexities)",
        "self.token_weighted",
        PERPLEXITY,
    ),
    Mutant(
        "collapse: not finite is no collapse",
        "not finite or ppl_after > limit",
        "ppl_after > limit",
        "test_editor.py::test_the_verdict",
    ),
    Mutant(
        "scores: one token early",
        "range(len(head) - 1, len(head) + len(tail) - 1)",
        "range(len(head) - 2, len(head) + len(tail) - 2)",
        AFTER,
    ),
    Mutant(
        "locality: against the edited model",
        "zip(before.outputs[key], ids",
        "zip(self.outputs[key], ids",
        AFTER,
    ),
    Mutant(
        "evaluate's locality: against the edited model",
        "agreement(old[pair].predicted, new[pair].predicted)",
        "agreement(new[pair].predicted, new[pair].predicted)",
        "test_metrics.py::test_teacher_forced_metrics_by_hand",
    ),
    Mutant(
        "CounterFact: success reversed",
        "wanted.mean_log_probability > other",
        "wanted.mean_log_probability < other",
        "test_metrics.py::test_teacher_forced_metrics_by_hand",
    ),
    Mutant(
        "adapter: Conv1D's factors not transposed",
        "(left.T, right.T) if transposed else",
        "(left.T, right.T) if False else",
        "test_export.py::test_an_adapter_is_what_vllm_and_peft_read",
    ),
    Mutant(
        "adapter: alpha is not the rank",
        '"lora_alpha": self.rank',
        '"lora_alpha": 2 * self.rank',
        "test_export.py::test_an_adapter_is_what_vllm_and_peft_read",
    ),
    Mutant(
        "case files: neighbours' answers swapped",
        "pair if new_first else pair[::-1]",
        "pair",
        "test_case_files.py::test_case_files_hold_what_summarize_reads",
    ),
]


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code for these tests of the quick tier, and the first that failed."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return 1, f"no end in {LONGEST_S} s"
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return ran.returncode, failed[0].split(" ")[1].removeprefix("tests/") if failed else ran.stdout[-300:]


def place_of(tree: Path, mutant: Mutant) -> Path | None:
    """The one file that holds the mutant's text once; None if there is no such file."""
    held = [
        (path, path.read_text(encoding="utf-8").count(mutant.old)) for path in sorted(tree.glob("easyeditor/**/*.py"))
    ]
    found = [(path, count) for path, count in held if count]
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else None


def tried(tree: Path, mutant: Mutant) -> tuple[str, str, str]:
    """(file, outcome, test that failed) of one mutant."""
    place = place_of(tree, mutant)
    if place is None:
        return "", "NOT MADE", "its text does not stand in easyeditor/ exactly once"
    whole = place.read_text(encoding="utf-8")
    place.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, said = run(tree, [f"tests/{mutant.tests}"])
        if code == 0:
            code, said = run(tree, [])
    finally:
        place.write_text(whole, encoding="utf-8")
    outcome = {0: "SURVIVED", 1: "caught"}.get(code, f"BROKEN (pytest exits with {code})")
    return str(place.relative_to(tree / "easyeditor")), outcome, said if code else ""


def copied(tree: Path) -> None:
    """The tree as git sees it: tracked files, and new ones that it does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if m.name in names] if names else MUTANTS
    if unknown := set(names) - {m.name for m in MUTANTS}:
        raise SystemExit(f"no mutant named {min(unknown)!r}; there are:\n" + "\n".join(m.name for m in MUTANTS))
    with tempfile.TemporaryDirectory() as room:
        tree = Path(room) / "tree"
        copied(tree)
        whole = {m.tests for m in chosen if "::" not in m.tests}
        parts = {m.tests for m in chosen if m.tests.split("::")[0] not in whole}
        code, said = run(tree, [f"tests/{name}" for name in sorted(whole | parts)])
        if code:
            raise SystemExit(f"the tests fail without any mutant: {said}")
        print("| mutant | file | outcome | first test that fails | s |\n|---|---|---|---|---|", flush=True)
        bad = 0
        for mutant in chosen:
            started = time.perf_counter()
            file, outcome, test = tried(tree, mutant)
            bad += outcome != "caught"
            took = time.perf_counter() - started
            print(f"| {mutant.name} | `{file}` | {outcome} | `{test}` | {took:.0f} |", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} mutants caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
