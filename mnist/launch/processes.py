"""The processes of a job: check the launcher's environment, join them and compare them.

    state = join_processes(config.timeout_seconds)         # ConfigError for an invalid launch
    check_alike({"dataset": checksum})                     # ConfigError on all processes if they differ
    answer = on_main_process(look_it_up)                   # returned on all processes

Accelerate 1.15 does not check the environment: if a variable is missing, it may train in one process or wait forever
without a message. This module refuses such launches.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    str_to_bool,
)
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import check_kernels

RANK_OF = {  # per launcher: variable with the number of processes -> variable with the rank
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
T = TypeVar("T")


def join_processes(timeout_seconds: int) -> PartialState:
    """Join the processes that the launcher started, on torch's accelerator or the CPU.

    Raises ConfigError if Accelerate would silently ignore part of the environment.
    """
    check_values(os.environ)
    device_type = training_device().type
    on_cpu = device_type == "cpu"
    check_environment(os.environ, device_type, 0 if on_cpu else torch.accelerator.device_count())
    if os.environ.get("WORLD_SIZE") == "1":
        # otherwise Accelerate wraps the model for distributed training, which costs a third of the speed
        os.environ.pop("LOCAL_RANK", None)
    if device_type == "cuda" and torch.version.cuda:  # not ROCm
        number = _whole_number("LOCAL_RANK", os.environ) if "LOCAL_RANK" in os.environ else 0
        capability = torch.cuda.get_device_capability(number)
        check_kernels(torch.cuda.get_device_name(number), capability, torch.cuda.get_arch_list())
    if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        if interface := interface_towards(os.environ.get("MASTER_ADDR", "")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    started = os.environ.get("WORLD_SIZE", "1")
    state = PartialState(
        cpu=on_cpu,
        # gloo for what is on the CPU: if a process is lost, it raises an error, while NCCL aborts the process
        backend="cuda:nccl,cpu:gloo" if device_type == "cuda" and started != "1" else None,
        timeout=timedelta(seconds=timeout_seconds),
        **_meeting_place(timeout_seconds),
    )
    if state.num_processes == 1 and started != "1":
        raise ConfigError(
            f"WORLD_SIZE={started}, but Accelerate does not join processes on the device {state.device}: each would"
            f" train alone. Train on the CPU:\n  ACCELERATE_USE_CPU=true {launch_command(int(started), 'cpu')}"
        )
    return state


def training_device() -> torch.device:
    """The accelerator that torch finds; the CPU if there is none, or if ACCELERATE_USE_CPU is set."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None or parse_flag_from_env("ACCELERATE_USE_CPU") else device


def _meeting_place(timeout_seconds: int) -> dict[str, Any]:
    """Arguments of init_process_group for processes that torchrun restarted on one machine: a separate store prefix.

    torchrun reuses the store, which still has the addresses of dead processes: one in three restarts hung (torch 2.14).
    Not for several machines, whose launchers may count restarts differently.
    """
    restarts, world_size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    if restarts == "0" or world_size == "1" or world_size != os.environ.get("LOCAL_WORLD_SIZE"):
        return {}
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(f"restart-{restarts}", TCPStore(*address, timeout=timedelta(seconds=timeout_seconds)))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(world_size)}


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on the main process, and return its result or raise its error on all processes."""
    answer: list[Any] = [None, None]  # result, error
    if PartialState().is_main_process:
        try:
            answer[0] = function()
        except (UserError, OSError) as error:
            answer[1] = error
    result, failure = broadcast_object_list(answer)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def check_alike(values: Mapping[str, Any], perhaps_unknown: Collection[str] = ()) -> None:
    """Raise ConfigError on all processes if one has other values than the first. All processes must call this.

    Data parallelism gives wrong results, without an error, if processes differ in more than their share of each batch.
    Values that are `perhaps_unknown` are not compared if they are None.
    """
    everyone = gather_object([(socket.gethostname(), dict(values))])
    host, expected = everyone[0]
    for rank, (other_host, others) in enumerate(everyone):
        for name, value in others.items():
            unknown = name in perhaps_unknown and None in (value, expected[name])
            if value != expected[name] and not unknown:
                raise ConfigError(
                    f"The processes of this job differ in {name}: {value} in process {rank} on {other_host},"
                    f" {expected[name]} in process 0 on {host}. All machines need the same data, code and settings."
                )


def check_values(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for an invalid value that would make Accelerate fail with a traceback."""
    for name in FLAGS:
        try:
            str_to_bool(environment.get(name, "0"))
        except ValueError as error:
            raise ConfigError(f"{name}={environment[name]} in the environment: must be true or false.") from error
    if environment.get("LOCAL_RANK", "-1") != "-1":
        _whole_number("LOCAL_RANK", environment)
    if device := environment.get("ACCELERATE_TORCH_DEVICE"):
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ConfigError(
                f"ACCELERATE_TORCH_DEVICE={device} in the environment: not a valid torch device. Unset it."
            ) from error
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.upper() not in DynamoBackend.__members__:
        raise ConfigError(f"ACCELERATE_DYNAMO_BACKEND={backend} in the environment: unknown. Unset it.")


def check_environment(environment: Mapping[str, str], device_type: str, device_count: int) -> None:
    """Raise ConfigError for an inconsistent environment on a machine with `device_count` devices."""
    for name in SHARDING:
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"The launcher asks for {name} (in its --config_file or your default one), which is not supported."
                " Launch with one of accelerate_configs/."
            )
    variable = next((name for name in RANK_OF if name in environment), None)
    if "LOCAL_WORLD_SIZE" in environment and _whole_number("LOCAL_WORLD_SIZE", environment) < 1:
        raise ConfigError("LOCAL_WORLD_SIZE=0: must be at least 1. Unset it.")
    if variable is None:
        return
    size = _whole_number(variable, environment)
    on_cpu = device_type == "cpu"
    mpi = [name for name in RANK_OF if on_cpu and name in environment and name.startswith(("PMI", "OMPI", "MV2"))]
    for name in mpi:  # on a CPU Accelerate prefers these
        if _whole_number(name, environment) != size:
            raise ConfigError(
                f"{variable}={size}, but {name}={environment[name]}: set by two launchers, and Accelerate would use the"
                f" second. Start train.py with one launcher, or unset {name} and {RANK_OF[name]}."
            )
    if size == 1:
        return
    by_mpi = variable in mpi
    rank_variable = RANK_OF[variable] if by_mpi else "RANK"
    needed = [*(() if by_mpi else ("WORLD_SIZE",)), rank_variable, *(() if on_cpu else ("LOCAL_RANK",)), "MASTER_ADDR"]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"{variable}={size} means {size} processes, but without {', '.join(missing)} they would not train together."
            f" Use a launcher,\n  {launch_command(size, device_type)}\nor"
            f" {f'unset {variable}' if by_mpi else 'set WORLD_SIZE=1'} to train in a single process."
        )
    rank = _whole_number(rank_variable, environment)
    if rank >= size:
        raise ConfigError(f"{rank_variable}={rank}: there are only {variable}={size} processes; ranks start at 0.")
    if device_type == "mps":
        raise ConfigError(
            f"{variable}={size}: several processes cannot share the GPU of a Mac. Use one process, or the CPU:\n"
            f"  ACCELERATE_USE_CPU=true {launch_command(size, 'cpu')}"
        )
    if on_cpu:
        return
    for name, most in (("LOCAL_WORLD_SIZE", device_count), ("LOCAL_RANK", device_count - 1)):
        if name in environment and _whole_number(name, environment) > most:
            raise ConfigError(
                f"{name}={environment[name]}: more processes on this machine than its {device_count} {device_type}"
                f" device(s). Launch at most {device_count}, or use the CPU:\n"
                f"  ACCELERATE_USE_CPU=true {launch_command(size, 'cpu')}"
            )


def resolve_precision(mixed_precision: str | None, device_type: str, has_bf16: bool = True) -> str:
    """The precision of the flag, or else of the launcher. Raises ConfigError if it would have no effect."""
    launchers = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "auto" and launchers == "no":
        return "bf16" if has_bf16 and device_type == "cuda" else "no"
    by_flag = mixed_precision not in (None, "auto")
    asked = mixed_precision if by_flag else launchers
    origin = "--mixed-precision" if by_flag else "The launcher's mixed precision"
    if asked not in ("no", "fp16", "bf16"):
        raise ConfigError(f"{origin} {asked}: not supported. Known: no, fp16, bf16.")
    if asked == "fp16" and device_type == "cpu":
        raise ConfigError(
            f"{origin} fp16: has no effect on a CPU, which uses float32. Use --mixed-precision bf16 or no."
        )
    if asked == "bf16" and not has_bf16:
        raise ConfigError(
            f"{origin} bf16: needs a GPU of compute capability 8.0 or higher. Use --mixed-precision fp16 or no."
        )
    return asked


def _whole_number(variable: str, environment: Mapping[str, str]) -> int:
    value = environment[variable]
    if not (value.isdecimal() and len(value) < 10):
        raise ConfigError(f"{variable}={value} in the environment: must be a whole number. Launchers set it.")
    return int(value)


def launch_command(num_processes: int, device_type: str) -> str:
    """The command that starts `num_processes` on one machine."""
    name = "multi_cpu" if device_type == "cpu" else "multi_gpu"
    return f"accelerate launch --config_file accelerate_configs/{name}.yaml --num_processes {num_processes} train.py"


def accelerate_settings(gradient_accumulation_steps: int) -> list[KwargsHandler]:
    """DistributedDataParallel settings for a small model.

    Gradients are views of the all-reduce buckets, which saves a copy. A static graph saves the search for unused
    parameters, but torch forbids it if some backward passes are not followed by an all-reduce.
    """
    return [DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=gradient_accumulation_steps == 1)]


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches an address, e.g. "eth0"; None for the loopback.

    For GLOO_SOCKET_IFNAME: by default gloo uses the address of the host name, which is 127.0.1.1 on Debian and Ubuntu.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing, only chooses a route
        except OSError:
            return None
        own = probe.getsockname()[0]
    names = [name for name, addresses in psutil.net_if_addrs().items() if own in [each.address for each in addresses]]
    return None if own.startswith("127.") or not names else names[0]


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn an accelerator's error about full memory into a UserError that names smaller batches."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of memory: {str(error).splitlines()[0]}\n"
            "Smaller batches with the same gradients: divide --batch-size (or --global-batch-size) by a number, and"
            " multiply --gradient-accumulation-steps by it. --mixed-precision bf16, a smaller --image-size and"
            " --pretrained head also take less memory. A resumed run keeps its settings: start a new one."
        ) from error


@contextmanager
def waiting_for_others(timeout_seconds: int) -> Iterator[None]:
    """Turn torch's error about a lost process into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            rank = os.environ.get("RANK", "0")
            raise UserError(
                f"Process {rank} lost its connection to the other processes. Either one failed or was killed, its"
                " machine or the network is down, the rendezvous address or port is wrong or in use, or it took longer"
                f" than --timeout-seconds {timeout_seconds}. See the first error in the output of all machines. (torch:"
                f" {str(error).splitlines()[0]})"
            ) from error
        raise
