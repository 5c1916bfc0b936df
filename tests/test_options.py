"""The keywords of `parallelize`, by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory": {"mlp_tile": 3}}, "memory.mlp_tile: no such key; did you mean memory.mlp_tile"),
        ({"offload": "host"}, "offload: no such key; did you mean activation_checkpoint.offload?"),
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
