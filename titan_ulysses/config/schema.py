"""The settings of a run: the TOML schema, with one class for each section.

`fields.py` has the kinds of their values. What a setting needs of others, or excludes, stands
beside it: `rules.py` checks that, and `validate.py` checks the settings against the machine and the
model. `load.py` reads and writes the TOML. Nothing here imports torch or transformers, so that
`--help` answers at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from titan_ulysses.config.fields import (
    LEAST_TIMEOUT,
    Beta,
    ChunkTokens,
    CoreName,
    Dtype,
    Excludes,
    FolderName,
    FolderOfRun,
    Interval,
    NamedValues,
    Needs,
    PathText,
    PositiveOrDerived,
    SecondsOrDerived,
    Section,
    Switch,
    TileTokens,
    below,
    finite,
    setting,
)

_BLOCK_INPUTS = (
    "{this} keeps only the inputs of layers, and {other} keeps everything: set {other_name} = "
    '"full", or {name} = "off"'
)
_CHUNKS = (
    '{this} needs layers that compute chunk by chunk: set memory.stream_chunk_tokens = "auto" and '
    'activation_checkpoint.mode = "full", or {name} = "none"'
)
_INCOMPLETE = "{name} is set and {other_name} is not: a prompt needs its completion"
_OF_MUON = (
    "{this} with {other}: Muon is for the hidden matrices of the model, in fp32. Set {name} = "
    '"adamw", or {other_name} to its default, {other_default}'
)
_PACKED = (
    '{this}: only data.packing = "concat" with data.long_documents = "split" can pack documents '
    "that are not known yet; set both, or streaming = false"
)
MOST_STEPS = 10**9
"""More than any run takes."""
PAIRED = ("dpo", "ipo", "simpo", "orpo", "reward")
"""Losses of pairs of completions."""
PREFERENCES = (*PAIRED, "kto")
"""Losses of whole completions."""
_WITH_BETA = tuple(name for name in PREFERENCES if name != "reward")
REFERRING = ("dpo", "ipo", "kto")
"""Those that compare the model with a frozen reference."""
_PAIRS = (
    "{other} with {this}: dpo, ipo, simpo, orpo and reward, and nothing else, are trained on pairs "
    'of completions. Set loss.name to one of them and {name} = "preference", or neither'
)
_JUDGED = (
    "{other} with {this}: KTO, and nothing else, is trained on completions with a label. Set both "
    'loss.name = "kto" and {name} = "unpaired", or neither'
)
_UNREAD_TEACHER = (
    '{this} with {other}: it would have no effect. Set it to 0, or set loss.name = "distillation" '
    "without loss.teacher"
)


def _listed(*words: str) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _read_from(*kinds: str) -> Needs:
    """Return the rule of a key that only some kinds of source have."""
    text = f"{{this}} with {{other}}: only {_listed(*kinds)} read it. Set {{other_name}}, or leave "
    return Needs("source", *kinds, text=text + "{name} out")


def _read_by(*losses: str) -> Needs:
    """Return the rule of a key that only some losses have."""
    readers, reads = _listed(*(f'"{x}"' for x in losses)), "read" if losses[1:] else "reads"
    text = f"{{this}} with {{other}}: only {readers} {reads} it. Set {{other_name}}, or {{name}} "
    return Needs("name", *losses, text=text + "to its default, {default}")


_VALIDATIONS = "{this} needs validations: set {other_name} = true"
_WITH_ADAPTERS = Needs(
    "rank",
    text="{this} with {other}: there are no adapters. Set {other_name}, or {name} to its default, "
    "{default}",
)
_WITHOUT_SETS = Excludes(
    "sets", text='{this} and [[validation.sets]] are both set: clear one, with {name} = ""'
)
_FROM_FILES = _read_from("text", "jsonl", "chat", "preference", "unpaired", "tokens")
_DATA_SETS = ("hf", "chat", "preference", "unpaired", "tokens")
"""Kinds of sources that can be data sets, which have configurations and splits."""
_FROM_A_DATA_SET = _read_from(*_DATA_SETS)


class Job(Section):
    name: Annotated[FolderName, below("job.dump_folder")] = Field("run", min_length=1)
    """Name of the run; its files go to <dump_folder>/<name>/."""
    dump_folder: PathText = Field("./outputs", min_length=1)
    """Folder that holds the folders of all runs."""


class Model(Section):
    path: PathText = setting(
        "",
        Excludes(
            "config",
            text='{this} and [model.config] are both set: clear one, with {name} = "" or '
            "--model.config {{}}",
        ),
        Needs(
            "config",
            of=("",),
            text="{name} is empty and there is no [model.config]: set one of them",
        ),
    )
    """Pretrained model: a folder or a name on the Hugging Face hub. Set either this or
    [model.config].
    """
    config: dict[str, Any] | None = None
    """A transformers config, with its model_type, for a model that starts with random weights. Set
    either this or model.path.
    """
    tokenizer: PathText = ""
    """A folder, a name on the Hugging Face hub, or "bytes" (one token per byte). Empty: the
    tokenizer in model.path.
    """
    attention: CoreName = "auto"
    """Core attention: auto, varlen, flash, flex or sdpa, or your own as package.module:function.
    auto: the fastest one that can run this model on this machine.
    """
    rope_scaling: dict[str, Any] | None = None
    """RoPE for sequences longer than the model was trained on. A table with rope_type (linear,
    dynamic, yarn, longrope or llama3), factor, and the other keys of that type in transformers.
    Unset: the model's own RoPE.
    """
    resize_embeddings: int = setting(
        0,
        Excludes(
            "lora.rank",
            text="{other} and {this} are both set: LoRA would leave the rows of new tokens "
            "untrained. Set one of them to 0",
        ),
        ge=0,
        le=2**20,
    )
    """Enlarge the embedding and the head to the tokenizer's number of tokens, rounded up to a
    multiple of this value. 0: do not enlarge; a tokenizer with more tokens than the model is
    refused.
    """
    freeze: list[str] = setting(
        [],
        Excludes(
            "lora.rank",
            text="{other} and {this} are both set: LoRA freezes the whole model anyway. Clear "
            "one, with lora.rank = 0 or {name} = []",
        ),
    )
    """Parameters that are not trained, as patterns of their names, such as "model.embed_tokens.*".
    """
    vision: Literal["off", "frozen", "train"] = setting(
        "off",
        Excludes(
            "plan.enforce",
            text="{other} and {this} are both set: the planner does not know vision towers. Set "
            "plan.enforce = false",
        ),
    )
    """The images of a model of images and text. frozen: its vision tower is not trained, but its
    text and the projector between the two are; train: all is. off: the model is one of text, or its
    text part alone is trained.
    """

    @field_validator("config")
    @classmethod
    def _names_its_type(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config and not isinstance(config.get("model_type"), str):
            raise ValueError('needs a model_type, as in model_type = "llama"')
        return config or None  # an empty table clears what a base file set: `--model.config {}`

    @field_validator("rope_scaling")
    @classmethod
    def _may_be_cleared(cls, table: dict[str, Any] | None) -> dict[str, Any] | None:
        return finite(table or {}) or None


_OF_EXPERTS = "the adapters of experts have neither dropout nor DoRA, as in peft. Clear one of them"


class LoRA(Section):
    rank: int = Field(0, ge=0, le=2**16)
    """Rank of LoRA adapters. Only the adapters are trained; the model itself is frozen. 0: no
    adapters.
    """
    alpha: float = setting(16.0, _WITH_ADAPTERS, gt=0, le=1e6)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = setting(
        0.0,
        _WITH_ADAPTERS,
        Excludes(
            "compile.enable",
            text="{this} with {other}: compiled code would drop other inputs when it computes "
            "again in backward. Set {name} = 0, or {other_name} = false",
        ),
        ge=0,
        lt=1,
    )
    """Probability of dropout on the inputs of the adapters during training."""
    target_modules: list[str] = setting([], _WITH_ADAPTERS)
    """Linear layers that get an adapter: names ("q_proj") or patterns ("layers.1?.mlp.*"). Empty:
    all except the head; with lora.target_parameters, none.
    """
    target_parameters: list[str] = setting(
        [],
        _WITH_ADAPTERS,
        Excludes("lora.dropout", text="{this} and {other} are both set: " + _OF_EXPERTS),
        Excludes("lora.use_dora", text="{this} and {other} are both set: " + _OF_EXPERTS),
        Excludes(
            "compile.enable",
            text="{this} with {other}: experts with adapters are not compiled. Set {name} = [], "
            "or {other_name} = false",
        ),
    )
    """Parameters of experts that get an adapter for each expert, as in peft: names
    ("experts.gate_up_proj", "experts.down_proj") or patterns. Empty: none.
    """
    use_rslora: bool = setting(False, _WITH_ADAPTERS)
    """rsLoRA: the scale is alpha / sqrt(rank)."""
    use_dora: bool = setting(False, _WITH_ADAPTERS)
    """DoRA: adapters for the direction of each row of a weight, and its length is trained too."""
    quantize_base: Literal["none", "nf4", "released"] = setting(
        "none",
        _WITH_ADAPTERS,
        Excludes(
            "quantize.float8",
            text="{this} and {other} are both set: a frozen weight is stored in 4 or 8 bits, or "
            'multiplied in 8. Set one to "none" or false',
        ),
    )
    """QLoRA: the frozen matrices of the layers in 4 bits, nf4. Embedding, head, routers, and
    matrices whose rows are not a multiple of 64 numbers stay in training.param_dtype; those that
    were released in mxfp4 stay in it. released: those that model.path has in fp8 or mxfp4 stay in
    it, and no other is quantized.
    """


def _is_read(source: SourceSettings) -> bool:
    """Return whether a source is read: [data] is not where [[data.mixture]] is."""
    return not getattr(source, "mixture", None)


def _is_no_preference(source: SourceSettings) -> bool:
    return source.source not in ("preference", "unpaired")


_NO_PAIRS = ("text", "jsonl", "hf", "chat", "tokens")
"""Kinds of sources whose rows are no pairs of completions, and no completions with a label."""


class SourceSettings(Section):
    """The keys of one source of documents: [data] itself, or an entry of [[data.mixture]]."""

    source: Literal["text", "jsonl", "hf", "chat", "tokens", "preference", "unpaired"] = setting(
        "text",
        Needs("loss.name", *PAIRED, of=("preference",), text=_PAIRS, where=_is_read),
        Excludes("loss.name", *PAIRED, of=_NO_PAIRS, text=_PAIRS, where=_is_read),
        Needs("loss.name", "kto", of=("unpaired",), text=_JUDGED, where=_is_read),
        Excludes("loss.name", "kto", of=_NO_PAIRS, text=_JUDGED, where=_is_read),
    )
    """Kind of data. text: each file is a document. jsonl: each line of JSON lines, or row of
    parquet, is one. hf: each row of a Hugging Face data set is one. chat: each row is a
    conversation with a list of messages. tokens: each row has input_ids, or the files are
    Megatron's .bin and .idx. preference: each row is a prompt with a chosen and a rejected
    completion, as texts or lists of messages. unpaired: each is a prompt with a completion and a
    label, true where the completion is good.
    """
    path: PathText = ""
    """File, folder, file pattern or name of a data set. ~, $VARS and {stdlib} (the folder of
    Python's standard library) are expanded.
    """
    extensions: list[str] = setting([], _FROM_FILES)
    """Extensions of the files of a folder that are read. Empty: .txt for text; .jsonl, .json (also
    with .gz or .zst) and .parquet for jsonl, chat, preference and unpaired; .jsonl, .parquet,
    .arrow and .idx for tokens.
    """
    encoding: str = setting(
        "utf-8",
        Needs(
            "model.tokenizer",
            "bytes",
            of=("bytes",),
            text='{this} with {other}: raw bytes need {other_name} = "bytes"',
        ),
        Needs("source", "text", of=("bytes",), text="{this} with {other}: JSON is text"),
        _read_from("text", "jsonl", "chat", "preference", "unpaired"),
        min_length=1,
    )
    """Text encoding of files. "bytes": read text files as raw bytes, which needs model.tokenizer =
    "bytes".
    """
    text_field: str = setting("text", _read_from("jsonl", "hf"), min_length=1)
    """jsonl, hf: name of the field that holds the text."""
    prompt_field: str = setting(
        "",
        Needs("completion_field", text=_INCOMPLETE, where=_is_no_preference),
        _read_from("jsonl", "hf", "chat", "preference", "unpaired"),
    )
    """jsonl, hf: name of the field with a prompt, which is not trained on unless train_on is all.
    Set it together with completion_field, instead of text_field. chat: the same, in place of a list
    of messages. preference, unpaired: name of the field with the prompt. Empty: prompt.
    """
    completion_field: str = setting(
        "",
        Needs("prompt_field", text=_INCOMPLETE, where=_is_no_preference),
        _read_from("jsonl", "hf", "chat", "unpaired"),
    )
    """jsonl, hf, chat: name of the field with the text after the prompt, which is trained on.
    unpaired: name of the field with the completion. Empty: completion.
    """
    chosen_field: str = setting("chosen", _read_from("preference"), min_length=1)
    """preference: name of the field with the completion that is preferred."""
    rejected_field: str = setting("rejected", _read_from("preference"), min_length=1)
    """preference: name of the field with the completion that is not preferred."""
    label_field: str = setting("label", _read_from("unpaired"), min_length=1)
    """unpaired: name of the field that says whether the completion is good, true or false."""
    messages_field: str = setting("messages", _read_from("chat"), min_length=1)
    """chat: name of the field with the list of messages. At its default, rows of ShareGPT
    (conversations) and Alpaca (instruction, input and output) are read too.
    """
    message_fields: dict[str, str] = setting({}, _read_from("chat"))
    """chat: other names of the fields of a message, such as {content = "text", reasoning_content =
    "thoughts"}. Those of ShareGPT, from and value, are known.
    """
    roles: dict[str, str] = setting({}, _read_from("chat"))
    """chat: other names of roles, such as {customer = "user", agent = "assistant"}. Those of
    ShareGPT, such as human and gpt, are known.
    """
    tools_field: str = setting("tools", _read_from("chat"), min_length=1)
    """chat: name of the field with the list of tools, which may be missing from a row."""
    train_on: Literal["assistant", "last", "all"] = setting(
        "assistant",
        Needs("source", "chat", of=("last",), text="{this} with {other}: only chats have turns"),
        Excludes(
            "source",
            "preference",
            "unpaired",
            text="{this} with {other}: the loss is of the completions. Set it to {default}",
        ),
    )
    """Which tokens of chats, prompts and token data are trained on. assistant: the assistant's
    turns, the completions, and the tokens that have labels. last: the assistant's last turn. all:
    every token.
    """
    teacher_top_k: int = setting(
        0,
        _read_from("tokens"),
        Needs("loss.name", "distillation", text=_UNREAD_TEACHER),
        Excludes("loss.teacher", text=_UNREAD_TEACHER),
        Excludes(
            "streaming",
            text="{this} with {other}: it can only be read from data that is prepared first. Set "
            "streaming to false",
        ),
        ge=0,
        le=10**6,
    )
    """tokens: number of a teacher's log-probabilities for each token, in the fields teacher_ids and
    teacher_log_probs, for loss.name = "distillation". 0: none.
    """
    subset: str = setting("", _FROM_A_DATA_SET)
    """All but text and jsonl: configuration of the data set. Empty: its default configuration."""
    split: str = setting("train", _FROM_A_DATA_SET, min_length=1)
    """All but text and jsonl: split of the data set."""
    streaming: bool = setting(
        False,
        Needs("source", "hf", "chat", "tokens", text='{this} with {other}: set source = "hf"'),
        Needs("data.packing", "concat", text=_PACKED),
        Needs("data.long_documents", "split", text=_PACKED),
    )
    """hf, chat, tokens: read and tokenize the data set during training, without preparing it first.
    For data that is too large to prepare.
    """
    bad_lines: Literal["stop", "skip"] = "stop"
    """What to do with a line or row that is not JSON, lacks its field or is refused by the chat
    template. stop: end the run with a message. skip: leave it out and count it.
    """

    def changed(self) -> dict[str, Any]:
        """Return the keys of a source that are not at their defaults, with their values."""
        fields = SourceSettings.model_fields.items()
        values = {key: getattr(self, key) for key, _ in fields}
        return {key: values[key] for key, field in fields if values[key] != field.default}


class MixtureEntry(SourceSettings):
    weight: float = Field(1.0, gt=0, le=1e9)
    """Share of the sequences that come from this source; all weights are divided by their sum."""


class Data(SourceSettings):
    mixture: list[MixtureEntry] = setting(
        [],
        Excludes(
            "path",
            text='{other} and [[data.mixture]] are both set: clear one, with {other_name} = ""',
        ),
    )
    """Several sources in place of data.path: tables [[data.mixture]], each with the keys of a
    source above and a weight.
    """
    packing: Literal["none", "concat", "best_fit"] = setting(
        "concat",
        Excludes(
            "loss.name",
            *PREFERENCES,
            of=("concat",),
            text="{other} with {this}: it would cut completions. Set {name} = "
            '"best_fit", or "none" for one pair in a sequence',
        ),
    )
    """How documents fill sequences. concat: end to end. best_fit: whole documents, then padding.
    none: one document in each sequence, then padding.
    """
    long_documents: Literal["split", "drop"] = "split"
    """Documents longer than training.seq_len. split: continue in another sequence. drop: leave the
    document out.
    """
    max_pixels: int = setting(0, ge=0, le=10**9)
    """Scale larger images, and frames of videos, down to this many pixels before the model's
    processor, which has limits of its own, sees them. 0: only its limits.
    """
    video_fps: float = setting(0.0, ge=0, le=1000)
    """Frames taken of a second of video. 0: as the model's processor does."""
    max_frames: int = setting(0, ge=0, le=10**6)
    """Most frames taken of a video, spread evenly. 0: as the model's processor does."""
    cache_folder: PathText = ""
    """Folder that keeps large tokenized data for the next start. Empty: ~/.cache/titan_ulysses."""


class Training(Section):
    seq_len: int = Field(2048, ge=1, le=2**31 - 1)
    """Tokens in a sequence, over all the sequence-parallel ranks that share it."""
    local_batch_size: int = Field(1, ge=1, le=2**20)
    """Sequences in one forward of a data-parallel rank (or of a group of sequence-parallel ranks).
    """
    global_batch_size: PositiveOrDerived = -1
    """Sequences in one optimizer step. auto (-1): local_batch_size x data-parallel degree. A larger
    multiple of that accumulates gradients.
    """
    steps: int = Field(1000, ge=1, le=MOST_STEPS)
    """Number of optimizer steps, at most where epochs is set, which has no other default then.
    Raise it to continue a finished run.
    """
    epochs: float = Field(0.0, ge=0, le=1e6)
    """End the run after so many passes over the data; of a mixture, over its largest source. 0:
    after training.steps.
    """
    max_hours: float = Field(0.0, ge=0, le=1e6)
    """Hours after the start of the process at which it saves a checkpoint and ends, as after a
    SIGTERM. 0: no limit.
    """
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the initial weights and of the order of the data."""
    max_norm: float = Field(1.0, ge=0, allow_inf_nan=True)
    """Clip the norm of the gradients to this value. 0: no clipping."""
    param_dtype: Dtype = "bfloat16"
    """Dtype of parameters and activations in forward and backward."""
    reduce_dtype: Dtype = setting(
        "float32",
        Excludes(
            "param_dtype",
            "float64",
            of=("float32", "bfloat16"),
            text='{this} would round the gradients of {other}: set {name} = "float64"',
        ),
    )
    """Dtype in which gradients are summed over the ranks."""
    z_loss: float = setting(
        0.0,
        Needs(
            "loss.name",
            "cross_entropy",
            text="{this} with {other}: it is a part of the cross-entropy loss. Set it to {default}",
        ),
        ge=0,
        le=1e3,
    )
    """Weight of an additional loss for each token: the square of the logits' log-normalizer, which
    keeps it near 0. 0: off.
    """
    skip_nonfinite: int = Field(0, ge=0, le=10**9)
    """Steps of the run that may be skipped because their loss or gradient norm is not finite: they
    change neither parameters nor optimizer. One more ends the run. 0: the first such step ends it.
    """
    deterministic: bool = False
    """Use only deterministic algorithms: slower, and with more memory for attention on a GPU, but a
    repeated run gives the same bits.
    """

    @model_validator(mode="before")
    @classmethod
    def _epochs_set_the_end(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("epochs") and "steps" not in table:
            return table | {"steps": MOST_STEPS}
        return table


class Loss(Section):
    name: Literal[
        "cross_entropy", "dpo", "ipo", "simpo", "orpo", "reward", "kto", "distillation"
    ] = setting(
        "cross_entropy",
        Excludes(
            "lora.rank",
            of=("reward",),
            text="{this} with {other}: the new layer that gives rewards is no adapter, and would "
            "not be exported. Set lora.rank = 0",
        ),
    )
    """cross_entropy: next-token prediction. dpo, ipo, simpo, orpo: preferences in pairs of
    completions, read by data.source = "preference". reward: a reward model, which scores the last
    token of a completion, of the same pairs (Bradley-Terry). kto: completions that are good or bad,
    read by "unpaired". distillation: the KL divergence from a teacher.
    """
    label_smoothing: float = setting(0.0, _read_by("cross_entropy", "dpo", "simpo"), ge=0, lt=1)
    """cross_entropy: share of the mean over the vocabulary in the loss of each label. dpo, simpo:
    probability that a pair is the wrong way round.
    """
    beta: float = setting(0.1, _read_by(*_WITH_BETA), gt=0, le=1e3)
    """dpo, ipo, kto: strength of the penalty that keeps the model close to the reference. simpo:
    scale of the rewards. orpo: weight of the odds ratio beside the cross-entropy.
    """
    simpo_gamma: float = setting(0.5, _read_by("simpo"), ge=0, le=1e3)
    """simpo: margin between the rewards of the two completions that is aimed at."""
    center_rewards_coefficient: float = setting(0.0, _read_by("reward"), ge=0, le=1e3)
    """reward: weight of the square of the sum of both rewards, which keeps them near 0."""
    desirable_weight: float = setting(1.0, _read_by("kto"), ge=0, le=1e3)
    """kto: weight of the loss of good completions."""
    undesirable_weight: float = setting(1.0, _read_by("kto"), ge=0, le=1e3)
    """kto: weight of the loss of bad completions."""
    reference: PathText = setting("", _read_by(*REFERRING))
    """dpo, ipo, kto: folder or hub name of the frozen reference model. Empty: the weights that the
    run begins with, which with LoRA are the model without its adapters.
    """
    precompute_reference: bool = setting(False, _read_by(*REFERRING))
    """dpo, ipo, kto: compute the log-probabilities of the reference once, before the first step,
    for all rows. The steps then hold no reference model.
    """
    teacher: PathText = setting("", _read_by("distillation"))
    """distillation: folder or hub name of the teacher, of the same vocabulary. Empty: its
    log-probabilities come with the data (data.teacher_top_k).
    """
    temperature: float = setting(1.0, _read_by("distillation"), gt=0, le=1e3)
    """distillation: temperature of both distributions."""
    teacher_share: float = setting(1.0, _read_by("distillation"), gt=0, le=1)
    """distillation: share of the divergence in the loss. The rest is cross-entropy."""
    prediction_weight: float = setting(
        0.0,
        _read_by("cross_entropy"),
        Excludes(
            "lora.rank",
            text="{other} and {this} are both set: adapters are not for prediction layers. Set "
            "lora.rank = 0 or {name} = 0",
        ),
        Excludes(
            "memory.stream_offload",
            text="{this} with {other}: the prediction layer needs the hidden states on the device. "
            'Set {other_name} = "none" or {name} = 0',
        ),
        ge=0,
        le=1e3,
    )
    """cross_entropy: train the prediction layer (num_nextn_predict_layers = 1) beside the model,
    with this weight of its cross-entropy, of the token after the next one. 0: leave it as it is.
    """
    indexer: Literal["frozen", "warmup", "joint"] = setting(
        "frozen",
        _read_by("cross_entropy"),
    )
    """Training of the indexers that choose the keys of attention (deepseek_v32; arXiv 2512.02556).
    warmup: attention reads all keys, and only indexers are trained, by the divergence of their
    scores from it. joint: by the same over the chosen keys, and the model is trained beside them.
    With LoRA indexers are trained whole, and the model by its adapters.
    """


class Parallelism(Section):
    data_parallel_replicate_degree: PositiveOrDerived = 1
    """Number of replicas of the sharded model (HSDP). auto (-1): derived from the number of ranks;
    only one degree may be auto.
    """
    data_parallel_shard_degree: PositiveOrDerived = -1
    """Data-parallel ranks that shard the parameters (FSDP2); they are sharded over the
    sequence-parallel ranks too. auto (-1): derived from the number of ranks.
    """
    sequence_parallel_degree: PositiveOrDerived = 1
    """Ranks that share each sequence (Ulysses). Raise it for longer sequences, up to the GPUs of a
    node. auto (-1): derived from the number of ranks.
    """


class Comm(Section):
    timeout_s: SecondsOrDerived = Field(-1, le=1e7)
    """After the first step, seconds after which a rank that waits for another one gives up and
    ends. It must be longer than writing a checkpoint takes. auto (-1): 600, or four times the
    planned step on a GPU, where that is longer.
    """
    startup_timeout_s: float = Field(1800.0, ge=LEAST_TIMEOUT, le=1e7)
    """The same timeout until the first step is done, while the ranks connect, load and compile."""


class ActivationCheckpoint(Section):
    mode: Literal["none", "full"] = "full"
    """full: keep only the inputs of blocks, and compute the rest again in backward. none: keep all
    activations, which is faster and takes much more memory.
    """
    every: int = Field(1, ge=1, le=10**6)
    """Blocks that share one checkpoint: only the input of the first one is kept. More blocks need
    less memory for inputs, but more during recomputation.
    """
    offload: Literal["none", "host", "disk"] = setting(
        "none",
        Needs(
            "mode",
            "full",
            text='{this} moves checkpoints, and {other} makes none: set {other_name} = "full"',
        ),
    )
    """Where the kept inputs wait for backward. none: on the device. host: in host memory. disk: in
    files.
    """
    keep_attention: Literal["none", "auto", "all"] = setting(
        "none",
        Excludes(
            "memory.stream_chunk_tokens",
            -1,
            text='{this} keeps what layers compute chunk by chunk: set {other_name} = "auto", or '
            '{name} = "none"',
        ),
    )
    """Keep the outputs of attention too, in the same place as the inputs, so that attention is not
    recomputed in backward. all: of all layers. auto: of as many layers as fit next to offload =
    "host" or "disk". Needs memory.stream_chunk_tokens.
    """
    offload_folder: PathText = ""
    """Folder of the files of offload = "disk". Empty: the system's temporary folder."""


class Memory(Section):
    loss_tile_tokens: TileTokens = 0
    """Tokens in one tile of the loss head. auto (0): as many as make 1 GiB of fp32 logits on a GPU,
    64 MiB on a CPU. all (-1): all tokens at once.
    """
    mlp_tile_tokens: TileTokens = 0
    """Tokens in one tile of the MLPs and norms. auto (0): with activation checkpointing, as many as
    make 512 MiB inside an MLP on a GPU, or on a CPU the model's width, at least 1,024; not tiled
    without it. all (-1): not tiled.
    """
    stream_chunk_tokens: ChunkTokens = setting(
        0,
        Needs(
            "activation_checkpoint.mode",
            "full",
            text=_BLOCK_INPUTS,
            where=lambda memory: memory.stream_chunk_tokens > 0,
        ),
    )
    """Tokens of the whole sequence in one chunk. Layers compute one chunk after the other, so the
    memory that a layer needs does not grow with the sequence. auto (0): 4,096 tokens a rank, and
    off for shorter sequences and where it is not possible. off (-1): the whole sequence at once.
    """
    stream_offload: Literal["none", "host", "disk"] = setting(
        "none",
        Excludes("stream_chunk_tokens", -1, text=_CHUNKS),
        Needs("activation_checkpoint.mode", "full", text=_CHUNKS),
        Needs(
            "loss.name",
            "cross_entropy",
            text="{this} with {other}: this loss needs the hidden states on the device in "
            "backward. Set it to {default}",
        ),
    )
    """Where the hidden states of a sequence are while layers compute its chunks. none: on the
    device. host: in host memory. disk: in files, in activation_checkpoint.offload_folder. Needs
    memory.stream_chunk_tokens.
    """
    parameter_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; the optimizer steps there. For
    models that do not fit on the GPUs; slower.
    """
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory, and copy it to the device for one parameter at a
    time. Slower.
    """


class Compile(Section):
    enable: bool = False
    """Compile the MLP and the norms of each block with torch.compile. The first step takes longer.
    """


class Quantize(Section):
    float8: bool = setting(
        False,
        Needs(
            "training.param_dtype",
            "bfloat16",
            text='{this} needs {other_name} = "bfloat16", which is {other_value}: set one or the '
            "other",
        ),
    )
    """Compute the linear layers of the blocks in float8 (torchao). Needs a GPU of compute
    capability 8.9 or higher.
    """


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit", "adamw4bit", "muon"] = setting(
        "adamw",
        Excludes("lora.rank", of=("muon",), text=_OF_MUON),
        Excludes("stochastic_rounding", of=("muon",), text=_OF_MUON),
        Excludes(
            "training.param_dtype",
            "float64",
            of=("adamw8bit", "adamw4bit"),
            text='{this} computes in fp32, but {other}: set {name} = "adamw"',
        ),
    )
    """adamw: AdamW with its two moments in fp32. adamw8bit, adamw4bit: the moments are quantized to
    8 or 4 bits (torchao). muon: Muon for hidden matrices, and AdamW for embeddings, head, norms and
    all else.
    """
    lr: float = Field(3e-4, ge=0, le=1e40)
    """Peak learning rate. muon scales its updates so that the value for AdamW fits."""
    lr_factors: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    """Factors of lr for some parameters, by patterns of their names, as in {"*.indexer.*" = 10.0}.
    Of several patterns that match a name the last one counts.
    """
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0, le=1.0)
    """Number added to the denominator of the update."""
    weight_decay: float = Field(0.1, ge=0, le=1e3)
    """Decoupled weight decay, as in AdamW."""
    stochastic_rounding: bool = setting(
        False,
        Needs(
            "training.param_dtype",
            "bfloat16",
            text="{this} rounds to bfloat16, but {other}: set one to false or the other to "
            '"bfloat16"',
        ),
    )
    """Store parameters in bfloat16, rounded stochastically after each step, without fp32 master
    weights. Saves memory.
    """


class LRScheduler(Section):
    warmup_steps: int = Field(0, ge=0, le=10**9)
    """Steps of linear warmup, before the decay. A shorter run has that of all its steps."""
    warmup_ratio: float = setting(
        0.0,
        Excludes("warmup_steps", text="{this} and {other} are both set: set one of them to 0"),
        ge=0,
        le=1,
    )
    """Steps of linear warmup as a share of the run."""
    decay_type: Literal["constant", "linear", "cosine", "sqrt", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warmup. sqrt: 1 - sqrt of the share of the decay that is
    done. inverse_sqrt: 1 / sqrt of the steps, counted in warmups (without one, in 10,000).
    """
    decay_ratio: float = setting(
        1.0,
        Excludes(
            "decay_type",
            "constant",
            "inverse_sqrt",
            text="{this} with {other}: there is no decay that could begin later. Set {other_name} "
            'to "linear", "cosine" or "sqrt", or {name} to 1',
        ),
        gt=0,
        le=1,
    )
    """Share of the run, at its end, in which the learning rate decays. Before that it is constant
    (WSD). 1: it decays from the end of the warmup.
    """
    cycles: int = setting(
        1,
        Needs("decay_type", "cosine", text="{this} with {other}: only cosine has restarts"),
        ge=1,
        le=10**6,
    )
    """cosine: number of times that the learning rate falls from its peak, at which it restarts."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the decay, as a fraction of optimizer.lr. inverse_sqrt: never
    less than that.
    """


class Checkpoint(Section):
    enable: bool = True
    """Save checkpoints, and resume from the newest one when the run is started again."""
    interval: Interval = 500
    """Steps between checkpoints; or a share of the run (0.1), "epoch", or "0.5 epoch"."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: a checkpoint is copied to host memory, and written while the next steps run. One is in
    flight at most; the last one is finished before the run ends. It takes host memory for the copy.
    """
    keep_latest_k: int = Field(2, ge=0, le=10**6)
    """Number of newest checkpoints to keep; older ones are deleted. 0: keep all."""
    keep_best: bool = setting(
        False,
        Needs("validation.enable", True, text=_VALIDATIONS),
        Needs(
            "enable",
            True,
            text="{this} with {other}: no checkpoint is saved. Set the second to true, or the "
            "first to false",
        ),
    )
    """Also save and keep the checkpoint with the best validation.metric, and export that one at the
    end.
    """
    folder: FolderOfRun = Field("checkpoints", min_length=1)
    """Folder of the checkpoints, inside the run's folder."""
    shared: bool = True
    """All hosts see the same job.dump_folder. false: each host has a separate one, with the shards
    of its own ranks; a resumed run needs the same hosts and mesh.
    """
    initial_load_path: PathText = ""
    """Weights to start with instead of those in model.path: a folder of safetensors, or a step-N
    folder of another run.
    """
    export: bool = True
    """At the end, write the model to export/, which from_pretrained of transformers opens."""
    push_to_hub: str = setting(
        "",
        Needs("export", True, text="{this} with {other}: nothing is exported. Set {other_name}"),
    )
    """Repository on the Hugging Face hub, such as me/my-model, to which the export, or of LoRA the
    adapter, is uploaded at the end, with a model card. A new one is private. Needs HF_TOKEN.
    """


class ValidationSet(SourceSettings):
    """An entry of [[validation.sets]]."""

    name: str = ""
    """Name of the set, in metrics and pictures: letters, digits, - and _."""
    packing: Literal["", "none", "concat", "best_fit"] = ""
    """How documents of this set fill sequences. Empty: data.packing."""

    @field_validator("name")
    @classmethod
    def _is_part_of_a_path(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]*", name):
            raise ValueError("needs letters, digits, - and _ alone")
        return name


class Validation(Section):
    enable: bool = False
    """Compute the loss on held-out data: before the first step, during training and at the end."""
    interval: Interval = 100
    """Steps between validations; or a share of the run (0.1), "epoch", or "0.5 epoch"."""
    steps: int = Field(10, ge=0, le=10**9)
    """Global batches in one validation, spread evenly over the held-out data. 0: all of the data.
    """
    path: PathText = setting("", _WITHOUT_SETS)
    """Held-out data, read with the other keys of [data]. Empty: validation.split, or else every
    100th document of the training data, which is then not trained on.
    """
    split: str = setting(
        "",
        _WITHOUT_SETS,
        Needs(
            "data.source",
            *_DATA_SETS,
            text="{this} with {other}: files have no splits. Set validation.path, or {other_name} "
            '= "hf"',
            where=lambda validation: validation.enable,
        ),
    )
    """All but text and jsonl: split with the held-out data. Empty: data.split."""
    sets: list[ValidationSet] = []
    """Several named sets in place of validation.path: tables [[validation.sets]], each with a name,
    the keys of a source in [data], and a packing.
    """
    prompts: list[str] = setting(
        [],
        Needs("enable", True, text=_VALIDATIONS),
        Excludes(
            "loss.name",
            "reward",
            text="{this} with {other}: a reward model writes no text. Set {name} = []",
        ),
    )
    """Texts that the model goes on with at each validation, by its likeliest tokens; with
    data.source = "chat", what a user says. A few short ones: each new token is a forward.
    """
    prompt_tokens: int = Field(32, ge=1, le=2**16)
    """Tokens after each of these prompts, at most."""
    metric: str = Field("loss", min_length=1)
    """Metric that checkpoint.keep_best and validation.patience compare. loss: of all held-out data.
    NAME/loss: of the set NAME.
    """
    patience: int = setting(0, Needs("validation.enable", True, text=_VALIDATIONS), ge=0, le=10**9)
    """End the run after this many validations in a row without a new best validation.metric. 0:
    never.
    """


class PlanSettings(Section):
    gpu: str = Field("H100-80GB", min_length=1)
    """GPU to plan for, as in H100-80GB, GB200, RTX-4090 or MI300X; docs/planner.md has all."""
    gpu_memory_gib: float = Field(0, ge=0, le=1e6)
    """Memory of one GPU in GiB, if it differs from that of plan.gpu. 0: the memory of plan.gpu."""
    host_memory_gib: float = Field(0, ge=0, le=1e6)
    """Host memory of one node in GiB. 0: unknown; --plan does not check it, and a run that starts
    takes what is free.
    """
    disk_gib: float = Field(0, ge=0, le=1e9)
    """Room for files of one node in GiB (offload = "disk"). 0: unknown, so not checked."""
    gpus_per_node: int = Field(8, ge=1, le=2**10)
    """GPUs in one node."""
    attention_kernel: Literal["auto", "fa2", "fa3", "fa4"] = "auto"
    """FlashAttention to plan for. fa2 ships with torch; a run uses fa3 or fa4 if their packages are
    installed. auto: fa2, or for a run that starts, the version that it uses.
    """
    world_size: int = Field(0, ge=0, le=2**20)
    """Number of GPUs to plan for. 0: the product of the degrees in [parallelism]."""
    search: Annotated[Literal["off", "longest", "fastest"], Switch(on="longest")] = "off"
    """With --plan: search for settings. longest (or true): for the longest sequence that fits.
    fastest: for the fastest training with sequences of training.seq_len. off (or false): no search.
    """
    tokens: int = Field(0, ge=0, le=10**18)
    """Tokens to train, for the planned hours of the run. 0: training.steps steps."""
    gpu_hour_price: float = Field(0, ge=0, le=1e9)
    """Price of one GPU for one hour, for the planned cost of the run. 0: not known."""
    max_step_seconds: float = Field(0, ge=0, le=1e9)
    """Longest step, in seconds, that plan.search and plan.ladder accept. 0: any."""
    ladder: bool = False
    """With --plan: switch on features one after another, and plan the longest sequence after each.
    """
    enforce: bool = False
    """Refuse to start a run if its plan does not fit, or if no plan could be made."""


class Metrics(Section):
    log_interval: int = Field(1, ge=1, le=10**9)
    """Steps between log lines."""
    enable_report: bool = True
    """At the end of the run, write report.html: a page with its losses, memory, speed, balance and
    loss by position.
    """
    enable_wandb: bool = False
    """Log to Weights & Biases too, under job.name. Its own environment variables, such as
    WANDB_PROJECT, apply.
    """


class Profiling(Section):
    enable_profiling: bool = False
    """Write traces of the torch profiler, one file for each rank."""
    save_traces_folder: FolderOfRun = Field("profile_traces", min_length=1)
    """Folder of the traces, inside the run's folder."""
    profile_freq: int = Field(10, ge=1, le=10**9)
    """Steps from one trace, or memory snapshot, to the next."""
    profiler_active: int = Field(1, ge=1, le=10**6)
    """Steps in one trace: the last ones of every profile_freq steps."""
    profiler_warmup: int = Field(3, ge=0, le=10**6)
    """Steps before a trace that the profiler records and discards."""
    enable_memory_snapshot: bool = False
    """CUDA only: write a snapshot of the memory allocator's history every profile_freq steps, and
    when memory runs out.
    """
    save_memory_snapshot_folder: FolderOfRun = Field("memory_snapshot", min_length=1)
    """Folder of the snapshots, inside the run's folder."""


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
    loss: Loss = Loss()
    parallelism: Parallelism = Parallelism()
    comm: Comm = Comm()
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
    plan: PlanSettings = PlanSettings()


SECTIONS: dict[str, type[Section]] = {
    name: cast(type[Section], field.annotation) for name, field in Config.model_fields.items()
}
KEYS: dict[str, FieldInfo] = {
    f"{s}.{k}": field for s in SECTIONS for k, field in SECTIONS[s].model_fields.items()
}
KEYS_OF_A_HOST = frozenset({"activation_checkpoint.offload_folder", "data.cache_folder"})
"""Settings that may differ between the hosts of a run."""


def is_switch(key: str) -> bool:
    """Return whether the setting `section.key` may be given without a value, which means `true`."""
    field = KEYS[key]
    return field.annotation is bool or any(isinstance(one, Switch) for one in field.metadata)


def named_values_of(key: str) -> dict[str, int]:
    """Return the words of the setting `section.key` and the numbers that they stand for."""
    return next((one.values for one in KEYS[key].metadata if type(one) is NamedValues), {})


def in_words(key: str, value: Any) -> Any:
    """Return a value of the setting `section.key` as it is printed: by its word, if it has one."""
    return next((word for word, number in named_values_of(key).items() if number == value), value)
