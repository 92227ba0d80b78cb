"""The fuzzer, a few inputs a door, always the same ones; `make fuzz MINUTES=10` tries many more (tests/fuzz.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuzz
import fuzz_situations
import pytest
from hypothesis import HealthCheck, Phase, given, settings

INPUTS = {
    **dict.fromkeys(("saved edits", "exports", "MEND archives", "statistics files", "chat templates"), 10),
    **dict.fromkeys(("manifests", "lines of a run"), 15),
}


@pytest.fixture(scope="module")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("fuzz") / "root"
    fuzz.prepare(root)
    fuzz_situations.prepare(root)


@pytest.mark.usefixtures("_prepared")
@pytest.mark.parametrize("door", fuzz.DOORS)
def test_a_wrong_input_is_one_line_and_changes_nothing(door: str, tmp_path: Path) -> None:
    @settings(
        max_examples=INPUTS.get(door, 40),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(tried=fuzz.DOORS[door]())
    def holds(tried: Any) -> None:
        assert fuzz.wrong(tried, tmp_path / "try") is None

    holds()


@pytest.mark.usefixtures("_prepared")
@pytest.mark.parametrize("name", fuzz_situations.SITUATIONS)
def test_a_situation_ends_as_it_should(name: str, tmp_path: Path) -> None:
    for seed in range(2 if name in fuzz_situations.REAL else 12):
        assert fuzz_situations.tried(name, seed, tmp_path) is None, seed
