"""The settings of a run: the TOML schema, with one class for each section.

`load.py` reads and writes the TOML. `combinations.py` and `validate.py` check settings against each
other, the machine and the model. Nothing here imports torch or transformers, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import sysconfig
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from titan_ulysses.config.combinations import combination_problems


def expand_path(path: str) -> str:
    """Expand `~`, `$VARS` and `{stdlib}` in a path.

    `{stdlib}` is the folder of Python's standard library, which is real text that every machine
    has.
    """
    return os.path.expanduser(
        os.path.expandvars(path.replace("{stdlib}", sysconfig.get_path("stdlib")))
    )


def _positive_or_derived(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be at least 1, or -1 to derive it")
    return value


def _core_name(name: str) -> str:
    if name not in CORES and ":" not in name:
        raise ValueError(f"needs one of {', '.join(CORES)}, or package.module:function")
    return name


CORES = ("auto", "flash", "flex", "sdpa", "blockwise")
"""Names of the attention cores, which are functions in ulysses/cores.py.

"auto" takes the first of the others that can run this model here; they are listed fastest first.
"""
Core = Annotated[str, AfterValidator(_core_name)]
PathText = Annotated[str, AfterValidator(expand_path)]
Tile = Annotated[int, Field(ge=-1)]
PositiveOrDerived = Annotated[int, AfterValidator(_positive_or_derived)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
Dtype = Literal["float64", "float32", "bfloat16"]


class Section(BaseModel):
    """Base class of all sections.

    Unknown keys are refused, and values cannot change once they are read. inf and nan are refused
    unless a field allows them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic would read true as 1, so that `steps = true` would mean one step.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("needs a number, not true or false")
        return value


class Job(Section):
    name: str = Field(
        "run", min_length=1, description="Name of the run; its files go to <dump_folder>/<name>/."
    )
    dump_folder: PathText = Field(
        "./outputs", min_length=1, description="Folder that holds the folders of all runs."
    )


class Model(Section):
    path: PathText = Field(
        "", description="Pretrained model: a folder or a hub name. Either this or [model.config]."
    )
    config: dict[str, Any] | None = Field(
        None, description="A transformers config with its model_type; the weights start random."
    )
    tokenizer: PathText = Field(
        "", description='"bytes", a folder or a hub name; empty: the one in model.path.'
    )
    attention: Core = Field(
        "auto",
        description="auto|flash|flex|sdpa|blockwise, or your own as package.module:function.",
    )
    rope_scaling: dict[str, Any] | None = Field(
        None,
        description="RoPE for longer sequences: rope_type (linear|dynamic|yarn|longrope|llama3), "
        "factor, ...",
    )
    resize_embeddings: int = Field(
        0,
        ge=0,
        description="Let a model grow to its tokenizer's tokens, up to a multiple of this many; 0: "
        "it must fit.",
    )
    freeze: list[str] = Field(
        [],
        description="Parameters that are not trained, as patterns of their names: "
        '"model.embed_tokens.*".',
    )

    @field_validator("config")
    @classmethod
    def _names_its_type(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config and not isinstance(config.get("model_type"), str):
            raise ValueError('needs a model_type, as in model_type = "llama"')
        return config or None  # an empty table clears what a base file set: `--model.config {}`

    @field_validator("rope_scaling")
    @classmethod
    def _may_be_cleared(cls, table: dict[str, Any] | None) -> dict[str, Any] | None:
        return table or None


class LoRA(Section):
    rank: int = Field(
        0, ge=0, description="Train adapters of this rank (LoRA), and nothing else; 0: no adapters."
    )
    alpha: float = Field(16.0, gt=0, description="What adapters add is multiplied by alpha / rank.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapters' inputs that is dropped in training."
    )
    target_modules: list[str] = Field(
        [],
        description='Which linear layers get one: names ("q_proj") or patterns '
        '("layers.1?.mlp.*"); empty: all but the head.',
    )


class SourceSettings(Section):
    """The keys of one source of documents: [data] itself, or an entry of [[data.mixture]]."""

    source: Literal["text", "jsonl", "hf", "chat"] = Field(
        "text",
        description="text: a document a file; jsonl: JSON lines or parquet; hf: a data set; chat: "
        "messages.",
    )
    path: PathText = Field(
        "",
        description="File, folder, pattern or data set name; ~, $VARS and {stdlib} (Python's "
        "library) expand.",
    )
    extensions: list[str] = Field(
        [],
        description="Which files of a folder are read; empty: .txt, or all that jsonl and chat can "
        "read.",
    )
    encoding: str = Field(
        "utf-8", min_length=1, description='Text encoding; "bytes": raw, for tokenizer "bytes".'
    )
    text_field: str = Field(
        "text", min_length=1, description="jsonl, hf: the field that holds the text."
    )
    prompt_field: str = Field(
        "", description="jsonl, hf: with completion_field, in place of text_field; not trained on."
    )
    completion_field: str = Field(
        "", description="jsonl, hf: what follows the prompt, and is trained on."
    )
    messages_field: str = Field(
        "messages", min_length=1, description="chat: the field with the list of messages."
    )
    tools_field: str = Field(
        "tools", min_length=1, description="chat: the field with the tools, where a chat has any."
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="assistant: the assistant's turns, completions; all: every token of chats and "
        "prompts.",
    )
    subset: str = Field(
        "", description="hf, chat: configuration of the data set; empty: its default one."
    )
    split: str = Field("train", min_length=1, description="hf, chat: split of the data set.")
    streaming: bool = Field(
        False, description="hf, chat: read the data set while training; nothing is prepared."
    )
    bad_lines: Literal["stop", "skip"] = Field(
        "stop",
        description="A line that is not JSON, lacks its field or that the chat template refuses: "
        "stop, or count.",
    )

    def changed(self) -> dict[str, Any]:
        """Return the keys of a source that are not at their defaults, with their values."""
        fields = SourceSettings.model_fields.items()
        values = {key: getattr(self, key) for key, _ in fields}
        return {key: values[key] for key, field in fields if values[key] != field.default}


class MixtureEntry(SourceSettings):
    weight: float = Field(
        1.0, gt=0, description="Share of the sequences; weights are divided by their sum."
    )


class Data(SourceSettings):
    mixture: list[MixtureEntry] = Field(
        [],
        description="[[data.mixture]]: several sources, each with the keys above and a weight; "
        "instead of data.path.",
    )
    packing: Literal["none", "concat", "best_fit"] = Field(
        "concat",
        description="none: a document a sequence, padded; concat: end to end; best_fit: whole "
        "ones, padded.",
    )
    long_documents: Literal["split", "drop"] = Field(
        "split",
        description="Documents longer than training.seq_len: go on in another sequence, or are "
        "left out.",
    )
    cache_folder: PathText = Field(
        "",
        description="Where large tokenized data is kept for the next start; empty: "
        "~/.cache/titan_ulysses.",
    )


class Training(Section):
    seq_len: int = Field(
        2048, ge=1, description="Tokens in a sequence, over all its sequence-parallel ranks."
    )
    local_batch_size: int = Field(
        1, ge=1, description="Sequences a data-parallel rank sees in one forward."
    )
    global_batch_size: PositiveOrDerived = Field(
        -1,
        description="Sequences a step; -1: local_batch_size x data-parallel degree; larger: "
        "gradient accumulation.",
    )
    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Seed of the weights and of the order of the data."
    )
    max_norm: float = Field(
        1.0, ge=0, allow_inf_nan=True, description="Clip gradients to this norm; 0: no clipping."
    )
    param_dtype: Dtype = Field(
        "bfloat16", description="Dtype of parameters and activations in forward and backward."
    )
    reduce_dtype: Dtype = Field(
        "float32", description="Dtype in which gradients are summed over the ranks."
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared log-normalizer of the logits, added to each token's "
        "loss; 0: off.",
    )
    deterministic: bool = Field(
        False, description="Deterministic algorithms only: slower, the same bits each time."
    )


class Parallelism(Section):
    data_parallel_replicate_degree: PositiveOrDerived = Field(
        1, description="Replicas of the sharded model (HSDP)."
    )
    data_parallel_shard_degree: PositiveOrDerived = Field(
        -1, description="Ranks that shard the parameters (FSDP2); -1: derived from the world size."
    )
    sequence_parallel_degree: PositiveOrDerived = Field(
        1, description="Ranks that share one sequence (Ulysses)."
    )


class ActivationCheckpoint(Section):
    mode: Literal["none", "full"] = Field(
        "full", description="full: keep block inputs only, recompute in backward."
    )
    every: int = Field(
        1, ge=1, description="Blocks a checkpoint: of so many only the first one's input is kept."
    )
    offload: Literal["none", "host", "disk"] = Field(
        "none",
        description="Where these inputs wait for backward: on the device, in host memory, or in "
        "files.",
    )
    offload_folder: PathText = Field(
        "", description='Folder for offload = "disk"; empty: the system\'s temporary one.'
    )


class Memory(Section):
    loss_tile_tokens: Tile = Field(
        0,
        description="Tokens a tile of the loss head; 0: as many as make 64 MiB of fp32 logits; -1: "
        "all at once.",
    )
    mlp_tile_tokens: Tile = Field(
        0,
        description="Tokens a tile of the MLPs and norms; 0: the model's width, at least 1,024, "
        "where blocks are checkpoints, and else -1: not tiled.",
    )
    parameter_offload: bool = Field(
        False,
        description="Parameters, gradients and optimizer state in host memory; the optimizer steps "
        "there.",
    )
    optimizer_offload: bool = Field(
        False,
        description="Optimizer state in host memory; it visits the device a parameter at a time.",
    )


class Compile(Section):
    enable: bool = Field(
        False,
        description="Compile each block's MLP and norms (torch.compile); the first step waits.",
    )


class Quantize(Section):
    float8: bool = Field(
        False,
        description="Linear layers of the blocks multiply in float8 (torchao); GPUs from sm_89 on.",
    )


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit", "adamw4bit"] = Field(
        "adamw",
        description="AdamW with its two moments in fp32, or quantized to 8 or 4 bits (torchao).",
    )
    lr: float = Field(3e-4, ge=0, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Decay of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator of the update.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")
    stochastic_rounding: bool = Field(
        False,
        description="Store parameters in bfloat16, rounded stochastically after each step; no fp32 "
        "master weights.",
    )


class LRScheduler(Section):
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warmup.")
    decay_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Shape after the warmup."
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="Where the decay ends, as a share of optimizer.lr."
    )


class Checkpoint(Section):
    enable: bool = Field(True, description="Save checkpoints, and resume from them.")
    interval: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_latest_k: int = Field(2, ge=0, description="How many to keep; 0: all.")
    folder: str = Field(
        "checkpoints",
        min_length=1,
        description="Folder of the checkpoints inside the run's folder.",
    )
    initial_load_path: PathText = Field(
        "",
        description="Weights to begin with, in place of model.path's: safetensors, or a step-N "
        "folder of a run.",
    )
    export: bool = Field(
        True, description="At the end, write export/ for transformers' from_pretrained."
    )


class Validation(Section):
    enable: bool = Field(
        False, description="Compute a validation loss before the first step and during training."
    )
    interval: int = Field(100, ge=1, description="Steps between validations.")
    steps: int = Field(
        10,
        ge=0,
        description="Global batches a validation, spread evenly over the held-out data; 0: all of "
        "it.",
    )
    path: PathText = Field(
        "", description="Held-out data, read as [data] says; empty: every 100th document of data."
    )
    split: str = Field(
        "", description="hf, chat: split of the held-out data set; empty: data.split."
    )


class Plan(Section):
    gpu: str = Field(
        "H100-80GB", min_length=1, description="GPU to plan for: A100-80GB, H100-80GB, H200, B200."
    )
    gpu_memory_gib: float = Field(
        0, ge=0, description="Its memory, where it is not that of plan.gpu; 0: plan.gpu's."
    )
    host_memory_gib: float = Field(
        0, ge=0, description="Host memory of a node; 0: not known, not looked at."
    )
    gpus_per_node: int = Field(8, ge=1, description="GPUs of a node.")
    world_size: int = Field(
        0, ge=0, description="GPUs to plan for; 0: the product of the degrees in [parallelism]."
    )
    search: bool = Field(
        False, description="Look for the longest sequence that fits, and for the settings it takes."
    )
    ladder: bool = Field(
        False,
        description="Plan what each feature adds to the longest sequence, one after the other.",
    )
    enforce: bool = Field(False, description="Refuse to start a run whose plan does not fit.")


class Metrics(Section):
    log_interval: int = Field(1, ge=1, description="Steps between log lines.")
    enable_wandb: bool = Field(
        False,
        description="Log to Weights & Biases too, as job.name; WANDB_PROJECT and its other "
        "variables count.",
    )


class Profiling(Section):
    enable_profiling: bool = Field(
        False, description="Write traces of the torch profiler, a file a rank."
    )
    save_traces_folder: str = Field(
        "profile_traces", min_length=1, description="Folder of the traces inside the run's folder."
    )
    profile_freq: int = Field(
        10, ge=1, description="Steps from one trace, or snapshot, to the next."
    )
    profiler_active: int = Field(
        1, ge=1, description="Steps in a trace: the last ones of every profile_freq."
    )
    profiler_warmup: int = Field(
        3, ge=0, description="Steps before these that are traced and thrown away."
    )
    enable_memory_snapshot: bool = Field(
        False,
        description="CUDA: write what the allocator did, every profile_freq steps and when memory "
        "runs out.",
    )
    save_memory_snapshot_folder: str = Field(
        "memory_snapshot",
        min_length=1,
        description="Folder of the snapshots inside the run's folder.",
    )


class Config(Section):
    """All settings of a run, immutable.

    `load_config` builds it. `validate.check` checks it against the world size, the model and the
    tokenizer.
    """

    job: Job = Job()
    model: Model = Model()
    lora: LoRA = LoRA()
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
    profiling: Profiling = Profiling()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _settings_that_exclude_each_other(self) -> Config:
        if problems := combination_problems(self):
            raise ValueError("\n".join(problems))
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in Config.model_fields.items()
}
KEYS: dict[str, FieldInfo] = {
    f"{s}.{k}": field for s in SECTIONS for k, field in SECTIONS[s].model_fields.items()
}
