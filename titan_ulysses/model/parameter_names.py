"""Names of a model's parameters and modules, and the patterns that users write for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError

_ADAPTER = re.compile(r"\.lora_(A|B|magnitude_vector)\.")
_ADAPTED = re.compile(r"\.base_layer(?=\.|$)")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def plain(name: str) -> str:
    """Return a parameter's or module's name in the transformers model, which has no adapters.

    That of an adapter stays as peft has it, which nests those of several parameters of a module.
    """
    return name if is_adapter(name) else _ADAPTED.sub("", name)


def is_adapter(name: str) -> bool:
    """Return whether the parameter or module of this name belongs to a LoRA adapter of peft."""
    return _ADAPTER.search(name) is not None


def is_router(name: str) -> bool:
    """Return whether the module of this name chooses experts, or how much of one is taken.

    Low precision is not for these small layers: a wrong expert costs more than they save.
    """
    return name.rpartition(".")[2] in _ROUTERS


def matching(
    patterns: Sequence[str], names: Iterable[str], *, setting: str, what: str, tails: bool = False
) -> set[str]:
    """Return the names that match a pattern (`*`, `?`, `[...]`; dots have no special meaning).

    With `tails`, a pattern may leave out the first parts of a name, as "q_proj" does. UserError if
    a pattern matches no name. Its message uses `setting`, where the patterns come from, and `what`,
    the kind of thing that is named.
    """
    names, found = list(names), set()
    for pattern in patterns:
        wanted = [pattern, f"*.{pattern}"] if tails else [pattern]
        matched = {name for name in names if any(fnmatchcase(name, w) for w in wanted)}
        if not matched:
            wrong = f"{to_toml(pattern)} matches no {what}. {_near(pattern, names, tails)}"
            raise UserError(f"{setting} = {to_toml(list(patterns))}: {wrong}")
        found |= matched
    return found


def _near(pattern: str, names: Sequence[str], tails: bool) -> str:
    """Return a hint for a pattern that matches nothing: the most similar names, or else some names.

    Layers that differ only in their number count as one.
    """
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    if tails:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in kinds)
    near = get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), kinds, n=3, cutoff=0.5)
    return (
        f"Did you mean {' or '.join(near)}?"
        if near
        else f"There are {', '.join(list(kinds)[:12])}."
    )
