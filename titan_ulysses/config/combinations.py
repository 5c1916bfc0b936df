"""Checks of settings that exclude each other, or that would have no effect.

These checks need neither the machine nor the model.
"""

from __future__ import annotations

from titan_ulysses.config.schema import KEYS, Config, SourceSettings
from titan_ulysses.config.toml import to_toml


def combination_problems(config: Config) -> list[str]:
    """Return one line per problem; each line names the settings and says what to do."""
    return [
        *_folder_problems(config),
        *_model_problems(config),
        *_lora_problems(config),
        *_data_problems(config),
        *_training_problems(config),
        *_loss_problems(config),
        *_validation_problems(config),
    ]


_OWN_NAMES = (
    "export",
    "adapter",
    "tensorboard",
    "wandb",
    "config.toml",
    "metrics.jsonl",
    "evaluation.json",
    "reference.safetensors",
    "report.html",
    "plan.json",
    "plan_memory.png",
    "plan_ladder.png",
)
"""What a run writes into its folder under a name that no setting changes."""


def _folder_problems(config: Config) -> list[str]:
    """Return the problems of names that lead out of the run's folder, or to others of its files.

    Names are compared without regard to case, as some file systems do.
    """
    checkpoint, profiling = config.checkpoint, config.profiling
    inside = {
        "checkpoint.folder": checkpoint.folder,
        "profiling.save_traces_folder": profiling.save_traces_folder,
        "profiling.save_memory_snapshot_folder": profiling.save_memory_snapshot_folder,
    }
    problems = [
        f"{setting} = {to_toml(name)}: needs a relative path below {above}, without '.' and '..'"
        for setting, name, above in [
            ("job.name", config.job.name, "job.dump_folder"),
            *((setting, name, "the run's folder") for setting, name in inside.items()),
        ]
        if not _is_below(name)
    ]
    first = {s: name.replace("\\", "/").split("/")[0].casefold() for s, name in inside.items()}
    for setting, name in first.items():
        if name in _OWN_NAMES or name.startswith("."):
            problems.append(
                f"{setting} = {to_toml(inside[setting])}: the run needs {name} for something else. "
                f"Choose another name, such as {to_toml(_default(setting))}"
            )
    pairs = [("checkpoint.folder", other) for other in first if other != "checkpoint.folder"]
    problems += [
        f"{one} = {to_toml(inside[one])} and {other} = {to_toml(inside[other])}: the run removes "
        "old checkpoints from the first. Choose folders that are not the same"
        for one, other in pairs
        if first[one] == first[other]
    ]
    later = [part.casefold() for part in config.job.name.split("/")[1:]]
    if clash := next((part for part in later if part in {*_OWN_NAMES, *first.values()}), None):
        problems.append(
            f"job.name = {to_toml(config.job.name)}: another run may need {clash} for something "
            "else. Choose another name"
        )
    return problems


def _is_below(name: str) -> bool:
    """Return whether a path stays in the folder that it begins in, on any system."""
    parts = name.replace("\\", "/").split("/")
    is_drive = len(parts[0]) == 2 and parts[0].endswith(":")
    return not is_drive and not {"", ".", ".."} & {part.strip() for part in parts}


def _default(setting: str) -> str:
    return KEYS[setting].default


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
        return [
            f"lora.{key} = {to_toml(value)} with lora.rank = 0: there are no adapters. Set "
            f"lora.rank, or lora.{key} to its default, {to_toml(field.default)}"
            for key, field in type(lora).model_fields.items()
            if (value := getattr(lora, key)) != field.default
        ]
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
    if lora.quantize_base != "none" and config.quantize.float8:
        problems.append(
            f'lora.quantize_base = "{lora.quantize_base}" and quantize.float8 = true are both set: '
            'a frozen weight is stored in 4 bits, or multiplied in 8. Set one to "none" or false'
        )
    if lora.dropout and config.compile.enable:
        problems.append(
            f"lora.dropout = {lora.dropout} with compile.enable = true: compiled code would drop "
            "other inputs when it computes again in backward. Set lora.dropout = 0, or "
            "compile.enable = false"
        )
    return problems


def _training_problems(config: Config) -> list[str]:
    optimizer = config.optimizer
    others = {
        "lora.rank": config.lora.rank,
        "optimizer.stochastic_rounding": optimizer.stochastic_rounding,
    }
    for setting, value in others.items() if optimizer.name == "muon" else ():
        if value:
            return [
                f'optimizer.name = "muon" with {setting} = {to_toml(value)}: Muon is for the '
                'hidden matrices of the model, in fp32. Set optimizer.name = "adamw", or '
                f"{setting} to its default, {to_toml(KEYS[setting].default)}"
            ]
    return []


_OF_LOSS = {
    "beta": "dpo",
    "reference": "dpo",
    "precompute_reference": "dpo",
    "teacher": "distillation",
    "temperature": "distillation",
    "teacher_share": "distillation",
}
"""Keys of [loss] that only one loss reads."""


def _loss_problems(config: Config) -> list[str]:
    loss, data = config.loss, config.data
    name, problems = f'loss.name = "{loss.name}"', []
    for key, reader in _OF_LOSS.items():
        default = type(loss).model_fields[key].default
        if loss.name != reader and (value := getattr(loss, key)) != default:
            problems.append(
                f'loss.{key} = {to_toml(value)} with {name}: only "{reader}" reads it. Set '
                f'loss.name = "{reader}", or loss.{key} to its default, {to_toml(default)}'
            )
    problems += _teacher_problems(config)
    for setting, source in [
        ("data", data),
        *((f"data.mixture[{i}]", entry) for i, entry in enumerate(data.mixture)),
        *((f"validation.sets[{i}]", one) for i, one in enumerate(config.validation.sets)),
    ]:
        read = setting != "data" or not data.mixture
        if read and (loss.name == "dpo") != (source.source == "preference"):
            problems.append(
                f'{name} with {setting}.source = "{source.source}": DPO, and nothing else, is '
                'trained on pairs of completions. Set both loss.name = "dpo" and '
                f'{setting}.source = "preference", or neither'
            )
    if loss.name == "dpo" and data.packing == "concat":
        problems.append(
            f'{name} with data.packing = "concat": it would cut pairs of completions. Set '
            'data.packing = "best_fit", or "none" for one pair in a sequence'
        )
    if loss.name != "cross_entropy":
        others = {
            "training.z_loss": (config.training.z_loss, "it belongs to the cross-entropy", 0.0),
            "memory.stream_offload": (
                config.memory.stream_offload,
                "this loss needs the hidden states on the device in backward",
                "none",
            ),
        }
        problems += [
            f"{setting} = {to_toml(value)} with {name}: {why}. Set it to {to_toml(default)}"
            for setting, (value, why, default) in others.items()
            if value != default
        ]
    return problems


def _teacher_problems(config: Config) -> list[str]:
    """Return the problems of a teacher: there must be a model, or what one has said, as data."""
    loss, data, problems = config.loss, config.data, []
    sources: list[tuple[str, SourceSettings]] = [("data", data)]
    if data.mixture:
        sources = [(f"data.mixture[{i}]", entry) for i, entry in enumerate(data.mixture)]
    for setting, source in sources:
        key, wanted = f"{setting}.teacher_top_k", loss.name == "distillation"
        if wanted and not loss.teacher and not source.teacher_top_k:
            problems.append(
                f'loss.name = "distillation": loss.teacher is not set. Give the folder of a model, '
                f"or set {key} to read what a teacher has said from the data"
            )
        if source.teacher_top_k and (not wanted or loss.teacher):
            other = "loss.teacher" if wanted else "loss.name"
            value = loss.teacher if wanted else loss.name
            problems.append(
                f"{key} = {source.teacher_top_k} with {other} = {to_toml(value)}: nothing would "
                'read it. Set it to 0, or set loss.name = "distillation" without loss.teacher'
            )
        if source.teacher_top_k and source.streaming:
            problems.append(
                f"{key} = {source.teacher_top_k} with {setting}.streaming = true: it is read from "
                "data that is prepared first. Set streaming to false"
            )
    counts = {source.teacher_top_k for _, source in sources}
    if len(counts) > 1:
        problems.append(
            f"data.mixture: teacher_top_k is {' and '.join(map(str, sorted(counts)))}: set it to "
            "the same in each entry"
        )
    return problems


_READ_BY = {
    "extensions": ("text", "jsonl", "chat", "preference", "tokens"),
    "encoding": ("text", "jsonl", "chat", "preference"),
    "text_field": ("jsonl", "hf"),
    "prompt_field": ("jsonl", "hf", "preference"),
    "completion_field": ("jsonl", "hf"),
    "chosen_field": ("preference",),
    "rejected_field": ("preference",),
    "teacher_top_k": ("tokens",),
    "messages_field": ("chat",),
    "tools_field": ("chat",),
    "subset": ("hf", "chat", "preference", "tokens"),
    "split": ("hf", "chat", "preference", "tokens"),
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
    apart = validation.enable and (validation.path or validation.split or validation.sets)
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


def _validation_problems(config: Config) -> list[str]:
    validation, problems = config.validation, []
    names = [entry.name for entry in validation.sets]
    for number, entry in enumerate(validation.sets):
        setting = f"validation.sets[{number}]"
        problems += _source_problems(config, setting, entry)
        if not entry.path:
            problems.append(f"{setting}.path is not set: every validation set needs a path")
        if not entry.name or entry.name in names[:number]:
            why = "is another set's too" if entry.name else "is not set"
            problems.append(f"{setting}.name = {to_toml(entry.name)} {why}: give each set its own")
        if entry.streaming:
            problems.append(
                f"{setting}.streaming = true: held-out data is read as a whole. Set it to false"
            )
    for key in ("path", "split"):
        if validation.sets and (value := getattr(validation, key)):
            problems.append(
                f"validation.{key} = {to_toml(value)} and [[validation.sets]] are both set: clear "
                f'one, with validation.{key} = ""'
            )
    return problems + _best_problems(config, ["loss", *(f"{name}/loss" for name in names)])


def _best_problems(config: Config, metrics: list[str]) -> list[str]:
    """Return the problems of what depends on the best validation, of which there are `metrics`."""
    validation, problems = config.validation, []
    keeps, patience = config.checkpoint.keep_best, validation.patience
    if validation.metric not in metrics:
        problems.append(
            f"validation.metric = {to_toml(validation.metric)}: no validation set has it. There "
            f"is {', '.join(map(to_toml, metrics))}"
        )
    if validation.metric != "loss" and not keeps and not patience:
        problems.append(
            f"validation.metric = {to_toml(validation.metric)} is used by nothing: set "
            "checkpoint.keep_best or validation.patience"
        )
    users = {"checkpoint.keep_best = true": keeps, f"validation.patience = {patience}": patience}
    problems += [
        f"{setting} needs validations: set validation.enable = true"
        for setting, is_set in users.items()
        if is_set and not validation.enable
    ]
    if keeps and not config.checkpoint.enable:
        problems.append(
            "checkpoint.keep_best = true with checkpoint.enable = false: no checkpoint is saved. "
            "Set the second to true, or the first to false"
        )
    return problems


def _source_problems(config: Config, setting: str, source: SourceSettings) -> list[str]:
    """Return the problems of one source, also of a validation set.

    `setting` is where the source's keys are: "data", or an entry such as "data.mixture[0]".
    """
    problems = []
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
    pairs = source.source == "preference"
    if not pairs and bool(source.prompt_field) != bool(source.completion_field):
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
            key in ("prompt_field", "completion_field")
            and bool(source.prompt_field) != bool(source.completion_field)
            and not pairs
        )
        if not already_reported and source.source not in _READ_BY.get(key, (source.source,)):
            *others, last = _READ_BY[key]
            readers = f"{', '.join(others)} and {last}" if others else last
            problems.append(
                f'{setting}.{key} = {to_toml(value)} with {setting}.source = "{source.source}": it '
                f"is read from {readers} alone. Set {setting}.source, or leave {setting}.{key} out"
            )
    if pairs and source.train_on == "all":
        problems.append(
            f'{setting}.train_on = "all" with {setting}.source = "preference": the loss is of the '
            'completions. Set it to "assistant"'
        )
    return problems + (_streaming_problems(config, setting, source) if source.streaming else [])


def _streaming_problems(config: Config, setting: str, source: SourceSettings) -> list[str]:
    """Return the problems of a source that is read while it is trained on."""
    data, validation, problems = config.data, config.validation, []
    if source.source not in ("hf", "chat", "tokens"):
        problems.append(
            f'{setting}.streaming = true with {setting}.source = "{source.source}": set source = '
            '"hf"'
        )
    if data.packing != "concat" or data.long_documents != "split":
        problems.append(
            f'{setting}.streaming = true: only data.packing = "concat" with data.long_documents = '
            '"split" can pack what is not known yet; set both, or streaming = false'
        )
    if validation.enable and not (validation.path or validation.split or validation.sets):
        problems.append(
            f"{setting}.streaming = true: no document can be held out of a stream; set "
            "validation.path or validation.split"
        )
    return problems
