"""Checks of settings against each other, which need neither the machine nor the model.

Most are declared beside the setting that they are about, as `Needs` and `Excludes` in its field:
`broken_rules` goes over them. The others are functions here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_ulysses.config.fields import Needs, Section, rules_of
from titan_ulysses.config.schema import KEYS, Config, SourceSettings
from titan_ulysses.config.toml import show, to_toml


def problems_of(config: Config) -> list[str]:
    """Return one line per problem; each line names the settings and says what to do."""
    return [
        *_folder_problems(config),
        *broken_rules(config),
        *_source_problems(config),
        *_teacher_problems(config),
        *_set_problems(config),
        *_best_problems(config),
    ]


def broken_rules(config: Config) -> Iterator[str]:
    """Yield the message of the first rule that each setting breaks.

    In the text of a rule `{this}` stands for the setting as it is written, `{name}` for its name,
    and `{default}` for its default; `{other}`, `{other_name}`, `{other_value}` and
    `{other_default}` for the same of the setting that it needs or excludes.
    """
    for place, table in tables(config):
        for key in type(table).model_fields:
            if problem := broken_rule(config, place, table, key):
                yield problem


def broken_rule(config: Any, place: str, table: Section, key: str) -> str | None:
    """Return the message of the first rule that the setting `key` of a table at `place` breaks.

    config: has the sections that these rules name.
    """
    rules = rules_of(type(table).model_fields[key])
    return next(filter(None, (_broken(config, place, table, key, rule) for rule in rules)), None)


def _broken(config: Any, place: str, table: Section, key: str, rule: Needs) -> str | None:
    """Return the message of a rule of the setting `key` in a table at `place`, if it is broken."""
    value, default = getattr(table, key), type(table).model_fields[key].default
    if (value == default if rule.of is None else value not in rule.of) or not rule.where(table):
        return None
    section, _, other_key = rule.other.rpartition(".")
    other_table = getattr(config, section) if section else table
    other = getattr(other_table, other_key)
    other_default = type(other_table).model_fields[other_key].default
    if rule.allows(other, other_default):
        return None
    name, other_name = f"{place}.{key}", f"{section or place}.{other_key}"
    return rule.text.format(
        this=f"{name} = {show(value)}",
        name=name,
        default=show(default),
        other=f"{other_name} = {show(other)}",
        other_name=other_name,
        other_value=show(other),
        other_default=show(other_default),
    )


def tables(config: Config) -> Iterator[tuple[str, Section]]:
    """Yield all tables of settings with their names: the sections, and the tables in their lists.

    A section comes before the tables in it.
    """
    for name, section in config:
        yield name, section
        for key, values in section:
            for number, value in enumerate(values if isinstance(values, list) else ()):
                if isinstance(value, Section):
                    yield f"{name}.{key}[{number}]", value


_OWN_NAMES = (
    *("export", "adapter", "tensorboard", "wandb", "config.toml", "metrics.jsonl"),
    *("evaluation.json", "reference.safetensors", "report.html", "plan.json", "plan_memory.png"),
    "plan_ladder.png",
)
"""What a run writes into its folder under a name that no setting changes."""


def _folder_problems(config: Config) -> Iterator[str]:
    """Yield the problems of names of folders that others of the run's files have, or other runs.

    Names are compared without regard to case, as some file systems do.
    """
    inside = {
        "checkpoint.folder": config.checkpoint.folder,
        "profiling.save_traces_folder": config.profiling.save_traces_folder,
        "profiling.save_memory_snapshot_folder": config.profiling.save_memory_snapshot_folder,
    }
    first = {s: name.replace("\\", "/").split("/")[0].casefold() for s, name in inside.items()}
    for setting, name in first.items():
        if name in _OWN_NAMES or name.startswith("."):
            yield (
                f"{setting} = {to_toml(inside[setting])}: the run needs {name} for something else. "
                f"Choose another name, such as {to_toml(KEYS[setting].default)}"
            )
    checkpoints, *others = first
    for other in others:
        if first[checkpoints] == first[other]:
            yield (
                f"{checkpoints} = {to_toml(inside[checkpoints])} and {other} = "
                f"{to_toml(inside[other])}: the run removes old checkpoints from the first. Choose "
                "folders that are not the same"
            )
    later = [part.casefold() for part in config.job.name.split("/")[1:]]
    if clash := next((part for part in later if part in {*_OWN_NAMES, *first.values()}), None):
        yield (
            f"job.name = {to_toml(config.job.name)}: another run may need {clash} for something "
            "else. Choose another name"
        )


def _trained_sources(config: Config) -> list[tuple[str, SourceSettings]]:
    """Return the sources that are trained on: the entries of the mixture, or else [data]."""
    mixture = [(f"data.mixture[{i}]", entry) for i, entry in enumerate(config.data.mixture)]
    return [*mixture] or [("data", config.data)]


def _source_problems(config: Config) -> Iterator[str]:
    """Yield the problems of sources with each other and with the held-out data."""
    data, validation = config.data, config.validation
    has_own_data = validation.path or validation.split or validation.sets
    for setting, source in {"data": data, **dict(_trained_sources(config))}.items():
        if source.streaming and validation.enable and not has_own_data:
            yield (
                f"{setting}.streaming = true: no document can be held out of a stream; set "
                "validation.path or validation.split"
            )
        if setting != "data" and not source.path:
            yield f"{setting}.path is not set: every entry of data.mixture needs a path"
    # With separate held-out data, the keys of [data] are in use: they say how it is read.
    if data.mixture and not (validation.enable and has_own_data):
        for key, value in data.changed().items():
            if key != "path":
                default = to_toml(SourceSettings.model_fields[key].default)
                yield (
                    f"data.{key} = {to_toml(value)} with [[data.mixture]]: each entry has its own "
                    f"{key}. Set it there, and data.{key} to its default, {default}"
                )


def _teacher_problems(config: Config) -> Iterator[str]:
    """Yield the problems of a teacher: there must be a model, or what one has said, as data."""
    sources = _trained_sources(config)
    for setting, source in sources:
        is_told = config.loss.teacher or source.teacher_top_k
        if config.loss.name == "distillation" and not is_told:
            yield (
                'loss.name = "distillation": loss.teacher is not set. Give the folder of a model, '
                f"or set {setting}.teacher_top_k to read a teacher's log-probabilities from the "
                "data"
            )
    counts = {source.teacher_top_k for _, source in sources}
    if len(counts) > 1:
        said = " and ".join(map(str, sorted(counts)))
        yield f"data.mixture: teacher_top_k is {said}: set it to the same in each entry"


def _set_problems(config: Config) -> Iterator[str]:
    names = [entry.name for entry in config.validation.sets]
    for number, entry in enumerate(config.validation.sets):
        setting = f"validation.sets[{number}]"
        if not entry.path:
            yield f"{setting}.path is not set: every validation set needs a path"
        if not entry.name or entry.name in names[:number]:
            why = "is another set's too" if entry.name else "is not set"
            yield f"{setting}.name = {to_toml(entry.name)} {why}: give each set its own"
        if entry.streaming:
            yield f"{setting}.streaming = true: held-out data is read as a whole. Set it to false"


def _best_problems(config: Config) -> Iterator[str]:
    validation, metric = config.validation, config.validation.metric
    metrics = ["loss", *(f"{entry.name}/loss" for entry in validation.sets)]
    if metric not in metrics:
        choices = ", ".join(map(to_toml, metrics))
        yield (
            f"validation.metric = {to_toml(metric)}: no validation set has it. Choose from "
            f"{choices}"
        )
    if metric != "loss" and not config.checkpoint.keep_best and not validation.patience:
        yield (
            f"validation.metric = {to_toml(metric)} has no effect: set checkpoint.keep_best or "
            "validation.patience"
        )
