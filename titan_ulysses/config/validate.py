"""Checks of settings against the world size, the model and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_ulysses.config.schema import PREFERENCES, Config
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UsageError


@dataclass(frozen=True)
class MeshDegrees:
    """The three degrees of the mesh, and how the batch of a step spreads over it.

    No degree is left to be derived.
    """

    replicate: int
    shard: int
    sequence: int
    local_batch_size: int = 1
    accumulation_steps: int = 1  # forward and backward passes of a rank in one step

    @property
    def data_parallel(self) -> int:
        """The number of ranks, or sequence-parallel groups, that read different samples."""
        return self.replicate * self.shard

    @property
    def global_batch_size(self) -> int:
        """The number of sequences in one optimizer step."""
        return self.local_batch_size * self.data_parallel * self.accumulation_steps


def ranks_of(config: Config) -> int:
    """Return the number of ranks in the mesh; a degree that is to be derived (-1) counts as 1."""
    degrees = config.parallelism
    replicate = abs(degrees.data_parallel_replicate_degree)
    shard = abs(degrees.data_parallel_shard_degree)
    return replicate * shard * abs(degrees.sequence_parallel_degree)


def check(config: Config, *, world_size: int, model_config: Any, num_token_ids: int) -> MeshDegrees:
    """Check settings against the world size, the model and the tokenizer; return the degrees.

    What settings need of each other was checked when they were read (`load.config_of`). This needs
    neither a process group nor weights. `model_config` is a transformers text config;
    attributes that it lacks or that are None are not checked. `num_token_ids` is the tokenizer's
    largest id + 1. Raises UserError (exit code 2) with one line for each problem.
    """
    (replicate, shard, sequence), problems = _mesh_degrees(config, world_size)
    accumulation = 1
    if problems:
        sequence = max(1, config.parallelism.sequence_parallel_degree)
    else:
        accumulation, problems = _accumulation_steps(config, (replicate, shard, sequence))
    problems += _run_problems(config, sequence)
    problems += _model_problems(config, model_config, num_token_ids)
    if problems:
        raise UsageError("\n".join(problems))
    batch_size = config.training.local_batch_size
    return MeshDegrees(replicate, shard, sequence, batch_size, accumulation)


def check_frozen(config: Config, frozen: Any, model_config: Any, *, setting: str) -> None:
    """Check the transformers config of the second model of [loss] against that of the first.

    UserError (exit code 2) with one line for each problem, which begin with `setting`.
    """
    problems, seq_len = [], config.training.seq_len
    sizes = [getattr(one, "vocab_size", None) for one in (frozen, model_config)]
    if sizes[0] != sizes[1]:
        problems.append(
            f"{setting}: its vocab_size is {sizes[0]}, and the model's is {sizes[1]}: both must "
            "read the same tokens. Take a model of the same vocabulary"
        )
    positions = _longest_sequence(frozen)
    if positions is not None and seq_len > positions:
        problems.append(
            f"{setting}: it has {positions} positions, and training.seq_len = {seq_len}: lower the "
            "length, or stretch RoPE in the config.json of that model"
        )
    if problems:
        raise UsageError("\n".join(problems))


def _mesh_degrees(config: Config, world_size: int) -> tuple[tuple[int, int, int], list[str]]:
    """Return (replicate, shard, sequence) and the problems, which are empty if there are none.

    A degree of -1 is derived from the world size.
    """
    section = config.parallelism
    replicate = section.data_parallel_replicate_degree
    shard = section.data_parallel_shard_degree
    sequence = section.sequence_parallel_degree
    degrees = (replicate, shard, sequence)
    product = f"dp_replicate({replicate}) x dp_shard({shard}) x sp({sequence})"
    derived = [f"parallelism.{key}" for key, degree in section.model_dump().items() if degree == -1]
    if len(derived) > 1:
        return degrees, [
            f'{" and ".join(derived)} are "auto": only one degree can be derived; set the others'
        ]
    known = replicate * shard * sequence * (-1 if derived else 1)
    if derived and world_size % known:
        return degrees, [
            f"{product} does not divide WORLD_SIZE({world_size}): start a multiple of {known} "
            "ranks, or change the degrees in [parallelism]"
        ]
    if not derived and known != world_size:
        return degrees, [
            f"{product} = {known} is not WORLD_SIZE({world_size}): start {known} ranks, or change "
            '[parallelism], as in parallelism.data_parallel_shard_degree = "auto"'
        ]

    def filled(degree: int) -> int:
        return world_size // known if degree == -1 else degree

    return (filled(replicate), filled(shard), filled(sequence)), []


def _accumulation_steps(config: Config, degrees: tuple[int, int, int]) -> tuple[int, list[str]]:
    training, (replicate, shard, _) = config.training, degrees
    smallest = training.local_batch_size * replicate * shard
    if training.global_batch_size == -1:
        return 1, []
    accumulation, remainder = divmod(training.global_batch_size, smallest)
    if remainder:
        remedy = f'set it to {(accumulation + 1) * smallest}, or to "auto" for {smallest}'
        return accumulation, [
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of "
            f"local_batch_size({training.local_batch_size}) x dp_replicate({replicate}) x "
            f"dp_shard({shard}) = {smallest}: {remedy}"
        ]
    return accumulation, []


def _run_problems(config: Config, sequence: int) -> Iterator[str]:
    """Yield the problems of the length with the degree, and of traces with the number of steps."""
    length = config.training.seq_len
    if length % sequence:
        longer = -(-length // sequence) * sequence
        yield (
            f"training.seq_len = {length} is not a multiple of "
            f"parallelism.sequence_parallel_degree = {sequence}: set training.seq_len = {longer}"
        )
    p, steps = config.profiling, config.training.steps
    least = p.profiler_warmup + p.profiler_active
    if p.enable_profiling and p.profile_freq < least:
        yield (
            f"profiling.profile_freq = {p.profile_freq} has no room for "
            f"profiler_warmup({p.profiler_warmup}) + profiler_active({p.profiler_active}) steps: "
            f"raise it to at least {least}"
        )
    elif p.enable_profiling and p.profile_freq > steps:
        yield (
            f"profiling.profile_freq = {p.profile_freq} is more than training.steps = {steps}: a "
            "trace is of the last steps of every profile_freq, so there would be none. Set it to "
            f"{steps} or less"
        )


def _model_problems(config: Config, model_config: Any, num_token_ids: int) -> Iterator[str]:
    def value(key: str) -> Any:
        return getattr(model_config, key, None)

    def setting(key: str) -> str:  # the name under which the user finds it
        return (
            f"model.config.{key}"
            if config.model.config
            else f"{key} in the config.json of {config.model.path}"
        )

    yield from _length_problems(config, model_config, setting("max_position_embeddings"))
    every, layers = config.activation_checkpoint.every, value("num_hidden_layers")
    if layers is not None and every > layers:
        yield (
            f"activation_checkpoint.every = {every} is more than the model's {layers} layers: set "
            f"it to {layers} or less"
        )
    if config.loss.name in PREFERENCES and value("output_router_logits"):
        yield (
            f'loss.name = "{config.loss.name}" has no router loss: set '
            f"{setting('output_router_logits')} to false"
        )
    vocab_size, dropout = value("vocab_size"), value("attention_dropout")
    heads, kv_heads = value("num_attention_heads"), value("num_key_value_heads")
    if vocab_size is not None and num_token_ids > vocab_size:
        own = f"model.config.vocab_size = {num_token_ids}"
        remedy = own if config.model.config else "model.resize_embeddings = 1"
        yield (
            f"model.tokenizer = {to_toml(config.model.tokenizer)} emits ids up to "
            f"{num_token_ids - 1}, but the model's vocab_size is {vocab_size}: set model.tokenizer "
            f"to one that belongs to the model or set {remedy}"
        )
    if dropout:
        yield (
            f"attention_dropout = {dropout}: sequence-parallel attention has no dropout; set "
            f"{setting('attention_dropout')} to 0"
        )
    if heads is not None and kv_heads and heads % kv_heads:
        yield (
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}: "
            f"change {setting('num_key_value_heads')}"
        )


def _length_problems(config: Config, model_config: Any, setting: str) -> Iterator[str]:
    """Yield the problem of sequences longer than the model's positions, if there is one.

    `setting` is where the user finds the number of positions.
    """
    seq_len, positions = config.training.seq_len, _longest_sequence(model_config)
    if positions is not None and seq_len > positions and config.model.rope_scaling:
        factor = config.model.rope_scaling["factor"]
        original = round(positions / factor)
        yield (
            f"training.seq_len = {seq_len} is longer than {positions}, which "
            f"model.rope_scaling.factor = {factor} makes of the model's {original}: set the factor "
            f"to {-(-seq_len // original)}, or lower training.seq_len"
        )
    elif positions is not None and seq_len > positions:
        yield (
            f"training.seq_len = {seq_len} is longer than the model's max_position_embeddings = "
            f"{positions}: lower training.seq_len, or raise {setting}, or stretch RoPE with "
            "[model.rope_scaling]"
        )


def _longest_sequence(model_config: Any) -> int | None:
    """Return the longest sequence that the model's positions allow; None if it does not say."""
    longest = getattr(model_config, "max_position_embeddings", None)
    rope = getattr(model_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    # Only "dynamic" keeps the original length in max_position_embeddings, because its frequencies
    # need it. For other types the value is already the scaled one.
    is_dynamic = longest and rope.get("rope_type") == "dynamic"
    return int(longest * rope["factor"]) if is_dynamic else longest
