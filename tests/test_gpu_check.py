"""scripts/gpu_check.py and gpu_check_8.py: rehearsals, and that no check stops another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch  # noqa: F401  # once, before the checks are forked

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_check  # noqa: E402
import gpu_check_8  # noqa: E402
import gpu_check_streaming  # noqa: E402

from helpers.forked import start  # noqa: E402


def raises(scale: gpu_check.Scale) -> gpu_check.Figures:
    raise ValueError("it is wrong\nand more")


def cannot(scale: gpu_check.Scale) -> gpu_check.Figures:
    raise gpu_check.Skip("needs another machine")


def lacks(scale: gpu_check.Scale) -> gpu_check.Figures:
    raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")


def dies(scale: gpu_check.Scale) -> gpu_check.Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(scale: gpu_check.Scale) -> gpu_check.Figures:
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
    raise AssertionError


def works(scale: gpu_check.Scale) -> gpu_check.Figures:
    return {"tokens": scale.tokens}


def test_no_check_stops_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check.__name__: (check, 300.0) for check in (raises, cannot, lacks, dies, works)}
    checks = {"hangs": (hangs, 0.5), **checks}
    found = gpu_check.run_checks(checks, gpu_check.TINY, seconds=3000)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["TOO", "FAILED", "skipped", "skipped", "FAILED", "ok"]
    assert found["hangs"]["why"] == "not finished after 0 s"
    assert found["raises"]["why"] == "ValueError: it is wrong"
    assert "and more" in found["raises"]["traceback"]
    assert found["cannot"]["why"] == "needs another machine"
    assert found["lacks"]["why"] == "needs pydantic, which is not installed"
    assert found["dies"]["why"] == f"the process died with exit code {-signal.SIGKILL}"
    assert found["works"]["figures"] == {"tokens": gpu_check.TINY.tokens}
    late = gpu_check.run_checks({"works": (works, 20.0)}, gpu_check.TINY, seconds=0)
    assert late["works"]["why"] == "no time is left"


def rehearse(script: str, output: Path, *options: str) -> dict[str, gpu_check.Figures]:
    """It forks itself for each check: all of them have what this process has imported."""
    command = [ROOT / "scripts" / script, "--rehearse", "--output", output, *options]
    done = start(output.parent / "said", *command, cwd=output.parent)
    said = "".join(done.communicate())
    assert done.returncode == 0, said
    return json.loads(output.read_text())


SAME = [name for name in gpu_check.CHECKS if name.startswith("trainer_") and name != "trainer_bf16"]
"""The check trainer_bf16 with other settings, which test_optimizer.py, test_background_save.py,
test_nonfinite.py and test_compile.py have.
"""


def test_a_rehearsal(tmp_path: Path) -> None:
    names = [name for name in gpu_check.CHECKS if name not in SAME]
    found = rehearse("gpu_check.py", tmp_path / "found.json", "--only", *names)
    assert list(found) == names
    assert {result["verdict"] for result in found.values()} == {"ok"}
    assert found["resumed_bits"]["figures"] == {"deterministic": "same"}
    rates = found["attention_rates"]["figures"]
    assert rates["sdpa"]["forward"] >= 0 and rates["varlen, FA3"].startswith("no: ")


NEEDS_A_CARD = {
    "trainer_compile": "Triton",
    "copies_beside_kernels": "the profiler's records of a device",
    "attention_rates": "the profiler's records of a device",
    "planned_memory": "sizes beside which the allocator's own do not count",
    "pytest_gpu": "it runs the tests marked gpu, which `pytest --cuda` runs here",
}
"""Checks that the device of tests/cuda cannot run."""

QUICK = ["versions", "beyond_int32", "packed_windows", "loss_tiles", "page_locking"]
OTHERS = [
    "trainer_bf16",
    "trainer_fp32",
    "trainer_8bit",
    "trainer_async",
    "trainer_skip",
    "trainer_skip_8bit",
    "offload_bits",
    "resumed_bits",
]
ON_THE_DEVICE = """
import dataclasses, sys
sys.path.insert(0, {scripts!r})
import gpu_check
gpu_check.REAL = dataclasses.replace(gpu_check.TINY, device="cuda", tokens=64)
slower = {{name: (check, 10 * limit) for name, (check, limit) in gpu_check.CHECKS.items()}}
gpu_check.CHECKS = slower
sys.exit(gpu_check.main(sys.argv[1:]))
"""
"""The shapes of a rehearsal, but the code of a GPU."""


@pytest.mark.cuda(only=True)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(OTHERS, id="others", marks=pytest.mark.slow),
    ],
)
def test_on_the_device(tmp_path: Path, names: list[str]) -> None:
    script, output = tmp_path / "check.py", tmp_path / "found.json"
    script.write_text(ON_THE_DEVICE.format(scripts=str(ROOT / "scripts")))
    command = [script, "--minutes", "90", "--output", output, "--only", *names]
    done = start(tmp_path / "said", *command, cwd=tmp_path, LOCAL_WORLD_SIZE="1")
    said = "".join(done.communicate())
    assert done.returncode == 0, said
    found = json.loads(output.read_text())
    assert {name: result["verdict"] for name, result in found.items()} == dict.fromkeys(names, "ok")


def test_each_check_runs_on_the_device_or_needs_a_card() -> None:
    """A new check is to be put into one of the lists."""
    assert sorted([*QUICK, *OTHERS, *NEEDS_A_CARD]) == sorted(gpu_check.CHECKS)


@pytest.mark.slow
def test_a_rehearsal_of_other_settings(tmp_path: Path) -> None:
    found = rehearse("gpu_check.py", tmp_path / "found.json", "--only", *SAME)
    assert list(found) == SAME
    assert {result["verdict"] for result in found.values()} <= {"ok", "skipped"}
    skipped = {name for name, result in found.items() if result["verdict"] == "skipped"}
    assert skipped <= {"trainer_8bit", "trainer_skip_8bit"}, "without torchao"


@pytest.mark.slow
def test_a_rehearsal_of_streaming(tmp_path: Path) -> None:
    found = rehearse("gpu_check_streaming.py", tmp_path / "found.json")
    verdicts = {name: result["verdict"] for name, result in found.items()}
    assert verdicts == dict.fromkeys(gpu_check_streaming.CHECKS, "ok")
    assert max(found["gradients"]["figures"].values()) < 1e-5


@pytest.mark.slow
def test_a_rehearsal_of_eight(tmp_path: Path) -> None:
    found = rehearse("gpu_check_8.py", tmp_path / "found.json")
    verdicts = {name: result["verdict"] for name, result in found.items()}
    assert verdicts == dict.fromkeys(gpu_check_8.CHECKS, "ok")
    assert found["step_1m"]["figures"]["loss"] > 0


def test_time_that_copies_are_hidden() -> None:
    kernels = gpu_check.merged([(5, 9), (0, 2), (1, 3), (8, 12)])
    assert kernels == [(0, 3), (5, 12)]
    assert gpu_check.overlap((2, 6), kernels) == 2


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "exchange (all-to-all)"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "FSDP"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("Memcpy DtoH (Device -> Pinned)", "copies to the host"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other kernels"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert gpu_check_8.kind_of(kernel) == kind
