"""Names of a model's parameters and modules, and the patterns that users write for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError

_ADAPTER = re.compile(r"\.lora_[AB]\.")
_ADAPTED = re.compile(r"\.base_layer(?=\.|$)")


def plain(name: str) -> str:
    """The name of a parameter or module in the transformers model, which knows no adapters."""
    return _ADAPTED.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether this is the name of a parameter, or module, of a LoRA adapter: peft's own, which
    transformers has not.
    """
    return _ADAPTER.search(name) is not None


def matching(
    patterns: Sequence[str], names: Iterable[str], *, setting: str, what: str, tails: bool = False
) -> set[str]:
    """Those of names that a pattern matches (`*`, `?`, `[...]`; dots are nothing special).

    tails: a pattern may leave out the first parts of a name, as "q_proj" does. UserError where one
    matches none of them: setting is where the patterns come from, what they are patterns of.
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
    """The names most like pattern, layers taken together; or a few of all."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    if tails:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in kinds)
    near = get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), kinds, n=3, cutoff=0.5)
    return (
        f"Did you mean {' or '.join(near)}?"
        if near
        else f"There are {', '.join(list(kinds)[:12])}."
    )
