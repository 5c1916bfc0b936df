"""Maps the tensors of a model to those in its safetensors files: names, and conversions.

transformers keeps the experts of a layer in one tensor, but saves each expert as a tensor of its
own, which is the format on the hub. This module applies the conversions of transformers between
these two forms (including renamings) to a few tensors at a time. It applies them to meta tensors
to find out which tensors belong together, and to the real ones when they are read or written.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from functools import cached_property

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

from titan_ulysses.model import hf, prediction

_PART = re.compile(r"^(model\.)?(language_model|text_model)\.((?P<head>(?=lm_head\.))|(model\.)?)")
"""What the names of the text part of a multi-modal model begin with, in files old and new."""


@dataclass
class Read:
    """A group of tensors in files that becomes one or several tensors of the model."""

    model: PreTrainedModel
    """The model on meta; some conversions look at its shapes."""
    target: str
    """The name of the (first) tensor of the model."""
    converter: WeightConverter | None
    """None: the tensor has the same form in the files and in the model."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files, by the pattern that they matched, in the order in which they are merged.
    """

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    @property
    def stacks(self) -> bool:
        """Whether row i of the target depends only on the i-th source of each pattern.

        There must be a single target. If so, a rank needs to read only the sources of its own rows.
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
        """Convert tensors of the files to tensors of the model, which are returned by name.

        `tensors` are given by pattern, in the order of the names in `sources`.
        """
        if self.converter is None:
            return {self.target: tensors[next(iter(self.sources))][0]}
        converter = copy.deepcopy(self.converter)  # the converter stores the tensors that it gets
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
        """Describe `model`, which may be wrapped and sharded and is not changed."""
        kind = {
            "classifier": hf.classifies(model),
            "predicts": prediction.layer_of(model) is not None,
        }
        self.plain = hf.build_on_meta(model.config, model.dtype, **kind)
        self.state = self.plain.state_dict(keep_vars=True)
        """Parameters (tied ones under each of their names) and persistent buffers, without data."""
        self.main: dict[str, str] = {}
        """For each name of a tensor, the one name under which transformers saves it."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            names.setdefault(id(tensor), []).append(name)
        tied = self.plain.all_tied_weights_keys
        for same in names.values():
            main = next((name for name in same if name not in tied), same[0])
            self.main |= dict.fromkeys(same, main)

    # --- from files -------------------------------------------------------------------------------

    def reads(self, stored: set[str]) -> tuple[list[Read], list[str]]:
        """Group the tensors `stored` in files into reads that fill the model.

        Also return the names of stored tensors that the model does not have.
        """
        _, converters = self._loading
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        found: dict[str, Read] = {}
        unknown = []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._target(name)
            read = found.setdefault(target, Read(self.plain, target, by_pattern.get(pattern)))
            filled = read.sources and (pattern is None or read.converter is None)
            if target not in self.state or filled:
                unknown.append(name)
            else:
                read.sources.setdefault(pattern or name, []).append(name)
        return [read for read in found.values() if read.sources], unknown

    @cached_property
    def _loading(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        own = prediction.renamings(self.plain)
        conversions = [*own, *get_model_conversion_mapping(self.plain)]
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        return renamings, [c for c in conversions if isinstance(c, WeightConverter)]

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the (first) tensor of the model that a stored one becomes, or a name that the
        model does not have; and the pattern of its converter.
        """
        renamings, converters = self._loading
        prefix = self.plain.base_model_prefix
        inner = _PART.sub(lambda found: "model." if found["head"] is None else "", name)
        for own in dict.fromkeys((name, inner)):
            target, pattern = rename_source_key(own, renamings, converters, prefix, self.state)
            if target not in self.state and own in self.state:
                target, pattern = own, None  # stored in the model's fused form already
            if target in self.state:
                break
        return target, pattern

    # --- to files ---------------------------------------------------------------------------------

    def writes(self) -> list[list[str]]:
        """Return the main names of the tensors to save, in groups that are converted together."""
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
        """Convert a group of tensors (see `writes`) to what `save_pretrained` would write.

        The result is by the names in the files.
        """
        self.plain._weight_conversions = self._conversions
        return revert_weight_conversion(self.plain, tensors)

    @cached_property
    def _conversions(self) -> list[WeightTransform]:
        """The conversions that saving reverts.

        They are those of a model that was loaded from files of the usual form: conversions of
        legacy files and changes of prefix are left out.
        """
        own = prediction.renamings(self.plain)
        conversions = [*own, *get_model_conversion_mapping(self.plain, add_legacy=False)]
        return [c for c in conversions if not isinstance(c, PrefixChange)]

    def expected(self) -> dict[str, list[str]]:
        """Return, for each saved tensor, the names of the tensors in files that it is made of."""
        return {
            name: list(
                self.in_files({n: torch.empty_like(self.state[n], device="meta") for n in group})
            )
            for group in self.writes()
            for name in group
        }
