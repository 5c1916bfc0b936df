"""Checks of settings that exclude each other, or that would have no effect.

These checks need neither the machine nor the model.
"""

from __future__ import annotations

from titan_ulysses.config.schema import Config, SourceSettings
from titan_ulysses.config.toml import to_toml


def combination_problems(config: Config) -> list[str]:
    """Return one line per problem; each line names the settings and says what to do."""
    return _model_problems(config) + _lora_problems(config) + _data_problems(config)


def _model_problems(config: Config) -> list[str]:
    model = config.model
    if model.path and model.config:
        return [
            f"model.path = {to_toml(model.path)} and [model.config] are both set: clear one, with "
            'model.path = "" or --model.config {}'
        ]
    if not model.path and not model.config:
        return ["model.path is empty and there is no [model.config]: set one of them"]
    return []


def _lora_problems(config: Config) -> list[str]:
    lora, problems = config.lora, []
    if not lora.rank:
        return problems
    if config.model.freeze:
        problems.append(
            f"lora.rank = {lora.rank} and model.freeze = {to_toml(config.model.freeze)} are both "
            "set: with LoRA all of the model is frozen. Clear one, with lora.rank = 0 or "
            "model.freeze = []"
        )
    if config.model.resize_embeddings:
        problems.append(
            f"lora.rank = {lora.rank} and model.resize_embeddings = "
            f"{config.model.resize_embeddings} are both set: LoRA would leave the rows of new "
            "tokens as they begin. Set one of them to 0"
        )
    if lora.dropout and config.compile.enable:
        problems.append(
            f"lora.dropout = {lora.dropout} with compile.enable = true: compiled code would drop "
            "other inputs when it computes again in backward. Set lora.dropout = 0, or "
            "compile.enable = false"
        )
    return problems


_READ_BY = {
    "extensions": ("text", "jsonl", "chat"),
    "encoding": ("text", "jsonl", "chat"),
    "text_field": ("jsonl", "hf"),
    "prompt_field": ("jsonl", "hf"),
    "messages_field": ("chat",),
    "tools_field": ("chat",),
    "subset": ("hf", "chat"),
    "split": ("hf", "chat"),
}
"""Keys of a data source that only some kinds of source read, with the names of those kinds."""


def _data_problems(config: Config) -> list[str]:
    data, validation, problems = config.data, config.validation, []
    for setting, source in [
        ("data", data),
        *((f"data.mixture[{i}]", entry) for i, entry in enumerate(data.mixture)),
    ]:
        problems += _source_problems(config, setting, source)
        if setting != "data" and not source.path:
            problems.append(f"{setting}.path is not set: every entry of data.mixture needs a path")
    if data.mixture and data.path:
        problems.append(
            f"data.path = {to_toml(data.path)} and [[data.mixture]] are both set: clear one, with "
            'data.path = ""'
        )
    apart = validation.enable and (validation.path or validation.split)
    # With separate held-out data, the keys of [data] are in use: they say how it is read.
    if data.mixture and not apart:
        problems += [
            f"data.{key} = {to_toml(value)} with [[data.mixture]]: each entry has a {key} of its "
            f"own. Set it there, and data.{key} to its default, "
            f"{to_toml(type(data).model_fields[key].default)}"
            for key, value in data.changed().items()
            if key != "path"
        ]
    if validation.enable and validation.split and data.source not in _READ_BY["split"]:
        problems.append(
            f'validation.split = {to_toml(validation.split)} with data.source = "{data.source}": '
            'files have no splits. Set validation.path, or data.source = "hf"'
        )
    return problems


def _source_problems(config: Config, setting: str, source: SourceSettings) -> list[str]:
    """Return the problems of one source.

    `setting` is where the source's keys are: "data", or an entry such as "data.mixture[0]".
    """
    data, problems = config.data, []
    if source.encoding == "bytes" and config.model.tokenizer != "bytes":
        tokenizer = to_toml(config.model.tokenizer)
        problems.append(
            f'{setting}.encoding = "bytes" with model.tokenizer = {tokenizer}: raw bytes need '
            'model.tokenizer = "bytes"'
        )
    if source.encoding == "bytes" and source.source != "text":
        problems.append(
            f'{setting}.encoding = "bytes" with {setting}.source = "{source.source}": JSON is text'
        )
    if bool(source.prompt_field) != bool(source.completion_field):
        given, missing = sorted(
            ("prompt_field", "completion_field"), key=lambda name: not getattr(source, name)
        )
        problems.append(
            f"{setting}.{given} is set and {setting}.{missing} is not: a prompt needs its "
            "completion"
        )
    for key, value in source.changed().items():
        # Such a value has been reported above.
        already_reported = (key == "encoding" and value == "bytes") or (
            key == "prompt_field" and not source.completion_field
        )
        if not already_reported and source.source not in _READ_BY.get(key, (source.source,)):
            readers = " and ".join(_READ_BY[key])
            problems.append(
                f'{setting}.{key} = {to_toml(value)} with {setting}.source = "{source.source}": it '
                f"is read from {readers} alone. Set {setting}.source, or leave {setting}.{key} out"
            )
    if source.streaming and source.source not in ("hf", "chat"):
        problems.append(
            f'{setting}.streaming = true with {setting}.source = "{source.source}": set source = '
            '"hf"'
        )
    if source.streaming and (data.packing != "concat" or data.long_documents != "split"):
        problems.append(
            f'{setting}.streaming = true: only data.packing = "concat" with data.long_documents = '
            '"split" can pack what is not known yet; set both, or streaming = false'
        )
    if (
        source.streaming
        and config.validation.enable
        and not (config.validation.path or config.validation.split)
    ):
        problems.append(
            f"{setting}.streaming = true: no document can be held out of a stream; set "
            "validation.path or validation.split"
        )
    return problems
