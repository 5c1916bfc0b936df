"""What the tensors of a model are called in its files, and how they are put together there.

transformers keeps the experts of a layer in one tensor, and writes each of them by itself, as the
hub has them. Its conversions between the two, renamings among them, are used here a few tensors at
a time: on tensors without data, to know what belongs together, and on the tensors themselves when
they are read or written.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from titan_ulysses.model import hf


@dataclass
class Read:
    """Tensors of files that become one or several tensors of the model."""

    model: PreTrainedModel
    """on meta: some conversions look at its shapes"""
    target: str
    """The (first) tensor of the model."""
    converter: WeightConverter | None
    """None: the tensor is in the files as it is in the model."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files by the pattern that they matched, in the order in which they are put
    together.
    """

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    @property
    def stacks(self) -> bool:
        """Whether row i of the only target is made of the i-th source of each pattern, and of
        nothing else.
        """
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        return (
            len(self.converter.target_patterns) == 1
            and isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(getattr(other, "dim", 0) > 0 for other in others)
        )

    def convert(self, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """The model's tensors from those of the files, given by pattern as `sources` has their
        names.
        """
        if self.converter is None:
            return {self.target: tensors[next(iter(self.sources))][0]}
        converter = copy.deepcopy(self.converter)  # it keeps what it is given
        for pattern, parts in tensors.items():
            for part in parts:
                converter.add_tensor(self.target, self.target, pattern, part)
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


class Layout:
    """The names and shapes of a model's tensors, in the model and in its files."""

    def __init__(self, model: PreTrainedModel):
        """model may be wrapped and sharded, and is not changed."""
        self.plain = hf.build_on_meta(model.config, model.dtype)
        self.state = self.plain.state_dict(keep_vars=True)
        """Parameters, tied ones under each of their names, and persistent buffers; without data."""
        self.main = self._main_names()

    def _main_names(self) -> dict[str, str]:
        """The one name, for each name of a tensor, under which transformers saves it."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            names.setdefault(id(tensor), []).append(name)
        tied = self.plain.all_tied_weights_keys
        mains = (
            next((name for name in same if name not in tied), same[0]) for same in names.values()
        )
        return {
            name: main for same, main in zip(names.values(), mains, strict=True) for name in same
        }

    # --- from files -------------------------------------------------------------------------------

    def reads(self, stored: set[str]) -> tuple[list[Read], list[str]]:
        """How the tensors `stored` in files fill the model; and those that it does not have."""
        conversions = get_model_conversion_mapping(self.plain)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        found: dict[str, Read] = {}
        unknown = []
        for name in sorted(stored, key=dot_natural_key):
            prefix = self.plain.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.state)
            if target not in self.state and name in self.state:
                target, pattern = name, None  # fused in the files already, as the model has it
            read = found.setdefault(target, Read(self.plain, target, by_pattern.get(pattern)))
            filled = read.sources and (pattern is None or read.converter is None)
            if target not in self.state or filled:
                unknown.append(name)
            else:
                read.sources.setdefault(pattern or name, []).append(name)
        return [read for read in found.values() if read.sources], self._not_expected(unknown)

    def _not_expected(self, unknown: list[str]) -> list[str]:
        """Without those that transformers knows to be in old files for no purpose."""
        keys = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown))
        self.plain._adjust_missing_and_unexpected_keys(keys)
        return [name for name in unknown if name in keys.unexpected_keys]

    # --- to files ---------------------------------------------------------------------------------

    def writes(self) -> list[list[str]]:
        """The model's tensors to be saved, each under its main name, in groups that must be
        converted together.
        """
        reverse = [conversion.reverse_transform() for conversion in self._conversions[::-1]]
        renamings = [c for c in reverse if isinstance(c, WeightRenaming)]
        converters = [c for c in reverse if isinstance(c, WeightConverter)]
        left_out = set(self.plain._keys_to_ignore_on_save or ())
        groups: dict[str, list[str]] = {}
        for name in sorted(set(self.main.values()) - left_out, key=dot_natural_key):
            key, _ = rename_source_key(name, renamings, converters, reverse=True)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def in_files(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `save_pretrained` writes for a group of tensors (see `writes`), by their names
        there.
        """
        self.plain._weight_conversions = self._conversions
        return revert_weight_conversion(self.plain, tensors)

    @cached_property
    def _conversions(self) -> list[WeightTransform]:
        """Those that saving reverts, as for any model that was not loaded from files of an odd
        kind.
        """
        conversions = get_model_conversion_mapping(self.plain, add_legacy=False)
        return [c for c in conversions if not isinstance(c, PrefixChange)]

    def expected(self) -> dict[str, list[str]]:
        """The names in files of what each tensor that is saved is made of."""
        return {
            name: list(
                self.in_files({n: torch.empty_like(self.state[n], device="meta") for n in group})
            )
            for group in self.writes()
            for name in group
        }
