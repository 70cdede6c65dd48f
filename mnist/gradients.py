"""Gradients averaged over processes of one machine through memory that all of them see, where they train on its CPU.

    model = accelerator.prepare(model)
    average = share_gradients(model, accelerator, 600)    # changes nothing for one process, on GPUs, between machines
    average(gradients)                                    # the same for a flat tensor of gradients, in place

Through gloo the gradients go over the network's loopback, copied by the kernel and by gloo's threads, which take the
cores from the training. `python benchmarks/scaling.py` shows what is left of that (docs/distributed.md).
"""

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.futures import Future

SHARED_MEMORY = Path("/dev/shm")  # Linux's folder of files that are memory


def share_gradients(model: nn.Module, accelerator: Accelerator, timeout_seconds: int) -> Callable[[Tensor], None]:
    """Let the DistributedDataParallel that is in `model` average in shared memory where that can be done.

    Returns what averages a flat tensor of gradients in place in the same way. A process waits for the others for so
    many seconds at most.
    """
    world_size = os.environ.get("WORLD_SIZE")
    on_one_machine = accelerator.num_processes > 1 and world_size == os.environ.get("LOCAL_WORLD_SIZE")
    if on_one_machine and accelerator.device.type == "cpu" and SHARED_MEMORY.is_dir():
        if (peers := connect(timeout_seconds)) is not None:
            mean = SharedMean(peers)
            model.register_comm_hook(None, mean.hook)  # type: ignore[operator]
            return mean.average
    return average_by_torch


class SharedMean:
    """Averages buckets of gradients: each process writes into a row of its own, waits for all, takes the mean of all.

    The rows are added in the order of the ranks, so all processes get the same to the bit. There are two tables, used
    in turn: a process that is a step ahead writes where the others no longer read. They wait for each other by a byte
    through a socket: asleep, awake within microseconds, and told when the other is gone. A number summed through gloo
    took 7 to 9 % of a step of the CNN on two cores, for its threads have to be given one.
    """

    def __init__(self, peers: "list[socket.socket]") -> None:
        self.peers = peers  # one for each of the other processes
        self.tables: dict[tuple[int, torch.dtype], Tensor | None] = {}  # by length of a row and type
        self.turn = 0

    def hook(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """What DistributedDataParallel calls with gradients, flat, that are ready; they come back averaged."""
        average: Future[Tensor] = Future()
        self.average(bucket.buffer())
        average.set_result(bucket.buffer())
        return average

    def average(self, gradients: Tensor) -> None:
        """Average a flat tensor over the processes, in place."""
        key = len(gradients), gradients.dtype
        if key not in self.tables:
            self.tables[key] = shared_tensor((2, dist.get_world_size(), len(gradients)), gradients.dtype)
        tables = self.tables[key]
        if tables is None:  # as in containers with 64 MiB of shared memory
            average_by_torch(gradients)
            return
        rows = tables[self.turn]  # [processes, length]
        self.turn = 1 - self.turn
        rows[dist.get_rank()].copy_(gradients)
        self.wait()
        torch.mean(rows, 0, out=gradients)

    def wait(self) -> None:
        """Until all processes are here; DistNetworkError, as from torch itself, where one is gone or too late."""
        try:
            for peer in self.peers:
                peer.sendall(b".")
            for peer in self.peers:
                if not peer.recv(1):
                    raise ConnectionResetError("it closed the connection")
        except OSError as error:
            raise lost(error) from error


def average_by_torch(gradients: Tensor) -> None:
    """As SharedMean.average, by torch's own means: NCCL between GPUs, gloo through the network."""
    dist.all_reduce(gradients.div_(dist.get_world_size()))


def lost(error: OSError) -> Exception:
    """What torch itself raises where another process does not answer."""
    return dist.DistNetworkError(f"waiting for another process of this machine: {error}")


def connect(timeout_seconds: int) -> "list[socket.socket] | None":
    """Sockets to all other processes of the job, which are on this machine; None, for all, where there can be none.

    All processes must call it. Each listens, calls those of lower ranks and says who it is. DistNetworkError where one
    of them does not come.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        place = [tempfile.mkdtemp(prefix="gradients-", dir=SHARED_MEMORY) if rank == 0 else None]
    except OSError:
        place = [None]
    dist.broadcast_object_list(place)
    if place[0] is None:
        return None
    peers = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(timeout_seconds)
        listener.bind(f"{place[0]}/{rank}")
        listener.listen(size)
        dist.barrier()
        try:
            for other in range(rank):
                peers[other] = socket.socket(socket.AF_UNIX)
                peers[other].connect(f"{place[0]}/{other}")
                peers[other].sendall(struct.pack("i", rank))
            for _ in range(rank + 1, size):
                caller, _ = listener.accept()
                caller.settimeout(timeout_seconds)
                peers[struct.unpack("i", caller.recv(4))[0]] = caller
        except OSError as error:
            shutil.rmtree(place[0], ignore_errors=True)
            raise lost(error) from error
    dist.barrier()
    if rank == 0:
        shutil.rmtree(place[0])
    for peer in peers.values():
        peer.settimeout(timeout_seconds)
    return list(peers.values())


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor in memory that all processes of the machine see; None, for all, where there is not enough of it.

    All processes must call it. The file behind it loses its name as soon as all have it, and so the memory is free when
    they end, however they do.
    """
    size = torch.Size(shape).numel()
    name = [reserve(size * dtype.itemsize) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    if name[0] is None:
        return None
    tensor = torch.from_file(name[0], shared=True, size=size, dtype=dtype).view(shape)
    dist.barrier()
    if dist.get_rank() == 0:
        os.unlink(name[0])
    return tensor


def reserve(size: int) -> str | None:
    """The path of a new file of `size` bytes in shared memory; None where it cannot be made."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="gradients-", dir=SHARED_MEMORY)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)  # else what is missing would kill the process that first touches it
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
    return path
