"""The fastest settings of a length: the search, its estimates, and what it says."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.families import model_of
from helpers.models import LLAMA
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import UserError

SIX = LLAMA | {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "head_dim": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**24,
}


def setup_of(**settings):
    """section__key = value, over a llama of six layers on GPUs with little memory."""
    from titan_ulysses.plan.planner import set_up

    table: dict = {"model": {"config": SIX, "tokenizer": "bytes"}}
    table |= {"training": {"seq_len": 262144}, "plan": {"world_size": 4, "gpu_memory_gib": 6}}
    for key, value in settings.items():
        section, name = key.split("__")
        table.setdefault(section, {})[name] = value
    return set_up(Config.model_validate(table))


def test_layers_that_a_config_lists_by_place():
    """Each third layer of this bamba has attention, so a period has three layers."""
    from titan_ulysses.plan.layers import cuts

    bamba = model_of("bamba") | {"num_hidden_layers": 12, "max_position_embeddings": 2**20}
    bamba |= {"attn_layer_indices": [2, 5, 8, 11]}
    found = cuts(setup_of(model__config=bamba).spec)
    assert [(cut.few, cut.more) for cut in found] == [(3, 6), (6, 9)]


def small(layers: int = 2, **settings):
    """A setup whose GPUs have half as much again as lean settings need."""
    from titan_ulysses.plan.fastest import LEAN
    from titan_ulysses.plan.planner import make_plan
    from titan_ulysses.plan.search import with_settings

    setup = setup_of(
        model__config=SIX | {"num_hidden_layers": layers},
        training__seq_len=32768,
        plan__world_size=2,
        **settings,
    )
    lean = make_plan(with_settings(setup, LEAN | {"parallelism.sequence_parallel_degree": 2}))
    return replace(setup, gpu_memory=1.1 * lean.gpu_bytes)


def faster_neighbours(setup, best, plan) -> tuple[list, int, int]:
    """Neighbours of the best that fit and are clearly faster, how many there are, and how many of
    them do not fit. Each has one setting changed, or is on another mesh. plan(setup): of a step.
    """
    from titan_ulysses.plan.fastest import CLEARLY, LEAN, neighbours
    from titan_ulysses.plan.search import with_settings

    faster, tried, too_large = [], 0, 0
    for name in (*LEAN, "mesh"):
        for changes in neighbours(setup, best.changes, name):
            other = with_settings(setup, changes)
            try:
                found = plan(other)
            except UserError:
                continue
            tried, too_large = tried + 1, too_large + (not found.fits)
            limit = best.planned.seconds_per_token * (1 - CLEARLY)
            if found.fits and found.seconds_per_token < limit:
                faster.append((changes, found.seconds_per_token))
    return faster, tried, too_large


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 6])
def test_no_neighbour_of_the_fastest_is_faster(layers):
    """Each simulated whole."""
    from titan_ulysses.plan.fastest import Search
    from titan_ulysses.plan.planner import make_plan

    setup = small(layers)
    best, *others = Search(setup).run()
    assert best.is_simulated and all(one.planned.fits for one in (best, *others))
    faster, tried, too_large = faster_neighbours(setup, best, make_plan)
    assert not faster and tried > 8 and too_large


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [8, 64])
def test_no_neighbour_of_the_fastest_llama3_8b_is_faster(gpus):
    """At 1M tokens. Each estimated from few layers, which have the time of all."""
    from titan_ulysses.plan.fastest import Search
    from titan_ulysses.plan.planner import estimate_plan, set_up

    root = Path(__file__).resolve().parents[1]
    changes = {"plan.world_size": gpus, "training.seq_len": 2**20}
    setup = set_up(load_config(root / "configs/llama3_8b.toml", changes.items()))
    best, *_ = Search(setup).run()
    faster, tried, too_large = faster_neighbours(setup, best, estimate_plan)
    print(f"{gpus} GPUs: {tried} neighbours, {too_large} of them too large")
    assert best.is_simulated and not faster and tried > 15


@pytest.mark.slow
def test_with_room_nothing_is_computed_again():
    from titan_ulysses.plan.fastest import Search

    setup = replace(small(), gpu_memory=2**40)
    best = Search(setup).run()[0]
    assert best.changes["activation_checkpoint.mode"] == "none"
    assert not best.changes["memory.optimizer_offload"]


def test_a_search_that_is_interrupted_says_what_it_knows(capsys):
    """Ctrl-C while the fourth settings are estimated."""
    from rich.console import Console

    from titan_ulysses.plan.fastest import Search
    from titan_ulysses.plan.planner import estimate_plan
    from titan_ulysses.plan.searches import tell_fastest

    estimated = []

    def estimate(setup):
        if len(estimated) == 3:
            raise KeyboardInterrupt
        estimated.append(estimate_plan(setup))
        return estimated[-1]

    search = Search(replace(small(), gpu_memory=2**40), estimate)
    found = tell_fastest(Console(), search)
    assert search.is_interrupted and found and not any(one.is_simulated for one in found)
    said = capsys.readouterr().out
    assert "interrupted: the best of 3 settings" in said and "estimated" in said


def test_a_longest_search_that_is_interrupted_keeps_its_results(capsys):
    from rich.console import Console

    from titan_ulysses.plan.search import SearchResult
    from titan_ulysses.plan.searches import tell_longest

    def found():
        yield (first := SearchResult("as configured", {}, None))
        assert first.plan is None
        raise KeyboardInterrupt

    (one,) = tell_longest(Console(), "longest", found())
    said = capsys.readouterr().out
    assert one.what == "as configured" and "does not fit" in said and "interrupted" in said


def test_a_plan_says_first_what_it_plans(tmp_path, capsys, monkeypatch):
    """On standard error, before torch and transformers are looked at."""
    import titan_ulysses.__main__ as command
    from titan_ulysses.plan import report

    said = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command leaves it
    monkeypatch.setattr(report, "plan_and_report", lambda _: said.append(capsys.readouterr()))
    (tmp_path / "x.toml").write_text('job.name = "x"\nmodel.path = "y"\n')
    command.run(["--config", str(tmp_path / "x.toml"), "--plan", "--training.seq_len", "65536"])
    assert said[0].err == "planning x: 65,536 tokens a sequence on H100-80GB\n" and not said[0].out


def test_sums_over_replicas_take_time():
    """Closed form: a ring sends the shards' gradients in fp32 twice, over the network."""
    from titan_ulysses.distributed.hardware import GPUS
    from titan_ulysses.plan.cost import Links

    gpu = GPUS["H100-80GB"]
    nodes = Links(gpus_per_node=8, sequence=8, world=64, replicas=8)
    assert nodes.replica_seconds(1e9, gpu) == 2e9 * 7 / 8 / gpu.network
    assert nodes.fsdp_seconds(8e9, gpu) == 7e9 / gpu.node_link
    inside = Links(gpus_per_node=8, sequence=1, world=8, replicas=4)
    assert inside.replica_seconds(1e9, gpu) == 2e9 * 3 / 4 / gpu.node_link
    halves = Links(gpus_per_node=8, sequence=1, world=32, replicas=8)  # two replicas a node
    assert halves.replica_seconds(1e9, gpu) == pytest.approx(2e9 * 7 / 8 / (2 * gpu.network))


def test_a_mesh_must_deal_the_whole_batch():
    from titan_ulysses.plan.fastest import meshes

    def degrees(**settings):
        return {
            (m["parallelism.data_parallel_replicate_degree"],
             m["parallelism.sequence_parallel_degree"])
            for m in meshes(setup_of(**settings))
        }  # fmt: skip

    assert degrees() == {(1, 1), (1, 2), (1, 4)}
    assert degrees(training__global_batch_size=2, parallelism__sequence_parallel_degree=4) == {
        (1, 2),
        (1, 4),
    }
    assert (4, 2) in degrees(plan__gpus_per_node=2, plan__world_size=8)


def plan_on_the_command_line(folder: Path, capsys, *options: str) -> tuple[dict, str]:
    from titan_ulysses.plan.report import plan_and_report

    settings = {"model.config": SIX, "model.tokenizer": "bytes", "training.seq_len": 4096}
    settings |= {"model.config": SIX | {"num_hidden_layers": 2}}
    settings |= {"job.dump_folder": str(folder), "job.name": "x", "plan.world_size": 2}
    (folder / "x.toml").write_text("")
    from titan_ulysses.config.cli import parse_command_line

    line = parse_command_line(["--config", str(folder / "x.toml"), "--plan", *options])
    plan_and_report(load_config(folder / "x.toml", [*settings.items(), *line.overrides]))
    found = json.loads((folder / "x" / "plan.json").read_text())
    return found, capsys.readouterr().out


def test_the_fastest_on_the_command_line(tmp_path, capsys):
    """With hours, GPU-hours and cost, and settings to paste that plan the same step."""
    options = ["--plan.search", "fastest", "--plan.tokens", "1_000_000_000"]
    options += ["--plan.gpu_hour_price", "2.5", "--plan.gpu_memory_gib", "4"]
    found, said = plan_on_the_command_line(tmp_path, capsys, *options)
    best = found["fastest"][0]
    page = (tmp_path / "x" / "report.html").read_text()
    assert "<h3>The fastest settings that fit</h3>" in page and "<td>simulated</td>" in page
    assert best["simulated"] and best["tokens"] == 10**9
    hours = 1e9 / best["tokens_per_step"] * best["step_seconds"] / 3600
    assert best["hours"] == pytest.approx(hours)
    assert best["gpu_hours"] == pytest.approx(2 * hours)
    assert best["cost"] == pytest.approx(5 * hours)
    pasted = said.split("The fastest that fits")[1].splitlines()[0].split(": ")[-1]
    again, _ = plan_on_the_command_line(tmp_path, capsys, *options[2:], *shlex.split(pasted))
    assert again["step_seconds"] == pytest.approx(best["step_seconds"])
    assert again["run"]["cost"] == pytest.approx(best["cost"]) and again["fastest"] == []


def test_a_search_over_nothing_is_said():
    """No mesh deals the sequences: what is wrong, and no traceback."""
    from io import StringIO

    from rich.console import Console

    from titan_ulysses.plan.fastest import Search
    from titan_ulysses.plan.searches import tell_fastest

    def refuse(setup):
        raise UserError("refused")

    said = StringIO()
    console = Console(file=said, width=200)
    assert tell_fastest(console, Search(setup_of(), estimate=refuse)) == []
    assert "training.seq_len = 262,144 on 4 x H100-80GB: none of" in said.getvalue()
    assert "All are refused: refused" in said.getvalue()
    one = {"parallelism__sequence_parallel_degree": 16, "training__global_batch_size": 1}
    tell_fastest(console, Search(setup_of(plan__world_size=16, **one)))
    assert "All are refused: no mesh divides training.seq_len and" in said.getvalue()


def test_a_loss_whose_hidden_states_stay_on_the_device():
    """The search begins with what such a loss can have. All settings are as good here."""
    from titan_ulysses.plan.fastest import Search
    from titan_ulysses.plan.planner import estimate_plan

    setup = setup_of(
        model__config=SIX | {"num_hidden_layers": 2},
        training__seq_len=4096,
        plan__world_size=2,
        loss__name="dpo",
        data__source="preference",
        data__packing="best_fit",
    )
    one = estimate_plan(setup)
    search = Search(setup, estimate=lambda other: replace(one, setup=other))
    best, *_ = search.run()
    assert best.is_simulated and best.changes["memory.stream_offload"] == "none"
    hidden = [one for key, one in search.tried.items() if ("memory.stream_offload", "host") in key]
    assert hidden and not any(hidden)


@pytest.mark.slow
def test_nothing_that_fits_is_said(tmp_path, capsys):
    found, said = plan_on_the_command_line(
        tmp_path, capsys, "--plan.search", "fastest", "--plan.gpu_memory_gib", "0.01"
    )
    assert found["fastest"] == []
    assert "training.seq_len = 4,096 on 2 x H100-80GB: none of" in said
    assert "Use more GPUs (plan.world_size)" in said


@pytest.mark.parametrize(
    ("given", "search"),
    [("true", "longest"), (None, "longest"), ("false", "off"), ("fastest", "fastest")],
)
def test_a_switch_keeps_its_words(tmp_path, given, search):
    from titan_ulysses.config.cli import parse_command_line

    (tmp_path / "x.toml").write_text('[model]\npath = "x"\ntokenizer = "bytes"\n')
    options = ["--plan.search", *([given] if given else [])]
    line = parse_command_line(["--config", str(tmp_path / "x.toml"), *options])
    assert load_config(tmp_path / "x.toml", line.overrides).plan.search == search


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokens", -1, "plan.tokens = -1: must be at least 0"),
        ("gpu_hour_price", -0.5, "plan.gpu_hour_price = -0.5: must be at least 0"),
        ("search", "slow", 'plan.search = "slow": needs "off", "longest" or "fastest"'),
    ],
)
def test_bad_input(tmp_path, key, value, said):
    (tmp_path / "x.toml").write_text('[model]\npath = "x"\ntokenizer = "bytes"\n')
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "x.toml", [(f"plan.{key}", value)])
    assert said in str(refused.value) and refused.value.exit_code == 2
