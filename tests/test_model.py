"""Models from transformers: initialised, loaded and exported sharded, and the same bits as one
process would have.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helpers.meshes import mesh_of
from helpers.ranks import run_on_ranks
from titan_ulysses.checkpoint import folder as folder_of_files
from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.families import check_family
from titan_ulysses.setup.parallelize import parallelize

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"model_type": "llama", **SMALL},
    "tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    # Two rows in q_norm and k_norm, and an odd number of them in the embedding: some of four ranks
    # hold nothing.
    "narrow": {"model_type": "qwen3", **SMALL, "head_dim": 2, "vocab_size": 61},
    "mistral": {"model_type": "mistral", **SMALL},
    "olmo2": {"model_type": "olmo2", **SMALL, "tie_word_embeddings": True},
    # Its embedding is tied, and holds a buffer as well: the factor that hidden states begin with.
    "gemma": {"model_type": "gemma", **SMALL, "head_dim": 8},
    # Eight tensors of experts a layer in the files, two in the model.
    "experts": {
        "model_type": "qwen3_moe",
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
MESHES = {2: [(1, 1, 2)], 4: [(1, 2, 2), (2, 2, 1)]}
MESH_CASES = [
    pytest.param(world, mesh, id=f"{mesh}", marks=[] if mesh == (1, 2, 2) else [pytest.mark.slow])
    for world, meshes in MESHES.items()
    for mesh in meshes
]


def names_on(degrees: tuple[int, int, int]) -> list[str]:
    """Of MODELS: all on the meshes that are slow; test_interchange.py has every family."""
    return [name for name in MODELS if degrees != (1, 2, 2) or name not in ("mistral", "olmo2")]


def sharded_model(table: dict[str, Any], degrees: tuple[int, int, int]) -> PreTrainedModel:
    """Allocated on this rank, and full of NaN, so that nothing passes that was not written."""
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)
    parallelize(model, mesh_of(*degrees), param_dtype=torch.float32)
    hf.allocate(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def plain_model(table: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(hf.load_model_config("", table), dtype=torch.float32)
    hf.initialize(model, seed)
    return model.eval()


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    whole = {
        n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in hf.named_parameters(model)
    }
    return {name: parameter.detach() for name, parameter in whole.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """pytest's monkeypatch, for a rank."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# --- build, allocate, initialise ------------------------------------------------------------------


def initialise(
    degrees: tuple[int, int, int], seed: int
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    found = {}
    for name in names_on(degrees):
        # The state of a rank's generator is no part of the result.
        torch.manual_seed(dist.get_rank())
        model = sharded_model(MODELS[name], degrees)
        hf.initialize(model, seed)
        found[name] = (parameters_of(model), dict(model.named_buffers()))
        assert model.config.tie_word_embeddings == (
            model.lm_head.weight is model.get_input_embeddings().weight
        )
    return found


@pytest.mark.parametrize(("world", "degrees"), MESH_CASES)
def test_random_weights_and_buffers_do_not_depend_on_the_mesh(
    world: int, degrees: tuple[int, int, int]
) -> None:
    for found in run_on_ranks(world, initialise, degrees, 0):
        for name, (parameters, buffers) in found.items():
            plain = plain_model(MODELS[name])
            assert_same(parameters, parameters_of(plain))
            assert_same(buffers, dict(plain.named_buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_buffers_are_those_that_transformers_computes(name: str) -> None:
    config = hf.load_model_config("", MODELS[name])
    model = hf.build_on_meta(config, torch.float32)
    hf.allocate(model, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_random_weights_follow_the_config_and_the_seed() -> None:
    model, again, other = (plain_model(MODELS["untied"], seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    hf.initialize(again, 0)
    assert torch.equal(torch.get_rng_state(), state), "initialize draws from the caller's generator"
    assert_same(parameters_of(again), parameters_of(model))
    matrices = []
    for (name, parameter), (_, different) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        assert not torch.equal(parameter, different), name
        n, std = parameter.numel(), model.config.initializer_range
        assert abs(parameter.std() / std - 1) < 5 / (2 * n) ** 0.5, name
        assert abs(parameter.mean() / std) < 5 / n**0.5, name
        matrices.append(parameter.detach().flatten()[:512])
    overlap = torch.corrcoef(torch.stack(matrices)).fill_diagonal_(0).abs().max()
    assert overlap < 0.25, "two tensors share their random numbers"


def test_build_on_meta_allocates_nothing_and_leaves_the_config_alone() -> None:
    config = hf.load_model_config("", MODELS["tied"])
    before = copy.deepcopy(config.to_dict())
    model = hf.build_on_meta(config, torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert config.to_dict() == before
    assert model.config is not config


# --- weights.load ---------------------------------------------------------------------------------


class CountingSlice:
    """A safetensors slice that notes how many elements are read through it."""

    def __init__(self, stored: Any, reads: list[int]):
        self.get_shape, self._stored, self._reads = stored.get_shape, stored, reads

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._stored[index]
        self._reads.append(tensor.numel())
        return tensor


def counting_open(reads: list[int]) -> Any:
    """`safe_open` whose only ways to a tensor are counted ones."""

    class Counting:
        def __init__(self, file: Path, framework: str):
            self._opened = safe_open(file, framework=framework)

        def __enter__(self) -> Counting:
            self._file = self._opened.__enter__()
            self.keys = self._file.keys
            return self

        def __exit__(self, *error: Any) -> None:
            self._opened.__exit__(*error)

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self._file.get_slice(name), reads)

    return Counting


def load(
    degrees: tuple[int, int, int], folders: dict[str, tuple[str, str]]
) -> dict[str, tuple[dict, int]]:
    found = {}
    for case, (name, folder) in folders.items():
        reads: list[int] = []
        model = sharded_model(MODELS[name], degrees)
        with replaced(folder_of_files, "safe_open", counting_open(reads)):
            weights.load(model, folder)
        found[case] = (parameters_of(model), sum(reads))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """(name in MODELS, folder of safetensors) by case."""
    folder = tmp_path_factory.mktemp("saved")
    cases = {}
    for name in MODELS:
        plain_model(MODELS[name], seed=5).save_pretrained(folder / name)
        cases[name] = (name, str(folder / name))
    for name in ("untied", "tied"):
        plain_model(MODELS[name], seed=5).save_pretrained(
            folder / f"{name}-files", max_shard_size="8KB"
        )
        assert len(list((folder / f"{name}-files").glob("*.safetensors"))) > 3
        cases[f"{name}-files"] = (name, str(folder / f"{name}-files"))
    plain_model(MODELS["untied"], seed=5).bfloat16().save_pretrained(folder / "bf16")
    return {**cases, "bf16": ("untied", str(folder / "bf16"))}


@pytest.mark.parametrize(("world", "degrees"), MESH_CASES)
def test_each_rank_loads_its_own_rows(
    world: int, degrees: tuple[int, int, int], saved: dict
) -> None:
    cases = {case: one for case, one in saved.items() if one[0] in names_on(degrees)}
    results = run_on_ranks(world, load, degrees, cases)
    for case, (_, folder) in cases.items():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for result in results:
            assert_same(result[case][0], parameters_of(plain))
        replicas = degrees[0]
        assert sum(result[case][1] for result in results) == replicas * sum(
            p.numel() for p in plain.parameters()
        ), case
        largest = max(result[case][1] for result in results)
        assert largest <= 1.25 * replicas * sum(p.numel() for p in plain.parameters()) / world, case


def test_a_base_model_without_a_head_loads_into_a_tied_one(tmp_path: Path) -> None:
    plain = plain_model(MODELS["tied"], seed=5)
    plain.model.save_pretrained(tmp_path)  # names without the prefix "model."
    model = plain_model(MODELS["tied"])
    weights.load(model, str(tmp_path))
    assert_same(parameters_of(model), parameters_of(plain))


def damage(how: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "missing":
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        save_file(tensors, file)
    elif how == "shape":
        tensors["model.norm.weight"] = torch.ones(31)
        save_file(tensors, file)
    elif how == "whole numbers":
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
        save_file(tensors, file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "header":
        file.write_bytes(b"not a header")
    elif how == "none":
        file.rename(folder / "pytorch_model.bin")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"2 of 21 tensors of LlamaForCausalLM are not in .*: model.norm.weight, "
            r"lm_head.weight\. A file",
        ),
        ("shape", r"model.norm.weight has shape \(31,\), config.json says \(32,\)"),
        (
            "whole numbers",
            r"model.norm.weight is stored as torch.int8, but LlamaForCausalLM needs torch.fl",
        ),
        ("truncated", r"model.safetensors is damaged \(.+\). Copy or download it again"),
        ("header", r"model.safetensors is damaged \(.+\). Copy or download it again"),
        ("none", r"the folder holds no \*.safetensors. Save the model with"),
    ],
)
def test_weights_that_cannot_be_loaded(how: str, message: str, tmp_path: Path) -> None:
    plain_model(MODELS["untied"]).save_pretrained(tmp_path)
    damage(how, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        weights.load(plain_model(MODELS["untied"]), str(tmp_path))
    assert str(caught.value).startswith(f'model.path = "{tmp_path}": ')
    assert "\n" not in str(caught.value)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, why in {
        "empty": "no transformers model there (",
        "nothing": "no such folder",
    }.items():
        path = tmp_path / name
        with pytest.raises(
            UserError, match=r"Give a folder with config.json and \*.safetensors, or"
        ) as caught:
            hf.load_model_config(str(path), None)
        assert str(caught.value).startswith(f'model.path = "{path}": {why}')
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError,
        match=f'model.path = "{tmp_path / "nothing"}": not a folder, and not .*Give a folder',
    ):
        weights.find(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "table", [{"model_type": "lama"}, {}, {**MODELS["untied"], "hidden_size": "wide"}]
)
def test_config_tables_that_are_refused(table: dict[str, Any]) -> None:
    before = copy.deepcopy(table)
    with pytest.raises(UserError, match=r"^model.config: transformers refuses it: .+") as caught:
        hf.load_model_config("", table)
    assert "\n" not in str(caught.value)
    assert table == before


def test_a_model_that_is_no_causal_lm_is_refused() -> None:
    with pytest.raises(UserError, match='model: "clip" has no causal language model'):
        hf.build_on_meta(hf.load_model_config("", {"model_type": "clip"}), torch.float32)


# --- export ---------------------------------------------------------------------------------------


def held_bytes(gathered: list[tuple[StorageWeakRef, int]], *, at_most: int) -> int:
    """Return the bytes of gathered that are still in memory.

    A gloo thread may keep a result for a moment after its collective has returned: if there are
    more than at_most, they have a second to go.
    """
    deadline = time.monotonic() + 1
    while True:
        held = sum(size for storage, size in gathered if not storage.expired())
        if held <= at_most or time.monotonic() > deadline:
            return held
        time.sleep(0.01)


def export(
    degrees: tuple[int, int, int], cases: dict[str, tuple[str, str]], folder: Path, file_bytes: int
) -> list:
    """Export each case into folder; returns what happened, in order: ("gather", bytes, gathered
    bytes that were still in memory before) and ("write", file, bytes).
    """
    happened = []
    for case, (name, source) in cases.items():
        model = sharded_model(MODELS[name], degrees)
        weights.load(model, source)
        events: list[tuple[str, Any]] = []
        gather, save, gathered = DTensor.full_tensor, weights.save_file, []

        def full_tensor(tensor: DTensor, gather=gather, gathered=gathered, events=events) -> Tensor:
            allowed = file_bytes - tensor.nbytes if dist.get_rank() == 0 else 0
            held = held_bytes(gathered, at_most=allowed)
            whole = gather(tensor)
            gathered.append((StorageWeakRef(whole.untyped_storage()), whole.nbytes))
            events.append(("gather", whole.nbytes, held))
            return whole

        def save_file(
            tensors: dict[str, Tensor], file: Path, save=save, events=events, **kwargs: Any
        ) -> None:
            events.append(("write", file.name, sum(t.nbytes for t in tensors.values())))
            save(tensors, file, **kwargs)

        with (
            replaced(weights, "_EXPORT_FILE_BYTES", file_bytes),
            replaced(DTensor, "full_tensor", full_tensor),
            replaced(weights, "save_file", save_file),
        ):
            weights.export(model, load_tokenizer("bytes"), folder / case, step=1)
        happened.append(events)
    return happened


@pytest.mark.parametrize(("world", "degrees"), MESH_CASES)
def test_export_opens_in_transformers(
    world: int, degrees: tuple[int, int, int], saved: dict, tmp_path: Path
) -> None:
    cases = {case: saved[case] for case in names_on(degrees)}
    run_on_ranks(world, export, degrees, cases, tmp_path, 2**20)
    for case, (_, source) in cases.items():
        plain = AutoModelForCausalLM.from_pretrained(source)
        opened, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / case, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same(parameters_of(opened), parameters_of(plain))
        assert torch.equal(logits_of(opened), logits_of(plain))
        stored = (
            load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / case, source)
        )
        assert len({frozenset(tensors) for tensors in stored}) == 1
        tied = opened.lm_head.weight is opened.get_input_embeddings().weight
        assert tied == plain.config.tie_word_embeddings
        written = json.loads((tmp_path / case / "config.json").read_text())
        assert written["architectures"] == [type(plain).__name__]
        assert written["dtype"] == "float32"
        assert not (tmp_path / case / "model.safetensors.index.json").exists()
    text = "long sequences, é"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "untied")
    assert tokenizer(text)["input_ids"] == list(text.encode())
    # Nothing that was written aside.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cases)


def test_export_never_holds_the_whole_model(saved: dict, tmp_path: Path) -> None:
    limit = 16 * 2**10
    results = run_on_ranks(2, export, (1, 1, 2), {"tied": saved["tied"]}, tmp_path, limit)
    [events], [others] = results
    assert all(event[0] == "gather" and event[2] == 0 for event in others), (
        "rank 1 keeps what it gathers"
    )
    assert sum(event[1] for event in others) > limit, "nothing was measured"
    assert len(others) == len(list(hf.named_parameters(plain_model(MODELS["tied"]))))
    assert all(event[1] + event[2] <= limit for event in events if event[0] == "gather"), (
        "rank 0 keeps what it wrote"
    )
    assert any(event[2] > 0 for event in events if event[0] == "gather"), "nothing was measured"
    assert sum(event[0] == "write" for event in events) > 2
    index = json.loads((tmp_path / "tied" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        event[1] for event in events if event[0] == "write"
    ]
    plain = AutoModelForCausalLM.from_pretrained(saved["tied"][1])
    assert_same(
        parameters_of(AutoModelForCausalLM.from_pretrained(tmp_path / "tied")), parameters_of(plain)
    )


def fail_to_export(folder: Path, where: str) -> tuple[list[str], dict[str, Tensor]]:
    """Export seed 1; then export seed 2, and fail; returns what is there after each."""
    model = sharded_model(MODELS["untied"], (1, 1, 2))
    hf.initialize(model, seed=1)
    weights.export(model, load_tokenizer("bytes"), folder, step=1)
    first = parameters_of(model)
    hf.initialize(model, seed=2)
    tokenizer, calls = load_tokenizer("bytes"), []
    place, name = {
        "weights": (weights, "save_file"),
        "index": (Path, "write_text"),
        "tokenizer": (tokenizer, "save_pretrained"),
    }[where]
    save = weights.save_file

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if where == "tokenizer":  # tokenizers has no type of its own
            raise Exception("No space left on device (os error 28)")
        if where == "index":
            raise OSError(28, "No space left on device")
        if len(calls) == 2:  # safetensors has an exception of its own for a full disk
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        save(*args, **kwargs)

    with replaced(weights, "_EXPORT_FILE_BYTES", 8 * 2**10), replaced(place, name, fail):
        try:
            weights.export(model, tokenizer, folder, step=1)
        except UserError as error:
            return str(error), first
    raise AssertionError("the export did not fail")


@pytest.mark.parametrize("where", ["weights", "index", "tokenizer"])
def test_an_export_that_fails_leaves_the_old_one_and_no_rank_waiting(
    where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    (first_message, expected), (second_message, _) = run_on_ranks(
        2, fail_to_export, folder, where, timeout=30
    )
    assert first_message == second_message
    assert str(folder) in first_message and "No space left on device" in first_message
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert_same(parameters_of(AutoModelForCausalLM.from_pretrained(folder)), expected)


def export_twice(folder: Path) -> None:
    model = sharded_model(MODELS["untied"], (1, 1, 2))
    for seed, file_bytes in ((1, 8 * 2**10), (2, 2**30)):
        hf.initialize(model, seed)
        with replaced(weights, "_EXPORT_FILE_BYTES", file_bytes):
            weights.export(model, load_tokenizer("bytes"), folder, step=1)


def test_a_new_export_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / "left-over.safetensors").touch()
    run_on_ranks(2, export_twice, tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").glob("*.safetensors*")] == [
        "model.safetensors"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_same(parameters_of(opened), parameters_of(plain_model(MODELS["untied"], seed=2)))


# --- families -------------------------------------------------------------------------------------


ROPE = {"rope_theta": 10000.0, "factor": 2.0}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llama4_text", "output_router_logits": True},
        "router losses (output_router_logits)",
    ),
]
ACCEPTED: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "rope_parameters": {**ROPE, "rope_type": "linear"}},
    {"model_type": "llama", "rope_parameters": {**ROPE, "rope_type": "dynamic"}},
    {"model_type": "qwen3"},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
    {"model_type": "olmo2"},
    {"model_type": "mistral", "sliding_window": 16},
    {"model_type": "gemma2"},
    {"model_type": "gpt_oss", "sliding_window": 128},
    {"model_type": "granite", "logits_scaling": 8.0},
]


@pytest.mark.parametrize(
    ("table", "needs"), REFUSED, ids=[f"{t['model_type']}-{needs}" for t, needs in REFUSED]
)
def test_families_that_would_train_wrongly_are_refused(table: dict[str, Any], needs: str) -> None:
    with pytest.raises(UserError) as caught:
        check_family(hf.load_model_config("", {**SMALL, **table}))
    assert str(caught.value).startswith(f'model: "{table["model_type"]}" needs ')
    assert needs in str(caught.value)


@pytest.mark.parametrize(
    "table", ACCEPTED, ids=lambda table: "-".join(str(value) for value in table.values())
)
def test_families_that_train_are_accepted(table: dict[str, Any]) -> None:
    check_family(hf.load_model_config("", {**SMALL, **table}))
