"""The environment of versus.py's contenders that use DeepSpeed: .venv-deepspeed."""

from __future__ import annotations

import os
import subprocess
import sys

from common import ROOT

PINS = ("torch==2.13.0", "transformers==5.24.0", "deepspeed==0.19.8", "accelerate==1.15.0")
"""Versions that work together, in the order of installation: DeepSpeed's installation needs torch.
"""
FOLDER = ROOT / ".venv-deepspeed"


def environment() -> tuple[str, dict[str, str]]:
    """Return the interpreter of DeepSpeed's environment and its environment variables.

    The first call makes the environment, which takes a few minutes. pip's own settings apply.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "installed"
    variables = {
        "DS_ACCELERATOR": "cpu",
        # Compile only what a run needs: DeepSpeed's all-reduce, where there is a compiler.
        "DS_BUILD_OPS": "0",
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),
        # To find ninja.
        "PATH": f"{FOLDER / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    installed = stamp.read_text().split() if stamp.is_file() else []
    if installed != list(PINS):
        # An environment that has the first of them gets only the others.
        missing = PINS[len(installed) :] if PINS[: len(installed)] == tuple(installed) else PINS
        print(f"Installing {', '.join(missing)} into {FOLDER.name} (once; a few minutes) ...")
        if missing == PINS:
            _call([sys.executable, "-m", "venv", "--clear", str(FOLDER)], variables)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        for pin in missing:
            _call([*pip, pin], variables)
        _call(
            [str(python), "-c", "import deepspeed.runtime.sequence_parallel.ulysses_sp"], variables
        )
        stamp.write_text("\n".join(PINS))
    return str(python), variables


def _call(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise SystemExit(
            f"error: the environment of DeepSpeed could not be made: `{' '.join(command)}` ended "
            f"with {done.returncode}:\n{last}\nWithout it: --contenders ours library fsdp2"
        )
