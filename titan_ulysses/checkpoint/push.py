"""Uploads the exported model, or its adapter, to the Hugging Face hub (checkpoint.push_to_hub)."""

from __future__ import annotations

import os
from pathlib import Path

from titan_ulysses.config.load import dump_toml
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import one_line


def push(config: Config, run: Path, *, results: dict[str, str]) -> str:
    """Upload adapter/, where the run has one, or export/, with a model card. Return what to say.

    A new repository is private. Nothing that fails here ends the run: the files are on the disk.
    """
    from huggingface_hub import HfApi, get_token

    repository, folder = config.checkpoint.push_to_hub, run / "export"
    folder = run / "adapter" if config.lora.rank else folder
    token = get_token()
    if not token:
        return (
            f'WARNING: checkpoint.push_to_hub = "{repository}": there is no token for the hub (set '
            f"HF_TOKEN, or run `hf auth login`). Nothing was uploaded; {folder} has the files."
        )
    try:
        (folder / "README.md").write_text(card(config, results), encoding="utf-8")
        hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        hub.create_repo(repository, private=True, exist_ok=True)
        made = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"{config.job.name}: {folder.name}",
        )
        return f"Uploaded {folder} to the hub: {made.commit_url}"
    except Exception as error:  # of the network, the hub, or its library
        return (
            f'WARNING: checkpoint.push_to_hub = "{repository}": {type(error).__name__}: '
            f"{one_line(error)}. {folder} has the files."
        )


def card(config: Config, results: dict[str, str]) -> str:
    """Return the README.md of the repository: what it is, its results, and how it was trained."""
    is_adapter, base = bool(config.lora.rank), config.model.path
    about = ["---", f"library_name: {'peft' if is_adapter else 'transformers'}"]
    if base and not Path(base).exists():  # a name on the hub
        about.append(f"base_model: {base}")
    about += ["tags:", "- titan_ulysses", f"- {config.loss.name}", "---"]
    if is_adapter:
        kind = f"A LoRA adapter of {base or 'a model'}"
    elif config.loss.name == "reward":
        kind = "A reward model"
    else:
        has_images = config.model.vision != "off"
        kind = "A model of images and text" if has_images else "A causal language model"
    rows = [f"| {what} | {value} |" for what, value in results.items()]
    lines = [
        *about,
        "",
        f"# {config.job.name}",
        "",
        f"{kind}.",
        f"Trained with sequences of {config.training.seq_len:,} tokens.",
        "",
        *(["## Results", "", "| | |", "|---|---|", *rows, ""] if rows else []),
        "## Settings",
        "",
        "```toml",
        dump_toml(config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
