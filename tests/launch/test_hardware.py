"""CPU threads, memory, and what a GPU computes with."""

import contextlib
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mnist.errors import ConfigError
from mnist.launch import hardware
from mnist.launch.hardware import available_cores, check_kernels, choose_kernels, choose_threads, device_name
from mnist.models.networks import CNN, Net


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with four cores; restores torch's number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(hardware, "QUOTA", Path("/nowhere"))
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    yield
    torch.set_num_threads(threads)


def test_only_large_forward_passes_use_several_threads() -> None:
    assert choose_threads(Net(), torch.zeros(10, 1, 28, 28)) == 1
    assert choose_threads(Net(), torch.zeros(256, 1, 28, 28)) == 4
    assert choose_threads(CNN(), torch.zeros(10, 1, 28, 28)) == 4 == torch.get_num_threads()


class Products(torch.nn.Module):
    """A network without any of torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(28 * 28, 20_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def test_the_operations_of_any_layer_count() -> None:
    assert choose_threads(Products(), torch.zeros(2, 1, 28, 28)) == 4
    network = torch.nn.Sequential(torch.nn.Flatten(1, 2), torch.nn.Conv1d(28, 900, 28), torch.nn.Flatten())
    assert choose_threads(network, torch.zeros(20, 1, 28, 28)) == 4
    assert choose_threads(network, torch.zeros(1, 1, 28, 28)) == 1


@pytest.mark.parametrize(("processes", "threads"), [(2, 2), (3, 1), (8, 1)])
def test_processes_share_the_cores_of_a_machine(processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_threads(CNN(), torch.zeros(64, 1, 28, 28)) == threads


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 4)],
)
def test_a_container_uses_no_more_cores_than_its_quota(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(hardware, "QUOTA", tmp_path / "cpu.max")
    assert available_cores() == cores == choose_threads(CNN(), torch.zeros(64, 1, 28, 28))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    script = (
        "import resource, torch; from mnist.launch.hardware import keep_freed_memory; assert keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for step in range(30):\n"
        "    if step == 10: before = faults()\n"
        "    tensors = [torch.ones(1_000_000) for _ in range(8)]; del tensors\n"
        "print(faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 7_812  # pages of one step


def test_peak_memory_is_this_processs_own_and_not_its_parents() -> None:
    script = "import torch; from mnist.launch.hardware import peak_memory; print(peak_memory(torch.device('cpu')))"
    parent = (
        f"import subprocess, sys; large = b'x' * 2**30; subprocess.run([sys.executable, '-c', {script!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**30


@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions_are_as_exact_as_matrix_products_and_repeatable(tf32: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32  # as by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, or by Accelerate for a compiled model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choose_kernels()
        assert cudnn.allow_tf32 is matmul.allow_tf32 is tf32
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    finally:
        matmul.allow_tf32 = before
        choose_kernels()


WHEEL = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120")  # of torch 2.14 for CUDA 13


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "fits"),
    [
        ("Tesla V100", (7, 0), WHEEL, False),
        ("Tesla P100", (6, 0), WHEEL, False),
        ("T4", (7, 5), WHEEL, True),
        ("A10", (8, 6), WHEEL, True),  # by sm_80
        ("H100", (9, 0), WHEEL, True),
        ("a later one", (13, 0), WHEEL, True),  # by compute_120
        ("H100", (9, 0), ("sm_80",), False),
        ("another vendor's", (9, 0), ("gfx90a",), True),
        ("H100", (9, 0), ("sm_75", "sm_90a"), True),
    ],
)
def test_a_gpu_without_kernels_in_torch_is_refused(
    name: str, capability: tuple[int, int], architectures: tuple[str, ...], fits: bool
) -> None:
    message = f"{name} .compute capability {capability[0]}.{capability[1]}.: torch"
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=message):
        check_kernels(name, capability, architectures)


def test_choosing_threads_changes_neither_network_nor_random_generator() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose_threads(model, torch.rand(2, 1, 4, 4, generator=torch.Generator()))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert int(model[0].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_device_names() -> None:
    assert device_name(torch.device("cpu")).startswith("cpu (")
    assert device_name(torch.device("meta")) == "meta"
