"""Configs of torchtitan up to 0.2.2, whose sections are like ours. Later ones are in Python."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration.key_rules import Flat, Lost


def converters(value: list[str], _: Flat) -> Any:
    others = [one for one in value if one not in ("float8", "quantize.linear.float8")]
    if others:
        raise Lost(f"{', '.join(others)}: only float8 of linear layers")
    return True if value else {}


def tokenizer(value: str, _: Flat) -> str:
    if value.endswith(".model"):
        raise Lost("a file of Meta's format: model.path has a tokenizer, or set model.tokenizer")
    return value


ANY = "any: each run has another"


def seed(value: Any, values: Flat) -> Any:
    if value == ANY and values.get("training.seed") is not None:
        return {}
    if value == ANY:
        raise Lost("training.seed is 0 unless it is set", {"training.seed": 0})
    return value


def validation_steps(value: int, _: Flat) -> int:
    return max(0, value)


def documents(*_: Any) -> Flat:
    return {"data.packing": "concat", "data.long_documents": "split", "data.train_on": "all"}
