"""Loads a sharded model from a folder of safetensors, and exports it to one.

`load` fills a sharded model in place, and each rank reads its own rows. `export` gathers a few
tensors at a time. Neither needs the memory of a whole model on one rank. folder.py finds the files,
and layout.py maps the tensors in them to those of the model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from titan_ulysses.checkpoint.folder import (
    INDEX_FILE,
    Get,
    Stored,
    expect_as_exported,
    find,
    opened,
    some,
    without_data,
    write_manifest,
)
from titan_ulysses.checkpoint.layout import Layout, Read
from titan_ulysses.checkpoint.origin import Origin
from titan_ulysses.distributed.atomic import partial_path, remove, replace_folder
from titan_ulysses.distributed.errors import UserError, failing_together, first_failure, one_line
from titan_ulysses.distributed.tensors import local_box, local_shard
from titan_ulysses.model import hf
from titan_ulysses.model.lora import ADAPTER, Delta, deltas
from titan_ulysses.model.nf4 import NF4Weight, form_kept, full_tensor
from titan_ulysses.model.parameter_names import is_adapter
from titan_ulysses.model.remote_code import names_code_in

_EXPORT_FILE_BYTES = 4 * 2**30
_READ_AT_ONCE = 2**22
"""Numbers that are read at once: quantized ones take several tensors while they are computed."""
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_GENERATION_FILE = "generation_config.json"
_REST = "/"
"""What the keys of tensors of the origin begin with, to tell them from those of the model."""

# --- in -------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """What `load` found in the files."""

    unknown: list[str]
    """Names of tensors in the files that the model does not have."""
    fewer_rows: dict[str, int]
    """For each growing parameter with fewer rows in the files than in the model: that number."""
    absent: list[str]
    """Names of optional parameters that are not in the files."""
    said: str
    """Lines about weights that are quantized in the files, and what the model lacks; may be empty.
    """


@torch.no_grad()
def load(
    model: PreTrainedModel,
    path: str,
    *,
    setting: str = "model.path",
    growing: Collection[str] = (),
    optional: Collection[str] = (),
) -> Loaded:
    """Fill a sharded model from the safetensors at path. Collective if there is a process group.

    Each rank reads only its own rows of each tensor. Tensors that have another form in the files
    are converted first: of experts that are stored one by one, a rank reads those that it holds;
    anything else is read whole, one tensor at a time. Persistent buffers are filled too.

    growing: names of parameters that may have fewer rows in the files; only those rows are filled.
    optional: names of those that may be missing in the files, and then are not filled. Raise
    `UserError` if tensors of the model are missing in the files or have another shape, or if a run
    has exported the files, and they are not what it wrote.
    """
    stored, where = find(path, setting=setting), f'{setting} = "{path}"'
    layout, state = Layout(model), hf.state_of(model)
    growing = {layout.main[name] for name in growing}
    reads, unknown, found = _matched(layout, stored, where, growing, optional)
    for get, read in opened(reads, stored):
        _expect_form(read, state.get(read.target), get, where)
    made = {read.target for read in reads}
    # The files may contain a tied tensor under several names. The others must equal the main one.
    twins = [
        r for r in reads if layout.main[r.target] != r.target and layout.main[r.target] in made
    ]
    for get, read in opened([read for read in reads if read not in twins], stored):
        for part, values in _parts(read, state, get):
            part.copy_(values)
    twin = None
    for get, read in opened(twins, stored):
        if not all(torch.equal(part, values.to(part)) for part, values in _parts(read, state, get)):
            twin = read.target
    if twin := first_failure(twin):
        raise UserError(
            f"{where}: {layout.main[twin]} and {twin} differ in the files, but config.json ties "
            "them to one tensor. Set tie_word_embeddings = false there."
        )
    rows = {name: len(found[name][1]) for name in growing}
    fewer = {name: count for name, count in rows.items() if count < len(state[name])}
    absent = [name for name in optional if name not in found]
    return Loaded(unknown, fewer, absent, Origin.of(path, layout, stored).describe())


def open_folder(
    plain: PreTrainedModel, path: str, *, setting: str
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Open the safetensors at path, converted to the tensors of the model `plain` on meta.

    Return all tensors by name, without data and in the dtype of the files; and a function that
    reads one tensor by name. No more than one `Read` is in memory at a time. Raise `UserError` as
    `load` does.
    """
    stored, layout, where = find(path, setting=setting), Layout(plain), f'{setting} = "{path}"'
    _, _, found = _matched(layout, stored, where)

    def fetch(name: str) -> Tensor:
        for get, read in opened([found[layout.main[name]][0]], stored):
            made = {layout.main[made]: tensor for made, tensor in _whole(read, get).items()}
        return made[layout.main[name]]

    return {name: found[main][1] for name, main in layout.main.items()}, fetch


def _matched(
    layout: Layout,
    stored: Stored,
    where: str,
    growing: Collection[str] = (),
    optional: Collection[str] = (),
) -> tuple[list[Read], list[str], dict[str, tuple[Read, Tensor]]]:
    """Return all reads that fill the model, the names of tensors that it does not have, and by main
    name how each of its tensors is read, with the tensor without data. Collective.

    Raise `UserError` if an export has changed, or if a tensor is missing in the files, has another
    shape, or has whole numbers where the model has others.
    """
    expect_as_exported(stored.files, where)
    reads, unknown = layout.reads(stored.names)
    found: dict[str, tuple[Read, Tensor]] = {}
    for get, read in opened(reads, stored):
        try:
            made = read.convert(
                {p: [without_data(get(n)) for n in names] for p, names in read.sources.items()}
            )
        # A conversion that lacks a part can fail in any way. The part is named below.
        except Exception:
            continue
        for name, tensor in made.items():
            found.setdefault(layout.main[name], (read, tensor))
    wrong = [
        name
        for name, tensor in layout.state.items()
        if layout.main[name] == name
        and not (name in optional and name not in found)
        and not (name in found and _fits(found[name][1], tensor, grows=name in growing))
    ]
    if wrong:
        raise UserError(f"{where}: {_why_incomplete(layout, stored, wrong, found)}")
    return reads, unknown, found


def _expect_form(read: Read, target: Tensor | None, get: Get, where: str) -> None:
    """Raise UserError if a weight is to keep the form of its release, and has another one."""
    form = None if target is None else form_kept(target)
    for name in read.names if form else ():
        found = getattr(get(name), "packed_form", None)
        if found != form or read.converter and not read.stacks:
            raise UserError(
                f"{where}: {name} is stored as {found or get(name).get_dtype()}, which is not the "
                f"{form} that config.json says, and cannot be kept. Set lora.quantize_base to "
                '"nf4" or "none".'
            )


def _fits(stored: Tensor, wanted: Tensor, *, grows: bool) -> bool:
    """Return whether a stored tensor fills a wanted one, or the first rows of one that grows."""
    if stored.is_floating_point() != wanted.is_floating_point() or stored.dtype in _FLOAT8:
        return False  # copying would round the numbers, or take codes for weights
    has, needs = stored.shape, wanted.shape
    return has == needs or (grows and has[1:] == needs[1:] and has[0] < needs[0])


def _why_incomplete(
    layout: Layout, stored: Stored, wrong: list[str], found: dict[str, tuple[Read, Tensor]]
) -> str:
    """Say which tensors are missing, or which one has another shape or kind, and what to do."""
    expected, model = layout.expected(), hf.class_name(layout.plain)
    if missing := [
        part for name in wrong for part in expected.get(name, [name]) if part not in stored.names
    ]:
        total = len({part for names in expected.values() for part in names})
        return (
            f"{len(missing)} of {total} tensors of {model} are not in its safetensors: "
            f"{some(missing)}. A file is missing, or config.json belongs to a different model: "
            "save or download it again."
        )
    name, shape = wrong[0], "that its parts do not make"
    if name in found:
        read, tensor = found[name]
        name = name if read.converter else read.names[0]
        shape = str(tuple(tensor.shape))
        model_dtype = layout.state[wrong[0]].dtype
        if tensor.is_floating_point() != model_dtype.is_floating_point or tensor.dtype in _FLOAT8:
            return (
                f"{name} is stored as {tensor.dtype}, but {model} needs {model_dtype}. It is "
                "damaged, or quantized in a form that config.json does not say: use the original "
                "weights."
            )
    wanted = tuple(layout.state[wrong[0]].shape)
    return (
        f"{name} has shape {shape}, config.json says {wanted}. They belong to different models: "
        "save or download it again."
    )


def _parts(read: Read, state: dict[str, Tensor], get: Get) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's part of each tensor of the read, and the stored values for it."""
    if read.converter is not None and not read.stacks:
        for name, made in _whole(read, get).items():
            yield local_shard(state[name]), made[_slices(state[name])]
        return
    # One target, of which only this rank's rows are read, some at a time.
    target = state[read.target]
    part, (rows, *within) = local_shard(target), _slices(target) or (...,)
    if not target.shape:
        yield part, get(read.names[0])[...]
        return
    if read.converter is None:  # there may be fewer rows in the file
        rows = slice(rows.start, max(rows.start, min(rows.stop, get(read.names[0]).get_shape()[0])))
    some = max(1, _READ_AT_ONCE // max(1, math.prod(target.shape[1:])))
    form = form_kept(target)
    for start in range(rows.start, rows.stop, some):
        chosen = slice(start, min(start + some, rows.stop))
        mine = part[start - rows.start : chosen.stop - rows.start]
        index, columns = (chosen, *within), (slice(None), *within)
        if read.converter is None:
            whole = get(read.names[0])
            values = whole.packed(start, chosen.stop) if form else whole[index]
        else:
            found = {p: [get(n) for n in names[chosen]] for p, names in read.sources.items()}
            # The bytes of rows are stacked and joined as their numbers are.
            sources = {
                p: [one.packed(0, one.get_shape()[0]) if form else one[...] for one in ones]
                for p, ones in found.items()
            }
            [made] = read.convert(sources).values()
            values = made if form else made[columns]
        yield mine, NF4Weight(values, mine.shape, mine.dtype, form) if form else values


def _whole(read: Read, get: Get) -> dict[str, Tensor]:
    return read.convert(
        {pattern: [get(name)[...] for name in names] for pattern, names in read.sources.items()}
    )


def _slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slices of a tensor that this rank's shard covers."""
    sizes, offsets = local_box(tensor)
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


# --- out ------------------------------------------------------------------------------------------


def keep_generation_config(model: PreTrainedModel, path: str) -> None:
    """Set the model's generation config to that at path (a folder or hub name), for `export`.

    A classifier has none. Raise `UserError` if there is one that cannot be used.
    """
    if hf.classifies(model):
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # transformers raises whatever its classes raise
        # Without one, the model keeps what transformers derives from config.json.
        if isinstance(error, OSError) and not (Path(path) / _GENERATION_FILE).exists():
            return
        raise UserError(
            f"{Path(path) / _GENERATION_FILE}: transformers refuses it ({one_line(error)}). Repair "
            "it, or remove it."
        ) from error


@torch.no_grad()
def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    step: int | None = None,
    fetch: Callable[[str], Tensor] | None = None,
    origin: str = "",
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens. Collective.

    It contains safetensors, the config and, if given, the tokenizer. Tensors are gathered one by
    one (or fetched by name with `fetch`, for a model without data) and converted to the form of
    `save_pretrained`. Rank 0 writes a file for about every 4 GiB, so no rank holds the whole model.
    An existing folder is replaced when the new one is complete. Parameters keep their storage
    dtype; merged adapters have that of `Delta`, and quantized weights become numbers. `step` is for
    `exported_step`. What `origin`, the folder or hub name of the first weights, has besides is
    taken over (origin.py). Raise `UserError`, on every rank, if the folder cannot be written.
    """
    aside = partial_path(folder)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    layout, state, added = Layout(model), hf.state_of(model), deltas(model)
    source = Origin.of(origin, layout) if origin else None
    fetch = fetch or (lambda name: _gather(state[name], added.get(name), keep=writes))
    groups = {names[0]: names for names in layout.writes()}
    # Before anything is gathered, because the names of the files have their number in them.
    sizes = {x: sum(_bytes_of(state, added, y) for y in group) for x, group in groups.items()}
    rest, sizes_of_rest = _rest_of(source, state, added)
    copies = source.copies if source else {}
    split = _split(sizes | sizes_of_rest)
    index: dict[str, str] = {}
    try:
        with _raise_on_all_ranks(folder):
            if writes:
                remove(aside)
                aside.mkdir(parents=True)
        for file, members in split.filename_to_tensors.items():
            tensors = {name: fetch(copies[name]) for name in filter(copies.get, members)}
            for first in filter(groups.get, members):
                group = {name: fetch(name) for name in groups[first]}
                if writes:
                    tensors |= _as_stored(layout.in_files(group), source)
                del group
            with _raise_on_all_ranks(folder):
                if writes:
                    tensors |= {n: source.read(n) for x in members if (n := rest.get(x)) and source}
                    save_file(tensors, aside / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
            del tensors  # before the next file's are gathered
        with _raise_on_all_ranks(folder):
            if writes:
                if split.is_sharded:
                    about = {"metadata": split.metadata, "weight_map": index}
                    (aside / INDEX_FILE).write_text(json.dumps(about, indent=2))
                _write_configs(model, tokenizer, aside, source)
                write_manifest(aside, step)
                replace_folder(aside, folder)
    finally:
        if writes:
            remove(aside)


def _split(sizes: dict[str, int]) -> StateDictSplit:
    pattern = "model{suffix}.safetensors"
    return split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=_EXPORT_FILE_BYTES
    )


def _rest_of(
    source: Origin | None, state: dict[str, Tensor], added: dict[str, Delta]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return the names of the tensors that an export takes over, by keys that are no names of the
    model; and the sizes of these and of copies of the model's tensors.
    """
    if source is None:
        return {}, {}
    names = {f"{_REST}{name}": name for name in source.rest}
    sizes = {key: source.size_of(name) for key, name in names.items()}
    copies = {name: _bytes_of(state, added, main) for name, main in source.copies.items()}
    return names, sizes | copies


def _bytes_of(state: dict[str, Tensor], added: dict[str, Delta], name: str) -> int:
    return state[name].numel() * added.get(name, state[name]).dtype.itemsize


def _as_stored(made: dict[str, Tensor], source: Origin | None) -> dict[str, Tensor]:
    """Return tensors under the names that they have in the folder they came from."""
    named = source.name_of if source else str
    return {named(name): tensor.contiguous() for name, tensor in made.items()}


def exported_bytes(model: PreTrainedModel, origin: str = "") -> int:
    """Return the bytes of the tensors in an export of model, with those that it takes over."""
    added = deltas(model)
    source = Origin.of(origin, Layout(model)) if origin else None
    state = hf.state_of(model)
    rest = sum(_rest_of(source, state, added)[1].values())
    once = {id(tensor): _bytes_of(state, added, name) for name, tensor in state.items()}
    return sum(once.values()) + rest


def _gather(parameter: Tensor, delta: Delta | None = None, *, keep: bool) -> Tensor | None:
    """Return the whole parameter in host memory, with its adapter merged, if it has one.

    None on ranks without `keep`. Collective.
    """
    whole = full_tensor(parameter)
    whole = whole.detach().cpu().contiguous() if keep else None
    if delta is None:
        return whole
    parts = [_gather(p, keep=keep) for p in delta.parts]
    return delta.added_to(whole, *parts) if keep else None


@torch.no_grad()
def save_adapters(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Write the adapters so that `peft.PeftModel.from_pretrained(model, folder)` opens them.

    Indexers that are trained beside them are in it too, whole, as peft's `modules_to_save`. base:
    folder or hub name of the base model, which is stored with the adapters; "" if there is none.
    Collective. Raise `UserError` as `export` does.
    """
    aside = partial_path(folder)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    named = dict(hf.named_parameters(model))
    indexers = [x for x, p in named.items() if ".indexer." in x and p.requires_grad]
    adapters = {x: p for x, p in named.items() if is_adapter(x) or x in indexers}
    # In peft's files, names lack the adapter's name and have a prefix for peft's two wrappers.
    # DoRA's have no ".weight" there either.
    short = {x: x.replace(f"vector.{ADAPTER}.weight", "vector") for x in adapters}
    names = {x: f"base_model.model.{y.replace(f'.{ADAPTER}.', '.')}" for x, y in short.items()}
    tensors = {names[name]: _gather(p, keep=writes) for name, p in adapters.items()}
    with _raise_on_all_ranks(folder):
        if writes:
            try:
                remove(aside)
                aside.mkdir(parents=True)
                save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
                settings = copy.copy(model.peft_config[ADAPTER])
                settings.base_model_name_or_path = base or None
                settings.modules_to_save = ["indexer"] if indexers else None
                settings.save_pretrained(aside)
                write_manifest(aside, None)
                replace_folder(aside, folder)
            finally:
                remove(aside)


def _raise_on_all_ranks(folder: Path) -> AbstractContextManager[None]:
    """Raise `UserError` on all ranks if one of them cannot write. Collective at the end."""

    def failed(reason: str) -> UserError:
        return UserError(
            f"{folder}: the export failed ({reason}). Free space or choose another place, and run "
            "the same command again."
        )

    return failing_together(OSError, SafetensorError, error=failed)


def _write_configs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    source: Origin | None,
) -> None:
    config = source and source.whole
    if source:
        source.copy_files(folder, tokenizer)
    if config is None:
        config = copy.deepcopy(model.config)
        config.architectures = [hf.class_name(model)]
    code = {file.name for file in folder.glob("*.py")}
    if hasattr(config, "auto_map") and not names_code_in(config.auto_map, code):
        del config.auto_map
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:  # a classifier has none
        # Not by `save_pretrained`, which validates: it would refuse the generation config of many
        # models on the hub, at the end of a run.
        model.generation_config.to_json_file(folder / _GENERATION_FILE)
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers has no type of its own for errors of the disk
            raise OSError(one_line(error)) from error
