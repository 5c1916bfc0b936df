"""Which FlashAttention is behind torch's flash operators, on machines that torch says are there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from titan_ulysses.train.trainer import attention_kernel
from titan_ulysses.ulysses import kernels
from titan_ulysses.ulysses.cores import sdpa, varlen
from titan_ulysses.ulysses.kernels import activate_fastest, active


@pytest.fixture
def machine(monkeypatch):
    """Says which GPU and which packages are there. Returns what was activated."""

    def make(capability: int | None, **packages: str | None) -> list[str]:
        """packages: FA3= and FA4=, None where it loads, else why it does not."""
        activated: list[str] = []

        def activate(name: str) -> None:
            if name not in packages:
                raise ModuleNotFoundError(f"no {name}", name=f"the_package_of_{name}")
            if packages[name]:
                raise RuntimeError(packages[name])
            activated.append(name)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
        monkeypatch.setattr(
            torch.nn.attention,
            "current_flash_attention_impl",
            lambda: activated[-1] if activated else None,
        )
        return activated

    return make


@pytest.mark.parametrize(
    ("capability", "packages", "model", "activated", "said"),
    [
        (9, {"FA3": None, "FA4": None}, {}, ["FA3"], "attention kernel: FlashAttention 3"),
        (
            9,
            {"FA4": None},
            {"head_size": 128},
            ["FA4"],
            "attention kernel: FlashAttention 4 (FlashAttention 3 needs the package "
            "the_package_of_FA3)",
        ),
        (
            9,
            {"FA3": "undefined symbol: x"},
            {},
            [],
            "attention kernel: FlashAttention 2 (FlashAttention 3 does not load here (undefined "
            "symbol: x); FlashAttention 4 needs the package the_package_of_FA4)",
        ),
        (10, {"FA3": None, "FA4": None}, {}, ["FA4"], "attention kernel: FlashAttention 4"),
        (
            10,
            {"FA4": None},
            {"head_size": 192},
            [],
            "attention kernel: FlashAttention 2 (FlashAttention 4 has heads of at most 128 (this "
            "model's have 192))",
        ),
        (
            10,
            {"FA4": None},
            {"window": True},
            [],
            "attention kernel: FlashAttention 2 (FlashAttention 4 has no backward for windows that "
            "we know of)",
        ),
        (8, {"FA3": None}, {}, [], "attention kernel: FlashAttention 2"),
        (None, {"FA3": None}, {}, [], "attention kernel: FlashAttention 2"),
    ],
)
def test_the_fastest_that_loads_is_activated(machine, capability, packages, model, activated, said):
    found = machine(capability, **packages)
    assert activate_fastest(**model) == said
    assert found == activated


def test_a_torch_without_the_switch(machine, monkeypatch):
    machine(9, FA3=None)
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl")
    assert "FlashAttention 2 (FlashAttention 3 needs a newer torch" in activate_fastest()


def chosen(core, own_process: bool) -> str | None:
    spec = SimpleNamespace(core=core, model_config=SimpleNamespace(head_dim=64, model_type="x"))
    return attention_kernel(spec, may_activate=own_process)


def test_only_the_process_of_a_run_is_changed(machine):
    activated = machine(9, FA3=None)
    assert chosen(varlen, False) == "attention kernel: FlashAttention 2" and not activated
    assert chosen(sdpa, True) is None and not activated
    assert chosen(varlen, True) == "attention kernel: FlashAttention 3" and activated == ["FA3"]
    assert active() == kernels.FA3
