"""The keywords of `parallelize`, by themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from helpers.options import sections
from titan_ulysses.config.load import config_of
from titan_ulysses.config.schema import Memory
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.setup.options import ParallelOptions, options_of
from titan_ulysses.setup.parallelize import parallelize

NONE = ParallelOptions()


def test_a_table_changes_only_its_keys() -> None:
    first = NONE.changed(memory={"mlp_tile_tokens": 3}, param_dtype="bfloat16")
    second = first.changed(memory={"loss_tile_tokens": "all"}, attention="sdpa")
    assert second.memory == Memory(mlp_tile_tokens=3, loss_tile_tokens=-1)
    assert (second.param_dtype, second.attention) == (torch.bfloat16, "sdpa")
    assert second.changed(memory=Memory()).memory == Memory()
    assert NONE.resolved(torch.float64).reduce_dtype == torch.float64


def test_a_config_and_its_tables_mean_the_same() -> None:
    tables: dict[str, Any] = {
        "activation_checkpoint": {"every": 2, "offload": "disk", "offload_folder": "/x"},
        "memory": {"stream_chunk_tokens": 64, "parameter_offload": True},
        "compile": {"enable": True},
    }
    training = {"z_loss": 0.1, "param_dtype": "float32", "reduce_dtype": "float32"}
    config = config_of({"model": {"path": "x"}, "training": training, **tables})
    assert options_of(config, len) == NONE.changed(attention=len, **tables, **training)  # type: ignore[arg-type]


OLDER = [
    ({"offload": "host", "checkpoint_every": 2}, {"offload": "host", "checkpoint_every": 2}),
    ({"checkpoint_every": 0, "compile": True}, {"checkpoint_every": 0, "compile": True}),
    ({"offload_folder": None, "mlp_tile_tokens": 7, "keep_attention": "all"}, None),
]


@pytest.mark.parametrize(("older", "settings"), OLDER)
def test_keywords_of_earlier_versions(
    older: dict[str, Any], settings: dict[str, Any] | None
) -> None:
    settings = settings or {"mlp_tile_tokens": 7, "keep_attention": "all"}
    for make in (NONE.changed, ParallelOptions):
        with pytest.warns(FutureWarning, match="have the names of a config file now: ") as told:
            found = make(**older)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # What the warning shows can be written.
            shown = str(told[0].message).split("now: ")[1].split(". A later")[0]
            assert eval(f"NONE.changed({shown})") == found == NONE.changed(**sections(**settings))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory": {"mlp_tile": 3}}, "memory.mlp_tile: no such key; did you mean memory.mlp_tile"),
        ({"memry": {}}, "[memry]: no such section; did you mean [memory]?"),
        ({"memory": {"mlp_tile_tokens": -2}}, "memory.mlp_tile_tokens = -2: must be at least -1"),
        (
            {"activation_checkpoint": {"offload": "hots"}},
            'activation_checkpoint.offload = "hots": needs "none", "host" or "disk"',
        ),
        (
            {"activation_checkpoint": {"mode": "none", "offload": "host"}},
            'activation_checkpoint.offload = "host" moves checkpoints, and '
            'activation_checkpoint.mode = "none" makes none: set ',
        ),
        ({"memory": {"optimizer_offload": True}}, "memory.optimizer_offload = true: it is about"),
    ],
)
def test_what_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parallelize(torch.nn.Linear(1, 1).double(), None, **keywords)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
