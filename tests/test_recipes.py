"""The published long-context recipes in configs/: each loads, and its plan fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_ulysses.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "alst_llama_8b_1gpu": (500_000, 1),
    "alst_llama_8b_8gpu": (3_700_000, 8),
    "alst_llama_8b_32gpu": (15_000_000, 32),
    "alst_llama_70b_32gpu": (4_000_000, 32),
    "trl_qwen3_8b_1m": (1_048_576, 8),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_and_can_be_planned(name: str) -> None:
    from titan_ulysses.plan.planner import set_up

    path = ROOT / "configs" / f"{name}.toml"
    config = load_config(path)
    assert "# Source: " in path.read_text() and config.job.name == name
    setup = set_up(config)
    degrees = setup.degrees
    assert (config.training.seq_len, setup.world_size) == RECIPES[name]
    assert (degrees.replicate, degrees.shard, degrees.sequence) == (1, 1, setup.world_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_of_a_recipe_fits(name: str) -> None:
    from titan_ulysses.plan.planner import make_plan, set_up

    plan = make_plan(set_up(load_config(ROOT / "configs" / f"{name}.toml")))
    print(
        f"{name}: {plan.gpu_bytes / 2**30:.1f} GiB, host {plan.host_bytes / 2**30:.0f} GiB, "
        f"{plan.time.seconds:.0f} s a step"
    )
    assert plan.fits
