"""What the CUDA allocator is told, which it reads from the environment."""

from __future__ import annotations

import pytest

from titan_ulysses.memory.allocator import describe_allocator, expand_segments

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
