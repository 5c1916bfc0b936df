"""RoPE for longer sequences: `[model.rope_scaling]` applied to a transformers config.

The frequencies and the names of the keys are those of transformers (`modeling_rope_utils`). This
module decides what a config needs in addition: how long the original sequences were, and how long
they may be now.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from titan_ulysses.config.toml import show
from titan_ulysses.distributed.errors import UsageError, UserError, one_line

_LARGEST_FACTOR = 10**6
_ORIGINAL = "original_max_position_embeddings"
# Required and optional keys of each type; rope_theta is optional for all types.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            _ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": ({"factor", "short_factor", "long_factor"}, {_ORIGINAL, "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
}


def scale_rope(config: PreTrainedConfig, table: dict[str, Any]) -> None:
    """Set in config, in place, the RoPE that table asks for and the length that it reaches.

    `table` has rope_type (or type): linear (arXiv 2306.15595), dynamic (NTK), yarn (arXiv
    2309.00071), longrope (arXiv 2402.13753) or llama3. It has factor, by which sequences become
    longer, and the keys that transformers has for the type. original_max_position_embeddings, if it
    is not given, is the value that config already has, or else config's max_position_embeddings.
    The latter becomes original * factor, except for "dynamic", whose frequencies need the original
    value there. Layers with sliding windows keep their own RoPE. UserError for a table that cannot
    be used.
    """
    kind, scaling = _checked(table)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or getattr(config, "max_position_embeddings", None) is None:
        raise UserError(
            f'model.rope_scaling: "{config.model_type}" has no RoPE that could be scaled.'
        )
    by_layer = "full_attention" in parameters
    old = parameters["full_attention"] if by_layer else parameters
    longest = config.max_position_embeddings
    original = longest
    if _ORIGINAL in _KEYS[kind][1]:
        original = scaling.get(_ORIGINAL) or _original_positions(config, old)
        scaling[_ORIGINAL] = original
        if hasattr(config, _ORIGINAL):  # phi3 has it here too, where it takes precedence
            setattr(config, _ORIGINAL, original)
    if not isinstance(original, int) or not 1 <= original <= longest:
        raise UserError(
            f"model.rope_scaling.{_ORIGINAL} = {show(original)}: needs a number of tokens, at most "
            f"the model's own max_position_embeddings = {longest}"
        )
    kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
    new = {**kept, **scaling, "rope_type": kind}
    if kind == "longrope":
        _check_lengths(config, new)
    config.rope_parameters = {**parameters, "full_attention": new} if by_layer else new
    if kind != "dynamic":
        config.max_position_embeddings = int(original * scaling["factor"])
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except Exception as error:  # transformers raises whatever its checks raise
        raise UserError(
            f"model.rope_scaling: transformers refuses it: {one_line(error)}"
        ) from error


def _original_positions(config: PreTrainedConfig, rope: dict[str, Any]) -> int:
    return rope.get(_ORIGINAL) or getattr(config, _ORIGINAL, None) or config.max_position_embeddings


def rope_for(config: PreTrainedConfig, seq_len: int) -> dict[str, Any] | None:
    """Return the [model.rope_scaling] with which config's model reads seq_len tokens: YaRN.

    None where it reads them as it is, or has no RoPE that could be scaled.
    """
    parameters = getattr(config, "rope_parameters", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not parameters or positions is None or seq_len <= positions:
        return None
    original = _original_positions(config, parameters.get("full_attention", parameters))
    return {"rope_type": "yarn", "factor": float(-(-seq_len // original))}


def _checked(table: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the type and its keys.

    UserError for an unknown type, an unknown or missing key, or a factor below 1.
    """
    scaling = dict(table)
    older = scaling.pop("type", None)
    kind = scaling.pop("rope_type", older)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UsageError(
            f"model.rope_scaling.rope_type = {show(kind)}: the types are {', '.join(_KEYS)}"
        )
    needed, possible = _KEYS[kind]
    if unknown := sorted(scaling.keys() - needed - possible - {"rope_theta"}):
        keys = ", ".join(sorted(needed | possible | {"rope_theta"}))
        raise UsageError(
            f'model.rope_scaling.{unknown[0]}: "{kind}" has no such key, it has {keys}'
        )
    if missing := sorted(needed - scaling.keys()):
        raise UsageError(f'model.rope_scaling: "{kind}" needs {", ".join(missing)}')
    factor = scaling["factor"]
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 1 <= factor <= _LARGEST_FACTOR:
        raise UsageError(
            f"model.rope_scaling.factor = {show(factor)}: needs a number from 1 to "
            f"{_LARGEST_FACTOR:,}"
        )
    return kind, scaling


def _check_lengths(config: PreTrainedConfig, new: dict[str, Any]) -> None:
    """Raise UserError if longrope's lists do not have one number for each rotated pair."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(head_dim * new.get("partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        if not isinstance(new[key], list) or len(new[key]) != pairs:
            raise UserError(
                f"model.rope_scaling.{key} = {show(new[key])}: needs {pairs} numbers, one for "
                "each pair of dimensions that RoPE rotates"
            )
