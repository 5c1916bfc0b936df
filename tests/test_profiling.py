"""Profiles of a run: which steps they are of, that the exchange is in them, and that the run is the
same.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, train, write_run
from titan_ulysses.config.schema import Config, Profiling
from titan_ulysses.config.validate import check
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.profiling import check_profiling

SETTINGS: Settings = {
    "parallelism.sequence_parallel_degree": 2,
    "lr_scheduler.decay_type": "constant",
    "training.global_batch_size": 2,  # one micro-batch: a trace has all that happens in it
}
PROFILED: Settings = {
    "profiling.enable_profiling": True,
    "profiling.profile_freq": 3,
    "profiling.profiler_warmup": 1,
    "profiling.save_traces_folder": "traces",
}


def test_traces_of_chosen_steps(tmp_path: Path) -> None:
    """Steps 3 and 6, on each rank; the run is killed, as it were, after step 4 and goes on."""
    config = write_run(tmp_path)
    for steps in (4, 7):
        settings = SETTINGS | PROFILED | {"training.steps": steps, "job.name": "profiled"}
        run_on_ranks(2, train, config, settings)
    run_on_ranks(2, train, config, SETTINGS | {"training.steps": 7, "job.name": "plain"})
    run, plain = tmp_path / "outputs" / "profiled", tmp_path / "outputs" / "plain"
    assert learned(run) == learned(plain)
    assert not (plain / "traces").exists() and not (plain / "profile_traces").exists()
    files = {f"step-{step}/rank{rank}_trace.json" for step in (3, 6) for rank in (0, 1)}
    assert {
        str(path.relative_to(run / "traces")) for path in (run / "traces").rglob("*.json")
    } == files
    calls = logged(run)[0]["collectives"]["all_to_all"]["calls"]
    for file in files:
        names = [
            event.get("name", "")
            for event in json.loads((run / "traces" / file).read_text())["traceEvents"]
        ]
        assert sum(name == "_c10d_functional::all_to_all_single" for name in names) == calls > 0


def test_settings_that_are_refused() -> None:
    with pytest.raises(
        UserError, match="enable_memory_snapshot = true: .* this run is on cpu. Set it to false"
    ):
        check_profiling(Profiling(enable_memory_snapshot=True), "cpu")
    check_profiling(Profiling(enable_memory_snapshot=True), "cuda")
    table = {
        "model": {"config": {"model_type": "llama"}},
        "profiling": {"enable_profiling": True, "profile_freq": 3},
    }
    with pytest.raises(
        UserError,
        match=r"profile_freq = 3 has no room for profiler_warmup\(3\) \+ .* to at least 4",
    ):
        check(Config.model_validate(table), world_size=1, model_config=None, num_token_ids=0)
    table["profiling"] |= {"profile_freq": 20}
    table["training"] = {"steps": 19}
    with pytest.raises(
        UserError,
        match=r"profile_freq = 20 is more than training.steps = 19: .*Set it to 19 or less",
    ):
        check(Config.model_validate(table), world_size=1, model_config=None, num_token_ids=0)
    table["profiling"]["enable_profiling"] = False
    check(Config.model_validate(table), world_size=1, model_config=None, num_token_ids=0)
