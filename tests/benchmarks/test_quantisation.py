"""The report on quantised formats: geometries keep their proportions, and every format gets a row."""

import json
from pathlib import Path

import pytest

from benchmarks.quantisation import UNIT, main, narrow
from llama4_dist.checkpoint.presets import PRESETS, preset_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_narrow_model_has_the_presets_proportions(name: str) -> None:
    small, large = narrow(name, 8), preset_config(name)
    for key in ("intermediate_size", "intermediate_size_mlp"):
        wanted = small["hidden_size"] * large[key] / large["hidden_size"]
        assert abs(small[key] - wanted) <= UNIT / 2
        assert small[key] % UNIT == 0
    assert small["num_local_experts"] == large["num_local_experts"]


def test_every_format_gets_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    main(["--models", "behemoth", "--layers", "2", "--texts", "1", "--text", "8", "--json", str(out)])
    (rows,) = json.loads(out.read_text())["found"].values()
    assert [row["format"].split(",")[0] for row in rows] == ["float8", "int8", "int4"]
    off = [row["mean_relative_weight_error"] for row in rows]
    assert 0 < off[1] < off[0] < off[2] < 0.2
    assert all(row["positions"] == 7 or row["positions"] == 8 for row in rows)
    assert "behemoth (synthetic)" in capsys.readouterr().out
