"""Settings that meet in the same place, together, through `Trainer`: each still does what it does
alone.
"""

from __future__ import annotations

import pytest

from helpers.material import BASE, MODEL
from helpers.observed import Observer, bytes_of, labels, losses, near, norms, same_weights
from helpers.runs import Settings

EMBEDDING = "model.embed_tokens.weight"
# Each document a sequence, all of them held out too.
COUNTED: Settings = {
    "data.packing": "none",
    "training.seq_len": 256,
    "validation.enable": True,
    "validation.steps": 0,
    "validation.path": "$MATERIAL/texts",
}
DEEPER: Settings = {"model.config": MODEL | {"num_hidden_layers": 3}}
STORES: dict[str, Settings] = {
    "host": {"activation_checkpoint.offload": "host"},
    "disk": {"activation_checkpoint.offload": "disk"},
    "parameters": {"memory.parameter_offload": True},
    "state": {"memory.optimizer_offload": True},
    "all": {
        "activation_checkpoint.offload": "disk",
        "memory.parameter_offload": True,
        "memory.optimizer_offload": True,
    },
}
OPTIMIZERS: dict[str, Settings] = {
    "adamw": {},
    "adamw8bit": {"optimizer.name": "adamw8bit"},
    "adamw4bit": {"optimizer.name": "adamw4bit"},
    "rounded": {"optimizer.stochastic_rounding": True, "training.param_dtype": None},
    "rounded 8bit": {
        "optimizer.name": "adamw8bit",
        "optimizer.stochastic_rounding": True,
        "training.param_dtype": None,
    },
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_with_every_offload(optimizer: str, store: str, observe: Observer) -> None:
    """To the bit: where things wait changes no number."""
    plain, run = (observe(BASE | OPTIMIZERS[optimizer] | more) for more in ({}, STORES[store]))
    assert not run.refused and run.initial, run.refused
    assert losses(run) == losses(plain) and norms(run) == norms(plain) and same_weights(run, plain)
    assert run.moved() > 0
    size = 2 if "rounded" in optimizer else 4
    leaves = "activation_checkpoint.offload" in STORES[store]
    assert run.facts["buffers"] == (2 * [size * 32 * 64] if leaves else [])


@pytest.mark.parametrize("store", ["host", "disk"])
def test_offload_with_accumulation_and_blocks_a_checkpoint(store: str, observe: Observer) -> None:
    """A buffer a segment, used again by each of the accumulated batches."""
    settings = BASE | DEEPER | {"training.global_batch_size": 3}
    plain, whole = observe(settings), observe(BASE | DEEPER | {"training.local_batch_size": 3})
    run = observe(settings | STORES[store] | {"activation_checkpoint.every": 2})
    assert "(3 accumulated)" in run.said and run.facts["buffers"] == 2 * [4 * 32 * 64]
    assert near(losses(run), losses(plain)) and near(norms(run), norms(plain))
    assert near(losses(run), losses(whole)) and near(norms(run), norms(whole))


WINDOWED: Settings = {"model.config": MODEL | {"model_type": "mistral", "sliding_window": 5}}


def test_packing_with_windows(observe: Observer) -> None:
    """Held-out documents have the loss that they have alone in a sequence, and windows count."""
    settings = BASE | WINDOWED | COUNTED
    alone = observe(settings)
    packed = observe(settings | {"data.packing": "best_fit"})
    assert labels(packed) == labels(alone) == bytes_of(alone, "texts") - 20
    assert near(packed.of_validations("loss")[0], alone.of_validations("loss")[0])
    wide = observe(settings | {"model.config": WINDOWED["model.config"] | {"sliding_window": 256}})
    assert not near(wide.of_validations("loss")[0], alone.of_validations("loss")[0])
    end_to_end = observe(settings | {"data.packing": "concat", "training.seq_len": 32})
    assert end_to_end.moved() > 0, end_to_end.refused


def test_freezing_with_weight_decay(observe: Observer) -> None:
    """Nothing pulls at what is frozen, and the rest shrinks as it does without."""
    settings = BASE | {
        "model.freeze": ["model.embed_tokens.*", "*.mlp.*"],
        "optimizer.weight_decay": 100.0,
    }
    run, light = observe(settings), observe(settings | {"optimizer.weight_decay": 0.0})
    frozen = {name for name in run.initial if name == EMBEDDING or ".mlp." in name}
    assert len(frozen) == 7 and run.kept() == frozen == light.kept()
    for name in run.initial.keys() - frozen:
        assert run.weights[name].norm() < 0.98 * light.weights[name].norm(), name


EXPERTS = MODEL | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
EXPERTS |= {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.1}


def test_z_loss_with_router_losses(observe: Observer) -> None:
    """Each adds what it adds alone, and neither reaches the validation."""
    found = {}
    for router in (False, True):
        for z_loss in (0.0, 0.01):
            table = {
                "model.config": EXPERTS | {"output_router_logits": router},
                "training.z_loss": z_loss,
            }
            found[router, z_loss] = observe(BASE | table | {"validation.enable": True})
    first = {key: losses(run)[0] for key, run in found.items()}
    plain, router, both = found[False, 0.0], found[True, 0.0], found[True, 0.01]
    assert near(first[True, 0.01] - first[True, 0.0], first[False, 0.01] - first[False, 0.0])
    assert first[False, 0.01] > 1.01 * first[False, 0.0]
    assert near(first[True, 0.0] - first[False, 0.0], 0.1 * router.of_steps("router_loss")[0])
    assert both.of_steps("router_loss")[0] == router.of_steps("router_loss")[0] > 0
    assert plain.of_steps("router_loss") == [None, None]
    assert len({run.of_validations("loss")[0] for run in found.values()}) == 1
    assert not near(norms(both), norms(router))


COMPILED: dict[str, Settings] = {
    "host": STORES["host"],
    "disk, k blocks": DEEPER | STORES["disk"] | {"activation_checkpoint.every": 2},
    "parameters": STORES["parameters"],
    "LoRA": {"lora.rank": 4, "optimizer.lr": 1e-2},
    "adamw8bit": OPTIMIZERS["adamw8bit"],
    "adamw4bit": OPTIMIZERS["adamw4bit"],
    "rounded": OPTIMIZERS["rounded"],
}


@pytest.mark.slow  # test_compile.py has a compiled run with checkpoints on the host
@pytest.mark.parametrize("name", COMPILED)
def test_compile_with(name: str, observe: Observer) -> None:
    if name == "LoRA":
        pytest.importorskip("peft")
    settings = BASE | COMPILED[name]
    eager, run = observe(settings), observe(settings | {"compile.enable": True})
    assert run.facts.get("graphs", 0) >= 2 and eager.facts["graphs"] == 0, run.refused
    tolerance = 2e-2 if "rounded" in name else 1e-5  # in bf16 a rounding is 2^-8
    assert losses(run) == pytest.approx(losses(eager), rel=tolerance)
    assert norms(run) == pytest.approx(norms(eager), rel=10 * tolerance)
    assert run.kept() == eager.kept()
