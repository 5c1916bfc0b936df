"""What the CUDA allocator is told, which it reads from the environment."""

from __future__ import annotations

import warnings

import pytest

from titan_ulysses.memory.allocator import (
    describe_allocator,
    expand_segments,
    warn_of_fragmentation,
)

ON, SPLIT = "expandable_segments:True", "max_split_size_mb:64"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": ON}),
        ({"PYTORCH_ALLOC_CONF": SPLIT}, {"PYTORCH_ALLOC_CONF": f"{SPLIT},{ON}"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            {"PYTORCH_CUDA_ALLOC_CONF": f"max_split_size_mb:64,{ON}"},
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, {}),  # the user's choice
    ],
)
def test_segments_expand_unless_the_user_chose_otherwise(before, after, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, before.get(name, ""))
    expand_segments()
    for name, value in {**before, **after}.items():
        assert f"{name}={value}" in describe_allocator()


@pytest.mark.parametrize("chosen", ["", SPLIT, ON, "expandable_segments:False"])
def test_a_loop_of_ones_own_hears_of_it(chosen, monkeypatch):
    """train.py sets it; a library that did would change a whole process that is not its own."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", chosen)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_fragmentation()
    said = [str(warning.message) for warning in found]
    assert len(said) == (0 if "expandable" in chosen else 1)
    assert not said or "Set PYTORCH_ALLOC_CONF=expandable_segments:True before" in said[0]
