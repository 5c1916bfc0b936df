"""Log-probabilities of the reference of DPO, IPO or KTO, computed once before the first step.

The reference gives each pair of completions two numbers that never change. They are kept with the
tokenized pairs (`Corpus.reference`), so that no step computes them again, and the reference itself
is given up. They are also written to reference.safetensors in the run's folder, where a run that
resumes finds them: it does not read the reference at all.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from titan_ulysses.data.loader import Loader
from titan_ulysses.data.packing import PaddedSequences, SampleStream
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.observability.progress import Progress
from titan_ulysses.train.evaluation import held_out_batches
from titan_ulysses.train.summary import print_wrapped

if TYPE_CHECKING:
    from titan_ulysses.config.schema import Config
    from titan_ulysses.train.loss import PreferenceLoss

FILE = "reference.safetensors"
_SETTINGS = ("loss.reference", "model.rope_scaling", "training.param_dtype")
"""The settings that the log-probabilities depend on, besides the weights of the reference."""


class References:
    """The reference's log-probabilities of all pairs of a run, once `load` or `compute` has run.

    training and held_out (by name) are the streams of the pairs. The log-probabilities are added to
    their corpora.
    """

    def __init__(
        self, config: Config, training: SampleStream | None, held_out: dict[str, SampleStream]
    ):
        self.config = config
        self.streams: dict[str, PaddedSequences] = {}
        streams = {"training": training, **{f"validation {k}": s for k, s in held_out.items()}}
        for name, stream in streams.items():
            for source, part in stream.parts().items() if stream is not None else ():
                assert isinstance(part, PaddedSequences), part  # others cannot keep pairs whole
                self.streams[f"{name} {source}"] = part
        self.are_there = False

    def load(self, folder: Path) -> int | None:
        """Take those that an earlier start of the run has written. Collective.

        Return the checksum of the reference's weights; None if there are none of these pairs and
        settings in the folder of rank 0, or the file is damaged.
        """
        found = [self._read(folder / FILE) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return None
        fingerprint, tables = found[0]
        for name, stream in self.streams.items():
            _attach(stream, tables[name])
        self.are_there = True
        return fingerprint

    def compute(
        self,
        loss: PreferenceLoss,
        loader_of: Callable[[SampleStream], Loader],
        mesh: Mesh,
        console: Console,
    ) -> None:
        """Compute them, and give up the reference. Collective."""
        pairs = sum(len(stream.corpus) for stream in self.streams.values())
        print_wrapped(console, f"computing the reference's log-probabilities of {pairs:,} pair(s)")
        loaders = [loader_of(stream) for stream in self.streams.values()]
        batches = sum(len(held_out_batches(loader, 0)) for loader in loaders)
        with Progress(console, total=batches) as progress:
            progress.begin("log-probabilities of the reference")
            for stream, loader in zip(self.streams.values(), loaders, strict=True):
                _attach(stream, _table(loss, loader, stream, mesh, done=progress.finish_step))
        loss.give_up_reference()
        gc.collect()  # a model has references to itself
        self.are_there = True

    def as_bytes(self, fingerprint: int) -> bytes:
        """Return the file for `load`. fingerprint: the checksum of the reference's weights."""
        tables = {
            name: torch.from_numpy(stream.corpus.reference)
            for name, stream in self.streams.items()
            if stream.corpus.reference is not None
        }
        about = {"of": self._identity(), "fingerprint": str(fingerprint), "hash": _hash(tables)}
        return save(tables, metadata=about)

    def _read(self, file: Path) -> tuple[int, dict[str, Tensor]] | None:
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                tables = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if about["of"] != self._identity() or about["hash"] != _hash(tables):
                return None
            return int(about["fingerprint"]), tables
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _identity(self) -> str:
        """Return what the log-probabilities are of: pairs, their order, and settings."""
        values = self.config.model_dump(mode="json")
        settings: dict[str, Any] = {
            key: values[key.split(".")[0]][key.split(".")[1]] for key in _SETTINGS
        }
        pairs = {}
        for name, stream in self.streams.items():
            corpus = stream.corpus
            ids = corpus.document_ids
            ids = np.arange(len(corpus)) if ids is None else ids
            order = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(ids).data)
            pairs[name] = [corpus.content, order]
        return json.dumps([settings, pairs], sort_keys=True)


def _table(
    loss: PreferenceLoss,
    loader: Loader,
    stream: PaddedSequences,
    mesh: Mesh,
    *,
    done: Callable[[], None],
) -> Tensor:
    """Return the log-probabilities [documents, 2] of a corpus, in fp64 on the host. Collective."""
    device = mesh.device
    table = torch.zeros(len(stream.corpus), 2, dtype=torch.float64, device=device)
    first = loader.batch_rank * loader.batch_size
    # One epoch has each pair once.
    for indices in held_out_batches(loader, 0):
        of_rows = loss.reference_of(loader.read(indices).to(device)).view(-1, 2)
        rows = indices[first : first + loader.batch_size]  # without those that fill up a batch
        if rows:
            pairs = torch.from_numpy(np.concatenate([stream.pairs(row) for row in rows]))
            table[pairs.to(device)] = of_rows[: len(pairs)]
        done()
    dist.all_reduce(table, group=mesh.batch.get_group())
    return table.cpu()


def _attach(stream: PaddedSequences, table: Tensor) -> None:
    stream.corpus = replace(stream.corpus, reference=table.numpy())


def _hash(tables: dict[str, Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for name in sorted(tables):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(tables[name].numpy()).data)
    return hasher.hexdigest()
