"""What a run that goes on from a checkpoint must have kept, beside model and optimizer.

The checkpoint itself refuses another model or optimizer (checkpoint/dcp.py). Settings that decide
which data comes next may change, but never in silence. docs/runs.md has the table of all settings.
"""

from __future__ import annotations

from typing import Any

from titan_ulysses.config.schema import KEYS, Config
from titan_ulysses.config.toml import to_toml

_SAME_DATA = ("data.cache_folder", "data.bad_lines")
"""Keys of [data] that do not decide which sequence comes next."""


def data_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide which sequence is the next one, by key, as JSON."""
    keys = [key for key in KEYS if key.startswith("data.") and key not in _SAME_DATA]
    keys += ["training.seq_len", "model.tokenizer"]
    values = config.model_dump(mode="json")
    found = {key: values[key.split(".")[0]][key.split(".")[1]] for key in keys}
    # What is held out is not trained on, unless it comes from elsewhere.
    validation = config.validation
    apart = validation.path or validation.split or validation.sets
    found["validation.enable"] = validation.enable and not apart
    return found


def warnings_of(
    config: Config, step: int, saved: dict[str, Any], *, content: dict[str, str], beside: int
) -> list[str]:
    """Return warnings for what leads to other data than the run would have read: settings, or files
    that have changed; and for a reference or teacher with other weights.

    saved: run.json of the checkpoint. That of an earlier version has no settings and no hashes.
    content: the hashes of the documents that are there now, by source. beside: the fingerprint of
    the second model's weights.
    """
    seed, found = saved.get("rng", {}).get("seed"), []
    if saved.get("beside", beside) != beside:
        found.append(
            f"WARNING: [loss]: the reference or teacher is not the one beside which step {step} "
            "was trained: the loss goes on with the new one."
        )
    if seed not in (None, config.training.seed):
        found.append(
            f"WARNING: training.seed = {config.training.seed}, and it was {seed} when step {step} "
            f"was saved: the data goes on in another order, {_TWICE}. Set training.seed = {seed} "
            "to go on exactly."
        )
    before, now = saved.get("data", {}), data_settings(config)
    changed = [key for key in now if key in before and before[key] != now[key]]
    for key in changed:
        found.append(
            f"WARNING: {key} = {to_toml(now[key])}, and it was {to_toml(before[key])} when step "
            f"{step} was saved: the run goes on at the same place in different data, {_TWICE}."
        )
    then = saved.get("content", {})
    other = [name for name in content if then.get(name, content[name]) != content[name]]
    if other and not changed:
        where = "data.path" if config.data.path else f"data.mixture ({', '.join(other)})"
        found.append(
            f"WARNING: {where}: the documents are not those of when step {step} was saved: a file "
            "was changed, added or removed. The run goes on at the same place in different data, "
            f"{_TWICE}."
        )
    return found


_TWICE = "so some samples are read twice and others never"
