"""Names on the Hugging Face hub where there is no way to the hub."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from titan_ulysses.config.paths import is_no_hub_name
from titan_ulysses.config.schema import Config
from titan_ulysses.launch.run_store import within

_SECONDS = 3.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")


def look_for_hub(config: Config) -> None:
    """Let the hub's library use its cache alone, if a config names the hub and it is out of reach.

    Otherwise it asks for each file again and again, for minutes. To be called before it is
    imported. Without a name on the hub, nothing is asked.
    """
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in _PROXIES):
        return
    names = [name for name in _names(config) if name and not Path(name).exists()]
    names = [name for name in names if not is_no_hub_name(name) and "://" not in name]
    if not names:
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)

    def answers() -> bool:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
        return True

    if not within(_SECONDS, answers):
        os.environ["HF_HUB_OFFLINE"] = "1"
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{address.hostname} does not answer: {', '.join(names)} is looked for in the "
                "local cache alone.",
                file=sys.stderr,
                flush=True,
            )


def _names(config: Config) -> list[str]:
    """Return what may be a name on the hub, of a model, a tokenizer or a data set."""
    tokenizer = config.model.tokenizer
    sources = [config.data, *config.data.mixture, *config.validation.sets]
    return [
        config.model.path,
        "" if tokenizer == "bytes" else tokenizer,
        config.checkpoint.initial_load_path,
        *(source.path for source in sources if source.source == "hf"),
    ]
