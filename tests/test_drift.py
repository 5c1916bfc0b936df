"""Ranks that drift apart are named before anything is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, refusal, train, write_run
from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.launch.run_store import host_name
from titan_ulysses.train import trainer as trainer_module

SETTINGS: Settings = {
    "training.steps": 6,
    "checkpoint.interval": 2,
    "training.local_batch_size": 1,
    "parallelism.data_parallel_shard_degree": 1,
}
REPLICATED = SETTINGS | {"parallelism.data_parallel_replicate_degree": 4}


def flip(model: Any, optimizer: Any, name: str) -> None:
    """A bit of one number: the lowest of a parameter, and one of the state that lasts a step."""
    p = dict(model.named_parameters())[f"{name}.weight"]
    x = p if optimizer is None else optimizer.state[p]["exp_avg_sq"]
    piece = plain_pieces(x.detach())[0].view(-1)
    piece[3:4].view(torch.int32).bitwise_xor_(1 if optimizer is None else 1 << 20)


def train_with_a_flip(config: Path, settings: Settings, rank: int, *, in_state: bool) -> str:
    train_step, steps = trainer_module.train_step, []

    def erring(model: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        shown = train_step(model, optimizer, *args, **options)
        steps.append(1)
        if len(steps) == 3 and dist.get_rank() == rank:
            flip(model, optimizer if in_state else None, "model.norm")
        return shown

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_step", erring)
        return refusal(config, settings)


@pytest.mark.parametrize("in_state", [False, True])
def test_a_bit_that_flips_on_one_replica(in_state: bool, tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    act = partial(train_with_a_flip, in_state=in_state)
    for message in run_on_ranks(4, act, config, REPLICATED, 2):
        host = host_name()
        assert message.startswith(
            f"the ranks have drifted apart at step 4: rank 2 on {host} differs from rank 0 on "
            f"{host} in the replicated parameters and their optimizer ("
        )
        assert "Nothing of it is saved; the last checkpoint is of step 2." in message
        assert message.count(" differs from ") == 1
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-2"]


def refusal_with(next_batch: Any, config: Path, settings: Settings) -> str:
    """Of a run whose loader has another `next_batch`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_batch", next_batch)
        return refusal(config, settings)


def train_on_other_data(config: Path, settings: Settings) -> str:
    next_batch = Loader.next_batch

    def other(loader: Loader) -> Any:
        batch = next_batch(loader)
        if dist.get_rank() == 1 and loader._consumed == 16:
            loader.read(range(40, 48))
        return batch

    return refusal_with(other, config, settings)


def test_a_sequence_whose_ranks_read_other_samples(tmp_path: Path) -> None:
    settings = SETTINGS | {"parallelism.sequence_parallel_degree": 2}
    settings |= {"training.local_batch_size": 8, "training.global_batch_size": 8}
    for message in run_on_ranks(2, train_on_other_data, write_run(tmp_path), settings):
        assert "at step 2: rank 1 on " in message and " in the data (the last batch)" in message


def test_ranks_that_agree_are_left_alone(tmp_path: Path) -> None:
    more = {"optimizer.name": "adamw8bit", "training.param_dtype": "bfloat16"}
    more |= {"optimizer.stochastic_rounding": True, "training.steps": 3}
    config = write_run(tmp_path)
    shape = {"model.config.hidden_size": 96}
    run_on_ranks(4, train, config, REPLICATED | more | shape)
    assert (tmp_path / "outputs/run/checkpoints/step-3").is_dir()


def train_on_damaged_tokens(config: Path, settings: Settings) -> str:
    """The tokens of the third step are damaged in memory, as those of a mapped file would be."""
    next_batch, batches = Loader.next_batch, []

    def damaged(loader: Loader) -> Any:
        batches.append(1)
        if len(batches) == 3:
            tokens = loader.sequences.corpus.tokens
            damage = (tokens.astype("int32") + 1000,)
            object.__setattr__(loader.sequences.corpus, "tokens", *damage)
        return next_batch(loader)

    return refusal_with(damaged, config, settings)


def test_tokens_outside_of_the_vocabulary_in_the_middle_of_a_run(tmp_path: Path) -> None:
    settings = SETTINGS | {"parallelism.sequence_parallel_degree": 2}
    settings |= {"training.local_batch_size": 8, "training.global_batch_size": 8}
    for message in run_on_ranks(2, train_on_damaged_tokens, write_run(tmp_path), settings):
        assert "outside of the model's vocabulary of 257: its tokens were damaged" in message
    checkpoints = tmp_path / "outputs" / "run" / "checkpoints"
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-2"]
