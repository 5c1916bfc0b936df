"""The settings of a run: the TOML schema, and every check made before the first step.

Reads top to bottom: the schema, reading (`load_config`), writing (`dump_toml`), checks across settings (`check`). No
import of torch or transformers: `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, time
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from titan_ulysses.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# ---------------------------------------------------------------------------------------------------------------------
# The schema


def expand_path(path: str) -> str:
    """Expand `~`, `$VARS` and `{stdlib}`, the folder of Python's standard library: real text that every machine has."""
    return os.path.expanduser(os.path.expandvars(path.replace("{stdlib}", sysconfig.get_path("stdlib"))))


def _positive_or_derived(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be at least 1, or -1 to derive it")
    return value


def _core_name(name: str) -> str:
    if name not in CORES and ":" not in name:
        raise ValueError(f"needs one of {', '.join(CORES)}, or package.module:function")
    return name


CORES = ("auto", "flash", "flex", "sdpa", "blockwise")
Core = Annotated[str, AfterValidator(_core_name)]
PathText = Annotated[str, AfterValidator(expand_path)]
Tile = Annotated[int, Field(ge=-1)]
PositiveOrDerived = Annotated[int, AfterValidator(_positive_or_derived)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
Dtype = Literal["float64", "float32", "bfloat16"]


class Section(BaseModel):
    """What the sections share: unknown keys refused, values fixed once read, no inf or nan unless a field asks."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic would read true as 1, and a forgotten value (`--training.steps --next`) must not become one step.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("needs a number, not true or false")
        return value


class Job(Section):
    name: str = Field("run", min_length=1, description="Name of the run; its files go to <dump_folder>/<name>/.")
    dump_folder: PathText = Field("./outputs", min_length=1, description="Folder that holds the folders of all runs.")


class Model(Section):
    path: PathText = Field("", description="Pretrained model: a folder or a hub name. Either this or [model.config].")
    config: dict[str, Any] | None = Field(
        None, description="A transformers config with its model_type; the weights start random."
    )
    tokenizer: PathText = Field("", description='"bytes", a folder or a hub name; empty: the one in model.path.')
    attention: Core = Field(
        "auto", description="auto|flash|flex|sdpa|blockwise, or your own as package.module:function."
    )

    @field_validator("config")
    @classmethod
    def _names_its_type(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config and not isinstance(config.get("model_type"), str):
            raise ValueError('needs a model_type, as in model_type = "llama"')
        return config or None  # an empty table clears what a base file set: `--model.config {}`


class SourceSettings(Section):
    """One source of documents: [data] itself, or an entry of [[data.mixture]]."""

    source: Literal["text", "jsonl", "hf", "chat"] = Field(
        "text", description="text: a document a file; jsonl: JSON lines or parquet; hf: a data set; chat: messages."
    )
    path: PathText = Field(
        "", description="File, folder, pattern or data set name; ~, $VARS and {stdlib} (Python's library) expand."
    )
    extensions: list[str] = Field(
        [], description="Which files of a folder are read; empty: .txt, or all that jsonl and chat can read."
    )
    encoding: str = Field("utf-8", min_length=1, description='Text encoding; "bytes": raw, for tokenizer "bytes".')
    text_field: str = Field("text", min_length=1, description="jsonl, hf: the field that holds the text.")
    prompt_field: str = Field(
        "", description="jsonl, hf: with completion_field, in place of text_field; not trained on."
    )
    completion_field: str = Field("", description="jsonl, hf: what follows the prompt, and is trained on.")
    messages_field: str = Field("messages", min_length=1, description="chat: the field with the list of messages.")
    tools_field: str = Field("tools", min_length=1, description="chat: the field with the tools, where a chat has any.")
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="assistant: the assistant's turns, completions; all: every token of chats and prompts."
    )
    subset: str = Field("", description="hf, chat: configuration of the data set; empty: its default one.")
    split: str = Field("train", min_length=1, description="hf, chat: split of the data set.")
    streaming: bool = Field(False, description="hf, chat: read the data set while training; nothing is prepared.")
    bad_lines: Literal["stop", "skip"] = Field(
        "stop",
        description="A line that is not JSON, lacks its field or that the chat template refuses: stop, or count.",
    )


class MixtureEntry(SourceSettings):
    weight: float = Field(1.0, gt=0, description="Share of the sequences; weights are divided by their sum.")


class Data(SourceSettings):
    mixture: list[MixtureEntry] = Field(
        [],
        description="[[data.mixture]]: several sources, each with the keys above and a weight; instead of data.path.",
    )
    packing: Literal["none", "concat", "best_fit"] = Field(
        "concat", description="none: a document a sequence, padded; concat: end to end; best_fit: whole ones, padded."
    )
    long_documents: Literal["split", "drop"] = Field(
        "split", description="Documents longer than training.seq_len: go on in another sequence, or are left out."
    )
    cache_folder: PathText = Field(
        "", description="Where large tokenized data is kept for the next start; empty: ~/.cache/titan_ulysses."
    )


class Training(Section):
    seq_len: int = Field(2048, ge=1, description="Tokens in a sequence, over all its sequence-parallel ranks.")
    local_batch_size: int = Field(1, ge=1, description="Sequences a data-parallel rank sees in one forward.")
    global_batch_size: PositiveOrDerived = Field(
        -1, description="Sequences a step; -1: local_batch_size x data-parallel degree; larger: gradient accumulation."
    )
    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the weights and of the order of the data.")
    max_norm: float = Field(1.0, ge=0, allow_inf_nan=True, description="Clip gradients to this norm; 0: no clipping.")
    param_dtype: Dtype = Field("bfloat16", description="Dtype of parameters and activations in forward and backward.")
    reduce_dtype: Dtype = Field("float32", description="Dtype in which gradients are summed over the ranks.")
    z_loss: float = Field(
        0.0, ge=0, description="Weight of the squared log-normalizer of the logits, added to each token's loss; 0: off."
    )
    deterministic: bool = Field(False, description="Deterministic algorithms only: slower, the same bits each time.")


class Parallelism(Section):
    data_parallel_replicate_degree: PositiveOrDerived = Field(1, description="Replicas of the sharded model (HSDP).")
    data_parallel_shard_degree: PositiveOrDerived = Field(
        -1, description="Ranks that shard the parameters (FSDP2); -1: derived from the world size."
    )
    sequence_parallel_degree: PositiveOrDerived = Field(1, description="Ranks that share one sequence (Ulysses).")


class ActivationCheckpoint(Section):
    mode: Literal["none", "full"] = Field("full", description="full: keep block inputs only, recompute in backward.")
    every: int = Field(1, ge=1, description="Blocks a checkpoint: of so many only the first one's input is kept.")
    offload: Literal["none", "host", "disk"] = Field(
        "none", description="Where these inputs wait for backward: on the device, in host memory, or in files."
    )
    offload_folder: PathText = Field("", description='Folder for offload = "disk"; empty: the system\'s temporary one.')


class Memory(Section):
    loss_tile_tokens: Tile = Field(
        0, description="Tokens a tile of the loss head; 0: as many as make 64 MiB of fp32 logits; -1: all at once."
    )
    mlp_tile_tokens: Tile = Field(
        0,
        description="Tokens a tile of the MLPs and norms; 0: the model's width, at least 1,024, where blocks are "
        "checkpoints, and else -1: not tiled.",
    )
    parameter_offload: bool = Field(
        False, description="Parameters, gradients and optimizer state in host memory; the optimizer steps there."
    )
    optimizer_offload: bool = Field(
        False, description="Optimizer state in host memory; it visits the device a parameter at a time."
    )


class Compile(Section):
    enable: bool = Field(False, description="Compile each block's MLP and norms (torch.compile); the first step waits.")


class Quantize(Section):
    float8: bool = Field(
        False, description="Linear layers of the blocks multiply in float8 (torchao); GPUs from sm_89 on."
    )


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit", "adamw4bit"] = Field(
        "adamw", description="AdamW with its two moments in fp32, or quantized to 8 or 4 bits (torchao)."
    )
    lr: float = Field(3e-4, ge=0, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Decay of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator of the update.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")
    stochastic_rounding: bool = Field(
        False,
        description="Store parameters in bfloat16, rounded stochastically after each step; no fp32 master weights.",
    )


class LRScheduler(Section):
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warmup.")
    decay_type: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after the warmup.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Where the decay ends, as a share of optimizer.lr.")


class Checkpoint(Section):
    enable: bool = Field(True, description="Save checkpoints, and resume from them.")
    interval: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_latest_k: int = Field(2, ge=0, description="How many to keep; 0: all.")
    folder: str = Field("checkpoints", min_length=1, description="Folder of the checkpoints inside the run's folder.")
    export: bool = Field(True, description="At the end, write export/ for transformers' from_pretrained.")


class Validation(Section):
    enable: bool = Field(False, description="Compute a validation loss during training.")
    interval: int = Field(100, ge=1, description="Steps between validations.")
    steps: int = Field(10, ge=1, description="Batches a validation; each is one global batch.")
    path: PathText = Field("", description="Held-out data, read as [data] says; empty: every 100th document of data.")
    split: str = Field("", description="hf, chat: split of the held-out data set; empty: data.split.")


class Plan(Section):
    gpu: str = Field("H100-80GB", min_length=1, description="GPU to plan for: A100-80GB, H100-80GB, H200, B200.")
    gpu_memory_gib: float = Field(0, ge=0, description="Its memory, where it is not that of plan.gpu; 0: plan.gpu's.")
    host_memory_gib: float = Field(0, ge=0, description="Host memory of a node; 0: not known, not looked at.")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of a node.")
    world_size: int = Field(0, ge=0, description="GPUs to plan for; 0: the product of the degrees in [parallelism].")
    search: bool = Field(False, description="Look for the longest sequence that fits, and for the settings it takes.")
    ladder: bool = Field(False, description="Plan what each feature adds to the longest sequence, one after the other.")
    enforce: bool = Field(False, description="Refuse to start a run whose plan does not fit.")


class Metrics(Section):
    log_interval: int = Field(1, ge=1, description="Steps between log lines.")


class Config(Section):
    """All settings of a run. Immutable; `load_config` builds it, `check` relates it to the machine and the model."""

    job: Job = Job()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    memory: Memory = Memory()
    compile: Compile = Compile()
    quantize: Quantize = Quantize()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _settings_that_exclude_each_other(self) -> Config:
        problems = []
        if self.model.path and self.model.config:
            problems.append(
                f"model.path = {_toml(self.model.path)} and [model.config] are both set: "
                'clear one, with model.path = "" or --model.config {}'
            )
        if not self.model.path and not self.model.config:
            problems.append("model.path is empty and there is no [model.config]: set one of them")
        problems += _data_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _data_problems(config: Config) -> list[str]:
    data, problems = config.data, []
    for setting, source in [("data", data), *((f"data.mixture[{i}]", entry) for i, entry in enumerate(data.mixture))]:
        if source.encoding == "bytes" and config.model.tokenizer != "bytes":
            tokenizer = _toml(config.model.tokenizer)
            problems.append(
                f'{setting}.encoding = "bytes" with model.tokenizer = {tokenizer}: raw bytes need '
                'model.tokenizer = "bytes"'
            )
        if source.encoding == "bytes" and source.source != "text":
            problems.append(f'{setting}.encoding = "bytes" with {setting}.source = "{source.source}": JSON is text')
        if bool(source.prompt_field) != bool(source.completion_field):
            given, missing = sorted(("prompt_field", "completion_field"), key=lambda name: not getattr(source, name))
            problems.append(f"{setting}.{given} is set and {setting}.{missing} is not: a prompt needs its completion")
        if source.streaming and source.source not in ("hf", "chat"):
            problems.append(f'{setting}.streaming = true with {setting}.source = "{source.source}": set source = "hf"')
        if source.streaming and (data.packing != "concat" or data.long_documents != "split"):
            problems.append(
                f'{setting}.streaming = true: only data.packing = "concat" with data.long_documents = "split" can pack '
                "what is not known yet; set both, or streaming = false"
            )
        if source.streaming and config.validation.enable and not (config.validation.path or config.validation.split):
            problems.append(
                f"{setting}.streaming = true: no document can be held out of a stream; set validation.path or "
                "validation.split"
            )
        if setting != "data" and not source.path:
            problems.append(f"{setting}.path is not set: every entry of data.mixture needs a path")
    if data.mixture and data.path:
        problems.append(
            f'data.path = {_toml(data.path)} and [[data.mixture]] are both set: clear one, with data.path = ""'
        )
    return problems


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}
KEYS: dict[str, FieldInfo] = {f"{s}.{k}": field for s in SECTIONS for k, field in SECTIONS[s].model_fields.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | os.PathLike[str], overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Read a TOML file (after the file that it `extends`), apply ("section.key", value) overrides, and validate.

    Raises UserError (exit code 2) with a line for each problem: file, syntax, unknown key, wrong type, out of bounds.
    """
    settings = _read_toml(Path(path), chain=())
    for setting, value in overrides:
        _override(settings, setting, value)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors(include_url=False)]
        raise UserError("\n".join(lines), exit_code=2) from None


def _read_toml(path: Path, *, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tables merged over those of its `extends`; `chain` holds the files that led here."""
    path = path.resolve()
    named_by = f'"extends" of {chain[-1]}' if chain else "--config"
    if path in chain:
        circle = " -> ".join(str(p) for p in (*chain[chain.index(path) :], path))
        raise UserError(f"extends goes in a circle: {circle}; remove one of these lines", exit_code=2)
    try:
        settings = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path in {named_by}", exit_code=2) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {named_by} needs a readable file", exit_code=2) from None
    except ValueError as error:  # broken TOML (the message has line and column), or not UTF-8
        raise UserError(f"{path}: not valid TOML: {error}", exit_code=2) from None
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UserError(f'{path}: extends = {show(base)}: needs one file, as in extends = "base.toml"', exit_code=2)
    return _merge(_read_toml(path.parent / expand_path(base), chain=(*chain, path)), settings)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, key by key; anything else above replaces what is below."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _merge(below[key], above[key]) for key in both}}


def _override(settings: dict[str, Any], setting: str, value: Any) -> None:
    *tables, key = setting.split(".")
    for depth, name in enumerate(tables, start=1):
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            table = ".".join(tables[:depth])
            raise UserError(f"{setting}: {table} = {show(settings)} has no keys; set {table} itself", exit_code=2)
    settings[key] = value


_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "needs a finite number",
    "string_too_short": "must not be empty",
    "too_long": "needs no more than {max_length} values",
    "missing": "a value is missing from the list",
    "value_error": "{error}",
    "literal_error": "needs {expected}",
}
_TYPES = {  # the first word of pydantic's error types: int_parsing, int_type, int_from_float, ...
    "int": "needs an integer",
    "float": "needs a number",
    "bool": "needs true or false",
    "string": "needs text",
    "list": "needs a list",
    "tuple": "needs a list",
    "dict": "needs a table",
    "model": "needs a table: write [{section}] and its keys below it",
}


def _explain(error: Any) -> str:
    """One of pydantic's errors as a line for the user: setting, value, what it needs."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _explain_unknown(location, error["input"])
    if not location:  # the check of the whole Config, whose lines name their settings
        return str(context["error"])
    setting = _setting(location)
    reason = _BOUNDS.get(kind) or _TYPES.get(kind.split("_")[0]) or error["msg"].replace("{", "{{").replace("}", "}}")
    if kind == "literal_error":
        context = {"expected": context["expected"].replace("'", '"')}
    return f"{setting} = {show(error['input'])}: {reason.format(section=setting, **context)}"


def _setting(location: Sequence[str | int]) -> str:
    """How a user would write a location: training.steps, optimizer.betas[1]."""
    return re.sub(r"\.(\d+)\b", r"[\1]", ".".join(str(part) for part in location))


def _explain_unknown(location: Sequence[str], value: Any) -> str:
    *sections, key = location
    if not sections and isinstance(value, dict):
        near = get_close_matches(key, SECTIONS, n=1)
        remedy = f"did you mean [{near[0]}]?" if near else f"the sections are {', '.join(SECTIONS)}"
        return f"[{key}]: no such section; {remedy}"
    section = sections[0] if sections else ""
    if near := nearest_keys(section, key):
        remedy = f"did you mean {near}?"
    else:
        remedy = f"[{section}] has {', '.join(SECTIONS[section].model_fields)}" if section else "keys go into a section"
    return f"{_setting(location)}: no such key; {remedy}"


def nearest_keys(section: str, key: str) -> str:
    """The "section.key" most like a misspelt or misplaced one ("a or b" where several are equally near), or ""."""
    scores = {}
    for setting in KEYS:
        candidate_section, candidate = setting.split(".")
        here = 0.2 if candidate_section == section else 0.0  # a typo is likelier than a key in the wrong section
        scores[setting] = SequenceMatcher(None, key.replace("-", "_"), candidate).ratio() + here
    best = max(scores.values())
    return " or ".join(s for s, score in scores.items() if score == best) if best >= 0.7 else ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def dump_toml(config: Config) -> str:
    """The resolved settings as TOML that `load_config` reads back to an equal Config; None is left out."""
    tables = (_toml_table(section, table) for section, table in config.model_dump().items())
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def _toml_table(header: str, table: dict[Any, Any], brackets: str = "[{}]") -> list[str]:
    lines = [brackets.format(header)]
    nested = {key: value for key, value in table.items() if isinstance(value, dict) or _is_tables(value)}
    lines += [f"{_toml_key(k)} = {_toml(v)}" for k, v in table.items() if k not in nested and v is not None]
    for key, value in nested.items():
        below = f"{header}.{_toml_key(key)}"
        for one in value if isinstance(value, list) else [value]:
            lines += ["", *_toml_table(below, one, "[[{}]]" if isinstance(value, list) else "[{}]")]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _toml_key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(str(key))


def _toml(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, str):  # JSON's escapes are TOML's too, except that TOML also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # inf, nan and 1e-08 are spelt the same
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        items = (f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(items)}}}"
    raise TypeError(f"TOML has no {type(value).__name__}: {value!r}")


def show(value: Any) -> str:
    """A value for a message, which may be anything."""
    try:
        return _toml(value)
    except TypeError:
        return repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Checks across settings, world and model


@dataclass(frozen=True)
class MeshDegrees:
    """The mesh's three degrees and how a step's batch spreads over it; nothing left to derive."""

    replicate: int
    shard: int
    sequence: int
    local_batch_size: int = 1
    accumulation_steps: int = 1  # forwards and backwards a rank runs in one step

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of sequence-parallel ranks, that read different samples."""
        return self.replicate * self.shard

    @property
    def global_batch_size(self) -> int:
        """Sequences in one optimizer step."""
        return self.local_batch_size * self.data_parallel * self.accumulation_steps


def check(config: Config, *, world_size: int, model_config: Any, num_token_ids: int) -> MeshDegrees:
    """Every check across settings, world size, model and tokenizer, made before a process group or a weight exists.

    model_config: a transformers text config; attributes that it lacks or that are None are not checked.
    num_token_ids: the tokenizer's largest id + 1.
    Raises UserError (exit code 2) with a line for each problem.
    """
    degrees, problems = _mesh_degrees(config, world_size)
    if not problems:
        accumulation, problems = _accumulation_steps(config, degrees)
        degrees = MeshDegrees(*degrees, config.training.local_batch_size, accumulation)
        sequence = degrees.sequence
    else:
        sequence = max(1, config.parallelism.sequence_parallel_degree)
    problems += _training_problems(config, sequence) + _dtype_problems(config)
    problems += _memory_problems(config, model_config)
    problems += _model_problems(config, model_config, num_token_ids, sequence)
    if problems:
        raise UserError("\n".join(problems), exit_code=2)
    return degrees


def _mesh_degrees(config: Config, world_size: int) -> tuple[tuple[int, ...], list[str]]:
    """(replicate, shard, sequence) with a -1 derived from the world size, or what is wrong with them."""
    degrees = config.parallelism.model_dump()
    replicate, shard, sequence = degrees.values()
    product = f"dp_replicate({replicate}) x dp_shard({shard}) x sp({sequence})"
    derived = [f"parallelism.{key}" for key, degree in degrees.items() if degree == -1]
    if len(derived) > 1:
        return (), [f"{' and '.join(derived)} are -1: only one degree can be derived; set the others"]
    known = replicate * shard * sequence * (-1 if derived else 1)
    if derived and world_size % known:
        return (), [
            f"{product} does not divide WORLD_SIZE({world_size}): start a multiple of {known} ranks, "
            "or change the degrees in [parallelism]"
        ]
    if not derived and known != world_size:
        return (), [
            f"{product} = {known} is not WORLD_SIZE({world_size}): start {known} ranks, or change [parallelism], "
            "as in parallelism.data_parallel_shard_degree = -1"
        ]
    return tuple(world_size // known if degree == -1 else degree for degree in degrees.values()), []


def _accumulation_steps(config: Config, degrees: tuple[int, ...]) -> tuple[int, list[str]]:
    training, (replicate, shard, _) = config.training, degrees
    smallest = training.local_batch_size * replicate * shard
    if training.global_batch_size == -1:
        return 1, []
    accumulation, remainder = divmod(training.global_batch_size, smallest)
    if remainder:
        remedy = f"set it to {(accumulation + 1) * smallest}, or to -1 for {smallest}"
        return accumulation, [
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of local_batch_size"
            f"({training.local_batch_size}) x dp_replicate({replicate}) x dp_shard({shard}) = {smallest}: {remedy}"
        ]
    return accumulation, []


def _training_problems(config: Config, sequence: int) -> list[str]:
    training, warmup_steps, problems = config.training, config.lr_scheduler.warmup_steps, []
    if training.seq_len % sequence:
        longer = -(-training.seq_len // sequence) * sequence
        problems.append(
            f"training.seq_len = {training.seq_len} is not a multiple of "
            f"parallelism.sequence_parallel_degree = {sequence}: set training.seq_len = {longer}"
        )
    if training.param_dtype == "float64" and training.reduce_dtype != "float64":
        problems.append(
            f'training.reduce_dtype = "{training.reduce_dtype}" would round the gradients of '
            'training.param_dtype = "float64": set training.reduce_dtype = "float64"'
        )
    if warmup_steps > training.steps:
        problems.append(
            f"lr_scheduler.warmup_steps = {warmup_steps} is more than training.steps = {training.steps}: "
            "lower the first or raise the second"
        )
    return problems


def _memory_problems(config: Config, model_config: Any) -> list[str]:
    checkpoint, layers, problems = config.activation_checkpoint, getattr(model_config, "num_hidden_layers", None), []
    if checkpoint.mode == "none" and checkpoint.offload != "none":
        problems.append(
            f'activation_checkpoint.offload = "{checkpoint.offload}" moves checkpoints, and activation_checkpoint.mode '
            '= "none" makes none: set activation_checkpoint.mode = "full"'
        )
    if layers is not None and checkpoint.every > layers:
        problems.append(
            f"activation_checkpoint.every = {checkpoint.every} is more than the model's {layers} layers: set it to "
            f"{layers} or less"
        )
    return problems


def _dtype_problems(config: Config) -> list[str]:
    dtype, problems = config.training.param_dtype, []
    if config.optimizer.stochastic_rounding and dtype != "bfloat16":
        problems.append(
            f'optimizer.stochastic_rounding = true rounds to bfloat16, but training.param_dtype = "{dtype}": '
            'set one to false or the other to "bfloat16"'
        )
    if config.optimizer.name != "adamw" and dtype == "float64":
        problems.append(
            f'optimizer.name = "{config.optimizer.name}" computes in fp32, but training.param_dtype = "float64": '
            'set optimizer.name = "adamw"'
        )
    if config.quantize.float8 and dtype != "bfloat16":
        problems.append(
            f'quantize.float8 = true needs training.param_dtype = "bfloat16", which is "{dtype}": set one or the other'
        )
    return problems


def _model_problems(config: Config, model_config: Any, num_token_ids: int, sequence: int) -> list[str]:
    def value(key: str) -> Any:
        return getattr(model_config, key, None)

    def setting(key: str) -> str:  # where the user finds it
        return f"model.config.{key}" if config.model.config else f"{key} in the config.json of {config.model.path}"

    problems, seq_len = [], config.training.seq_len
    positions, vocab_size, dropout = value("max_position_embeddings"), value("vocab_size"), value("attention_dropout")
    heads, kv_heads = value("num_attention_heads"), value("num_key_value_heads")
    if positions is not None and seq_len > positions:
        problems.append(
            f"training.seq_len = {seq_len} is longer than the model's max_position_embeddings = {positions}: "
            f"lower training.seq_len, or raise {setting('max_position_embeddings')}"
        )
    if vocab_size is not None and num_token_ids > vocab_size:
        remedy = f" or set model.config.vocab_size = {num_token_ids}" if config.model.config else ""
        problems.append(
            f"model.tokenizer = {_toml(config.model.tokenizer)} emits ids up to {num_token_ids - 1}, "
            f"but the model's vocab_size is {vocab_size}: set model.tokenizer to one that belongs to the model{remedy}"
        )
    if dropout:
        problems.append(
            f"attention_dropout = {dropout}: sequence-parallel attention has no dropout; "
            f"set {setting('attention_dropout')} to 0"
        )
    if heads is not None and kv_heads and heads % kv_heads:
        problems.append(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}: "
            f"change {setting('num_key_value_heads')}"
        )
    return problems
