"""What a training loop of one's own saves: a folder for transformers, and checkpoints from which it
goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import titan_ulysses
from helpers.meshes import DP2, SP2, Degrees, mesh_of
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.runs import working_in
from test_library import Loaded, plain_rows, real_model, whole_parameters
from titan_ulysses import load_checkpoint, parallelize, save_checkpoint, save_pretrained, shard
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError


def loader_of(mesh: Any, steps: int = 3) -> list[Loaded]:
    """Two rows a step, shared among the data-parallel ranks."""
    batches = []
    for step in range(steps):
        rows = make_rows([(23,), (23,)], masked="none", vocab_size=61, seed=step)
        count = 2 // mesh.batch.size()
        batches.append(plain_rows(rows[mesh.batch.get_local_rank() * count :][:count]))
    return batches


class Loop:
    """A model, its optimizer with two groups of parameters, and a learning rate that changes with
    each step.
    """

    def __init__(self, degrees: Degrees = SP2, *, seed: int = 3, **changes: Any) -> None:
        self.mesh = mesh_of(*degrees)
        plain = real_model(
            LLAMA | {"tie_word_embeddings": True} | changes, seed=seed, dtype=torch.float32
        )
        self.model = parallelize(plain, self.mesh)
        norms = [p for name, p in self.model.named_parameters() if "norm" in name]
        others = [p for name, p in self.model.named_parameters() if "norm" not in name]
        self.groups = [
            {"params": others, "weight_decay": 0.1},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(self.groups, lr=1e-2, betas=(0.8, 0.9))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5**step)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for batch in shard(loader_of(self.mesh)[first:last], self.model):
            loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step, "schedule": self.schedule.state_dict()}

    def save(self, folder: Path, step: int, **options: Any) -> None:
        save_checkpoint(folder, self.model, self.optimizer, self.state(step), **options)

    def numbers(self) -> dict[str, Tensor]:
        """Parameters and the optimizer's state."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = {
            f"{names[parameter]}/{key}": value.full_tensor()
            if hasattr(value, "full_tensor")
            else value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        return whole_parameters(self.model) | state


# --- the example ----------------------------------------------------------------------------------


def run_example(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """That of the package's docstring, saving every 2 of its 3 steps: the state, parameters and [2,
    24] losses.
    """
    lines = titan_ulysses.__doc__.split("\n\n")[2]
    code = "\n".join(line.removeprefix("    ") for line in lines.splitlines())
    assert "% 100 ==" in code
    mesh = mesh_of(*SP2)
    names: dict[str, Any] = {"path": str(folder / "before"), "loader": loader_of(mesh)}
    exec(
        "import torch\nfrom itertools import islice\nfrom transformers import AutoModelForCausalLM",
        names,
    )
    exec("from titan_ulysses import *", names)
    names["tokenizer"] = load_tokenizer("bytes")
    with working_in(folder):
        exec(compile(code.replace("% 100 ==", "% 2 =="), "titan_ulysses", "exec"), names)
    (batch,) = shard(loader_of(mesh)[:1], names["model"])
    return (
        names["state"],
        whole_parameters(names["model"]),
        titan_ulysses.score(names["model"], batch),
    )


def test_the_example_from_the_first_step_to_the_saved_folder(tmp_path: Path) -> None:
    """Run twice: the second one goes on from its checkpoint, and leaves the same bits."""
    real_model(LLAMA, dtype=torch.float32).save_pretrained(tmp_path / "before")
    first = run_on_ranks(2, run_example, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    state, parameters, scores = first[0]
    assert state == {"step": 3}
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    assert scores_of(trained) == pytest.approx(scores[:, :22].flatten().tolist(), abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("a").input_ids
    for state, again, _ in run_on_ranks(2, run_example, tmp_path):
        assert state == {"step": 3}
        assert all(torch.equal(again[name], parameters[name]) for name in parameters)


def scores_of(plain: PreTrainedModel) -> list[float]:
    """Log-probabilities of the tokens after the first, of the first batch."""
    ids = loader_of(mesh=OneRank())[0]["input_ids"]
    log_probabilities = plain(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    return log_probabilities.gather(2, ids[:, 1:, None]).flatten().tolist()


class OneRank:
    """As much of a mesh as `loader_of` looks at."""

    class batch:
        @staticmethod
        def size() -> int:
            return 1

        @staticmethod
        def get_local_rank() -> int:
            return 0


# --- checkpoints ----------------------------------------------------------------------------------


def save_and_go_on(
    folder: Path, degrees: Degrees
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    loop = Loop()
    assert load_checkpoint(folder, loop.model, loop.optimizer) == {"step": 0}
    losses = loop.train(0, 2)
    loop.save(folder, 1)  # as if it had come before
    loop.save(folder, 2, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-2"]
    expected = losses + loop.train(2, 3)

    other = Loop(degrees, seed=7)
    state = load_checkpoint(folder, other.model, other.optimizer)
    assert (
        state == loop.state(2) | {"schedule": state["schedule"]}
        and state["schedule"]["last_epoch"] == 2
    )
    other.schedule.load_state_dict(state["schedule"])
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.25e-2] * 2
    assert [group["betas"] for group in other.optimizer.param_groups] == [(0.8, 0.9)] * 2
    found = other.train(2, 3)
    numbers = loop.numbers()
    differences = {
        name: (value - numbers[name]).abs().max().item() for name, value in other.numbers().items()
    }
    assert differences.keys() == numbers.keys()
    return expected, differences, found


@pytest.mark.parametrize(("degrees", "tolerance"), [(SP2, 0.0), (DP2, 1e-5)], ids=["sp2", "dp2"])
def test_a_loop_goes_on_where_it_was_saved(
    degrees: Degrees, tolerance: float, tmp_path: Path
) -> None:
    """With the same bits on the mesh that saved it, learning rate and betas among them; as well on
    another.
    """
    for expected, differences, found in run_on_ranks(
        2, save_and_go_on, tmp_path / "checkpoints", degrees
    ):
        assert found == pytest.approx(expected[2:], rel=tolerance, abs=0)
        assert max(differences.values()) <= tolerance, differences


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return "not refused"


def what_is_refused(folder: Path) -> dict[str, str]:
    loop, rank = Loop(), torch.distributed.get_rank()
    loop.train(0, 1)
    saved, found = folder / "checkpoints", {}
    loop.save(saved, 1)

    def save(state: dict[str, Any]) -> str:
        return refused(lambda: save_checkpoint(saved, loop.model, loop.optimizer, state))

    found["again"] = save({"step": 1})
    found["no step"] = save({"batches": 2})
    found["no JSON"] = save({"step": 2, "generator": torch.zeros(1)})
    found["of rank 1"] = save({"step": 2, "rank": rank})
    sgd = torch.optim.SGD(loop.groups, lr=0.1)
    found["SGD"] = refused(lambda: load_checkpoint(saved, loop.model, sgd))
    one = torch.optim.AdamW(loop.model.parameters())
    found["one group"] = refused(lambda: load_checkpoint(saved, loop.model, one))
    found["other model"] = refused(lambda: load_checkpoint(saved, Loop(intermediate_size=32).model))
    found["no place"] = refused(lambda: save_pretrained(loop.model, folder / "file" / "trained"))
    before = whole_parameters(loop.model)
    assert load_checkpoint(saved, loop.model) == loop.state(1) | {
        "schedule": loop.schedule.state_dict()
    }
    assert all(torch.equal(p, before[name]) for name, p in whole_parameters(loop.model).items())

    found["save_pretrained"] = refused(lambda: loop.model.save_pretrained(folder / "own"))
    found["push_to_hub"] = refused(lambda: loop.model.push_to_hub("a/b"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    found["generate"] = refused(lambda: loop.model.generate(input_ids=ids, max_new_tokens=2))
    found["positional"] = refused(lambda: loop.model(ids))
    found["no documents"] = refused(lambda: loop.model(input_ids=ids, labels=ids))
    return found


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_on_ranks(2, what_is_refused, tmp_path)
    saved = tmp_path / "checkpoints"
    for found in (first, second):
        assert (
            f"{saved} already has a step-1: resume from it with load_checkpoint" in found["again"]
        )
        assert "state has no number \"step\": ['batches']" in found["no step"]
        assert "state is not JSON (Object of type Tensor" in found["no JSON"]
        assert (
            'is {"rank": 1, "step": 2} on rank 1 and {"rank": 0, "step": 2} on rank 0'
            in found["of rank 1"]
        )
        assert (
            "step-1 has the state of AdamW with 2 parameter groups, but this is SGD with 2"
            in found["SGD"]
        )
        assert "AdamW with 2 parameter groups, but this is AdamW with 1" in found["one group"]
        assert found["other model"].startswith(
            f"folder = {saved}: step-1 holds a different model: model.layers.0.mlp."
        )
        assert (
            "Give this run another folder, or restore the settings of the model"
            in found["other model"]
        )
        assert f"{tmp_path / 'file' / 'trained'}: the export failed" in found["no place"]
        for method in ("save_pretrained", "push_to_hub", "generate"):
            assert found[method].startswith(f"model.{method}: ")
            assert "titan_ulysses.save_pretrained(model, folder) on every rank" in found[method]
        assert "takes the batches of `titan_ulysses.shard(loader, model)`" in found["positional"]
        assert found["no documents"] == found["positional"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "file"]
    assert [path.name for path in saved.iterdir()] == ["step-1"]


def from_the_trainer(folder: Path) -> dict[str, Any]:
    loop = Loop()
    loop.train(0, 1)
    Checkpointer(folder, keep=0).save(
        4, loop.model, loop.optimizer, {"loader": {"sequences_consumed": 0}}
    )
    before, other = loop.numbers(), Loop(seed=9)
    state = load_checkpoint(folder, other.model, other.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in other.numbers().items())
    return state


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    assert run_on_ranks(2, from_the_trainer, tmp_path / "checkpoints") == [{"step": 4}] * 2
