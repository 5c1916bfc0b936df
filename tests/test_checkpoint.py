"""Checkpoints: the same training on any mesh, whole or not there at all, and told plainly when they
cannot be used.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers import training
from helpers.meshes import Degrees
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from titan_ulysses.checkpoint import manifest, step_folder, writing
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.checkpoint.manifest import read_json, write_json
from titan_ulysses.checkpoint.step_folder import steps_in
from titan_ulysses.distributed.errors import UserError

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
ROWS = make_rows([(24,), (16, 8), (8, 16), (24,)], masked="none", vocab_size=61, seed=0)
RUN_STATE = {"loader": {"sequences_consumed": 8}, "rng": {"seed": 0}}


class Run(training.Run):
    """In fp64; the values of a fresh one are those of `seed`."""

    def __init__(self, degrees: Degrees, *, seed: int = 0, **changes: Any):
        super().__init__(degrees, {**MODEL, **changes}, ROWS, seed=seed)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 0.0
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert (found[name] - tensor).abs().max() <= tolerance, name


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was wrong")


# --- the same training on any mesh ----------------------------------------------------------------


def save_and_go_on(degrees: Degrees, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State at the checkpoint (two steps) and two steps later."""
    run = Run(degrees).train(2)
    saved = run.whole()
    Checkpointer(folder, keep=0).save(2, run.model, run.optimizer, RUN_STATE)
    return saved, run.train(2).whole()


def resume(
    degrees: Degrees, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    run = Run(degrees, seed=1)  # other values, and an optimizer that has no state yet
    checkpointer = Checkpointer(folder, keep=0)
    state = checkpointer.load(checkpointer.latest(), run.model, run.optimizer)
    return state, run.whole(), run.train(2).whole()


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    [(before, after), _] = run_on_ranks(2, save_and_go_on, (1, 1, 2), folder)
    return folder, before, after


@pytest.mark.parametrize(
    "degrees", [(1, 1, 2), (2, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)], ids=str
)
def test_resume_on_any_mesh(degrees: Degrees, saved: tuple[Path, dict, dict]) -> None:
    folder, before, after = saved
    replicate, shard, sequence = degrees
    same_mesh = degrees == (1, 1, 2)
    for state, loaded, trained in run_on_ranks(
        replicate * shard * sequence, resume, degrees, folder
    ):
        assert {name: state[name] for name in RUN_STATE} == RUN_STATE
        assert state["step"] == 2
        assert_same(loaded, before)
        assert_same(trained, after, tolerance=0.0 if same_mesh else 1e-12)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    # A checkpoint that changes nothing would pass what stands above.
    assert len(moved) == len(before)
    kinds = {name.split("/")[-1] for name in before if "/" in name}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"}


# --- which checkpoints there are ------------------------------------------------------------------


def save_steps(folder: Path) -> dict[str, Any]:
    run, found = Run((1, 1, 2)), {}
    partial_folder = folder / ".step-1.partial"
    if dist.get_rank() == 0:
        partial_folder.mkdir(parents=True)
        (partial_folder / "__9_0.distcp").write_text("left over")
    dist.barrier()

    def steps(keep: int, *wanted: int) -> tuple[list[str], int | None]:
        checkpointer = Checkpointer(folder, keep=keep)
        for step in wanted:
            checkpointer.save(step, run.model, run.optimizer, {})
        dist.barrier()
        names = sorted(path.name for path in folder.iterdir())
        dist.barrier()
        return names, checkpointer.latest()

    found["none yet"] = steps(2)
    found["over a partial one"] = steps(2, 1)
    found["keep 2"] = steps(2, 2, 10)
    found["keep all"] = steps(0, 11, 12)
    run.train(1)
    Checkpointer(folder, keep=0).save(12, run.model, run.optimizer, {"mark": "again"})
    found["again"] = Checkpointer(folder, keep=0).read_state(12).get("mark")
    found["files"] = sorted(path.name for path in (folder / "step-12").iterdir())
    found["keep 1"] = steps(1, 13)
    found["no folder"] = Checkpointer(folder / "nothing", keep=1).latest()
    return found


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    for found in run_on_ranks(2, save_steps, tmp_path / "checkpoints"):
        assert found["none yet"] == ([".step-1.partial"], None)
        assert found["over a partial one"] == (["step-1"], 1)
        assert found["keep 2"] == (["step-10", "step-2"], 10)
        assert found["keep all"] == (["step-10", "step-11", "step-12", "step-2"], 12)
        assert found["again"] is None, "a step that was there has been written again"
        assert found["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp", "run.json"]
        assert found["keep 1"] == (["step-13"], 13)
        assert found["no folder"] is None


# --- what cannot be loaded ------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def break_run_file(path: Path, text: str) -> None:
    (path / "run.json").write_text(text)


def flip(path: Path, at: int, *, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def swap(step: Path) -> None:
    """As two files that are equally long can be."""
    first, second = step / "__0_0.distcp", step / "__1_0.distcp"
    data = first.read_bytes(), second.read_bytes()
    size = min(map(len, data))
    first.write_bytes(data[1][:size].ljust(len(data[0]), b"\0"))
    second.write_bytes(data[0][:size].ljust(len(data[1]), b"\0"))


def edit(step: Path, **changes: Any) -> None:
    """As an editor does, which knows nothing of a checksum."""
    told = json.loads((step / "run.json").read_text())
    (step / "run.json").write_text(json.dumps(told | changes))


def rewrite(folder: Path, **changes: Any) -> None:
    """With a checksum that is right. None removes a field."""
    told = read_json(folder / "run.json")
    told = {name: value for name, value in (told | changes).items() if value is not None}
    write_json(folder / "run.json", told)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# How a checkpoint is damaged, and what the message says. Those in TENSORS are found while reading.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda step: cut(step / "__1_0.distcp"), "__1_0.distcp has "),
    "missing": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a folder": (lambda step: as_folder(step / "__0_0.distcp"), "__0_0.distcp is not a file"),
    "metadata": (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
    "zeros in .metadata": (
        lambda step: (step / ".metadata").write_bytes(bytes((step / ".metadata").stat().st_size)),
        ".metadata: the bytes 0 to ",
    ),
    "a bit of .metadata": (lambda step: flip(step / ".metadata", -9), ".metadata: the bytes 0 to "),
    "no run.json": (lambda step: (step / "run.json").unlink(), "run.json is missing"),
    "a folder run.json": (lambda step: as_folder(step / "run.json"), "run.json is not a file"),
    "empty run.json": (partial(break_run_file, text=""), "run.json: it is empty"),
    "half run.json": (lambda step: cut(step / "run.json"), "run.json: it is not JSON: "),
    "other run.json": (partial(break_run_file, text='["files"]'), "run.json: it holds a list"),
    "poor run.json": (partial(rewrite, step=None), "run.json: step is missing"),
    "position": (
        partial(edit, loader={"sequences_consumed": 9}),
        "run.json: its contents differ from what was",
    ),
    "no checksum": (partial(edit, checksum=None), "run.json: checksum is missing"),
    "an untyped position": (
        partial(rewrite, loader={"sequences_consumed": "8"}),
        "run.json: loader is {'sequences_consumed': '8'}, which is not a valid value",
    ),
    "no position": (partial(rewrite, loader=None), "run.json: loader is missing"),
    "no seed": (partial(rewrite, rng=None), "run.json: rng is missing"),
    "another step": (partial(rewrite, step=3), "run.json: step is 3, and the folder is named"),
}
TENSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (lambda step: flip(step / "__1_0.distcp", 5000), "__1_0.distcp: the bytes "),
    "the last bit": (lambda step: flip(step / "__0_0.distcp", -1, bit=7), "__0_0.distcp: the "),
    "zeros": (
        lambda step: (step / "__1_0.distcp").write_bytes(
            bytes((step / "__1_0.distcp").stat().st_size)
        ),
        "__1_0.distcp: the bytes ",
    ),
    "swapped": (swap, "_0.distcp: the bytes "),
}


def try_to_load(folders: list[Path], **changes: Any) -> list[tuple[str, bool]]:
    """The message for each folder's last step, and whether the model kept its bits."""
    run = Run((1, 1, 2), seed=1, **changes)
    before, found = run.local(), []
    for folder in folders:
        checkpointer = Checkpointer(folder, keep=0)
        message = error_of(
            lambda c=checkpointer: c.load(
                c.latest(), run.model, run.optimizer, needs=("loader", "rng")
            )
        )
        found.append(
            (message, all(map(torch.equal, run.local(), before)) and not run.optimizer.state)
        )
    return found


def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    saved: tuple, tmp_path: Path
) -> None:
    for case, (damage, _) in DAMAGES.items():
        shutil.copytree(saved[0], tmp_path / case)
        damage(tmp_path / case / "step-2")
    shutil.copytree(saved[0] / "step-2", tmp_path / "truncated" / "step-1")
    for found in run_on_ranks(2, try_to_load, [tmp_path / case for case in DAMAGES]):
        for (case, (_, reason)), (message, unchanged) in zip(DAMAGES.items(), found, strict=True):
            assert message.startswith(
                f"checkpoint.folder = {tmp_path / case}: step-2 is damaged ("
            ), message
            assert reason in message
            remedy = (
                "to resume from step 1." if case == "truncated" else "to start from the beginning."
            )
            assert message.endswith(f"Remove it {remedy}")
            assert "\n" not in message
            assert unchanged, case


def test_tensors_that_are_damaged_are_refused_too(saved: tuple, tmp_path: Path) -> None:
    """What was read before may have changed the model already."""
    for case, (damage, _) in TENSORS.items():
        shutil.copytree(saved[0], tmp_path / case)
        damage(tmp_path / case / "step-2")
    for found in run_on_ranks(2, try_to_load, [tmp_path / case for case in TENSORS]):
        for (case, (_, reason)), (message, _) in zip(TENSORS.items(), found, strict=True):
            assert message.startswith(
                f"checkpoint.folder = {tmp_path / case}: step-2 is damaged (rank "
            ), message
            assert reason in message


def take_the_newest(folder: Path) -> dict[str, Any]:
    """Steps 1 to 4, of which 4 and 3 are damaged: what is said, taken and left."""
    run, told, found = Run((1, 1, 2)), [], {}
    checkpointer = Checkpointer(folder, keep=0, say=told.append)
    states = {}
    for step in (1, 2, 3, 4):
        run.train(1)
        states[step] = run.whole()
        checkpointer.save(step, run.model, run.optimizer, RUN_STATE)
    dist.barrier()
    if dist.get_rank() == 0:
        flip(folder / "step-4" / "__1_0.distcp", 5000)
        shutil.copy(folder / "step-2" / "__0_0.distcp", folder / "step-3")
    dist.barrier()
    other = Run((1, 1, 2), seed=1)
    found["taken"], state = checkpointer.load_newest([1, 2, 3, 4], other.model, other.optimizer)
    assert state["step"] == 2
    assert_same(other.whole(), states[2])
    checkpointer.set_damaged_aside()
    dist.barrier()
    found["names"] = sorted(path.name for path in folder.iterdir())
    found["told"] = told
    dist.barrier()
    checkpointer.save(3, other.train(1).model, other.optimizer, RUN_STATE)
    assert checkpointer.load_newest([3], other.model, other.optimizer)[0] == 3
    dist.barrier()
    if dist.get_rank() == 0:
        for step in (1, 2, 3):
            flip(folder / f"step-{step}" / "__0_0.distcp", 7000)
    dist.barrier()
    found["none"] = error_of(
        lambda: checkpointer.load_newest([1, 2, 3], other.model, other.optimizer)
    )
    return found


def test_the_newest_whole_checkpoint_is_taken_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for found in run_on_ranks(2, take_the_newest, folder):
        assert found["taken"] == 2
        assert found["names"] == ["step-1", "step-2", "step-3.damaged", "step-4.damaged"]
        warning = found["told"][0]
        assert warning.startswith(f"WARNING: checkpoint.folder = {folder}: step-4 is damaged (")
        assert "__1_0.distcp: the bytes" in warning and "; step-3 is damaged (" in warning
        assert "Resuming from step 2, the newest intact checkpoint before it." in warning
        assert len(found["told"]) == 3
        assert "no checkpoint is intact: step-3 is damaged (" in found["none"]
        assert found["none"].endswith("Remove them to start from the beginning.")


def load_what_is_closed(folder: Path) -> list[str]:
    """A checkpoint in a folder that cannot be listed."""
    checkpointer, run, found = Checkpointer(folder, keep=0), Run((1, 1, 2), seed=1), []
    with pytest.MonkeyPatch.context() as patch:

        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied", str(folder))

        patch.setattr(os, "listdir", denied)
        found.append(error_of(checkpointer.steps))
        patch.setattr(Path, "read_text", denied)
        found.append(error_of(lambda: checkpointer.load(2, run.model, run.optimizer)))
    return found


def test_what_is_closed_is_an_error(saved: tuple) -> None:
    folder = saved[0]
    for errors in run_on_ranks(2, load_what_is_closed, folder):
        for error in errors:
            assert error.startswith(f"checkpoint.folder = {folder}: cannot be read (")
            assert "Permission denied" in error and "Nothing was changed." in error


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"hidden_size": 40}, "model.embed_tokens.weight is [61, 32] there and [61, 40] here."),
        (
            {"num_hidden_layers": 3},
            "model.layers.2.self_attn.q_proj.weight is absent there and [32, 32] here.",
        ),
        (
            {"num_hidden_layers": 1},
            "model.layers.1.self_attn.q_proj.weight is [32, 32] there and absent here.",
        ),
    ],
    ids=str,
)
def test_another_model_is_refused(
    changes: dict, difference: str, saved: tuple[Path, dict, dict]
) -> None:
    for [(message, unchanged)] in run_on_ranks(2, try_to_load, [saved[0]], **changes):
        assert message.startswith(
            f"checkpoint.folder = {saved[0]}: step-2 holds a different model: {difference}"
        )
        assert "Give this run another job.name" in message
        assert unchanged


def save_where_one_rank_sees_nothing(folder: Path) -> tuple[list[int], list[int]]:
    """Save a step again that rank 1 does not see: when its files were written, before and after."""

    def written() -> list[int]:
        return [file.stat().st_mtime_ns for file in sorted((folder / "step-1").iterdir())]

    run, checkpointer = Run((1, 1, 2)).train(1), Checkpointer(folder, keep=1)
    checkpointer.save(1, run.model, run.optimizer, RUN_STATE)
    before = written()
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Path, "exists", lambda self: False)
        checkpointer.save(1, run.model, run.optimizer, RUN_STATE)
    return before, written()


def test_a_rank_with_an_old_view_of_the_folder_removes_nothing(tmp_path: Path) -> None:
    for before, after in run_on_ranks(2, save_where_one_rank_sees_nothing, tmp_path / "saved"):
        assert before == after and before


# --- what the ranks have written is what is published ---------------------------------------------


def lose(kind: str, folder: Path, kept: Path) -> None:
    """Do to the file of rank 1, in a folder that is to be published, what a lost write does."""
    file = folder / "__1_0.distcp"
    if kind == "missing":
        file.unlink()
    elif kind == "short":
        cut(file)
    else:  # its bytes of the save before, of the same size
        shutil.copyfile(kept / file.name, file)


def publish_without(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Fail to save step 2 in each way; the messages, and the folder after each."""
    run, checkpointer, found = Run((1, 1, 2)).train(1), Checkpointer(folder, keep=1), {}
    checkpointer.save(1, run.model, run.optimizer, RUN_STATE)
    run.train(1)
    for kind in ("missing", "short", "stale"):

        def publish(aside: Path, *rest: Any, kind: str = kind, **more: Any) -> None:
            lose(kind, aside, folder / "step-1")
            step_folder.publish(aside, *rest, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "publish", publish)
            patch.setattr(manifest, "_VIEW_SECONDS", 0.0)
            message = error_of(lambda: checkpointer.save(2, run.model, run.optimizer, RUN_STATE))
        dist.barrier()
        found[kind] = message, sorted(path.name for path in folder.iterdir())
        dist.barrier()
    return found


def test_a_checkpoint_that_lacks_what_a_rank_wrote_is_not_published(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = run_on_ranks(2, publish_without, folder)
    assert first == second
    told = {"missing": "No such file", "short": "bytes", "stale": "differ from what was saved"}
    for kind, (message, files) in first.items():
        assert message.startswith(f"checkpoint.folder = {folder}: saving step 2 failed ("), kind
        assert "__1_0.distcp" in message and told[kind] in message, (kind, message)
        assert "The checkpoint of step 1 is intact" in message and files == ["step-1"], kind


def killed_while_pruning(folder: Path) -> None:
    run, checkpointer = Run((1, 1, 1)).train(1), Checkpointer(folder, keep=1)
    checkpointer.save(1, run.model, run.optimizer, RUN_STATE)

    def half(gone: Path, **_: Any) -> None:
        if gone.exists():
            next(gone.glob("*.distcp")).unlink()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        checkpointer.save(2, run.model, run.optimizer, RUN_STATE)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_by_its_name(tmp_path: Path) -> None:
    run_on_ranks(1, killed_while_pruning, tmp_path)
    assert steps_in(tmp_path) == [2] and (tmp_path / ".step-1.partial").is_dir()


# --- a disk that fills up -------------------------------------------------------------------------


def with_full_disk(ranks: list[int], limit: int, act: Callable[[], str]) -> str:
    """Let no file of these ranks grow beyond limit bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if dist.get_rank() in ranks:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def fill_the_disk(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Save step 1, then fail to save step 2 in every way; returns the messages and the folder after
    each.
    """
    run, checkpointer, found = Run((1, 1, 2)).train(1), Checkpointer(folder, keep=1), {}
    save = partial(checkpointer.save, model=run.model, optimizer=run.optimizer, state=RUN_STATE)
    save(1)
    expected = run.whole()
    run.train(1)

    def fail(case: str, act: Callable[[], str]) -> None:
        message = act()
        dist.barrier()
        found[case] = (message, sorted(path.name for path in folder.iterdir()))
        dist.barrier()

    for case, ranks in {"all ranks": [0, 1], "rank 0": [0], "rank 1": [1]}.items():
        fail(
            case,
            lambda ranks=ranks: with_full_disk(ranks, 20_000, lambda: error_of(partial(save, 2))),
        )
    with pytest.MonkeyPatch.context() as patch:  # only rank 0 publishes
        patch.setattr(json, "dump", no_space)
        fail("run.json", lambda: error_of(partial(save, 2)))

    for parameter in run.model.parameters():
        nn.init.constant_(parameter, 7.0)
    checkpointer.load(1, run.model, run.optimizer)
    assert_same(run.whole(), expected)
    save(2)
    found["space again"] = ("", sorted(path.name for path in folder.iterdir()))
    return found


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rank_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = run_on_ranks(2, fill_the_disk, folder, timeout=60)
    assert first == second
    _, files = first.pop("space again")
    assert files == ["step-2"]
    assert first.keys() == {"all ranks", "rank 0", "rank 1", "run.json"}
    for case, (message, files) in first.items():
        assert message.startswith(f"checkpoint.folder = {folder}: saving step 2 failed ("), case
        assert (
            "The checkpoint of step 1 is intact; free space or change job.dump_folder" in message
        ), case
        assert files == ["step-1"], case


def save_where_no_folder_can_be(folder: Path) -> str:
    run = Run((1, 1, 2))
    return error_of(
        lambda: Checkpointer(folder, keep=1).save(1, run.model, run.optimizer, RUN_STATE)
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for message in run_on_ranks(
        2, save_where_no_folder_can_be, tmp_path / "file" / "checkpoints", timeout=30
    ):
        assert message.startswith(
            f"checkpoint.folder = {tmp_path / 'file' / 'checkpoints'}: saving step 1 failed ("
        )
        assert "Not a directory" in message
        assert "intact" not in message
