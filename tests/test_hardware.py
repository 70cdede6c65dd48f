"""Threads and names of devices."""

import os
from collections.abc import Iterator

import pytest
import torch

from mnist.hardware import choose_threads, device_name
from mnist.models import CNN, Net


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores; torch's own number is put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield
    torch.set_num_threads(threads)


def test_a_small_batch_of_a_small_network_stays_on_one_thread_and_a_large_one_is_shared() -> None:
    assert choose_threads(Net(), torch.zeros(10, 1, 28, 28)) == 1
    assert choose_threads(Net(), torch.zeros(256, 1, 28, 28)) == 4
    assert choose_threads(CNN(), torch.zeros(10, 1, 28, 28)) == 4 == torch.get_num_threads()


@pytest.mark.parametrize(("processes", "threads"), [(2, 2), (3, 1), (8, 1)])
def test_processes_of_one_machine_share_its_cores(
    processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_threads(CNN(), torch.zeros(64, 1, 28, 28)) == threads


def test_looking_at_the_network_leaves_it_and_the_random_generator_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose_threads(model, torch.rand(2, 1, 4, 4, generator=torch.Generator()))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert int(model[0].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_a_device_is_named_in_words() -> None:
    assert device_name(torch.device("cpu")).startswith("cpu (")
    assert device_name(torch.device("meta")) == "meta"
