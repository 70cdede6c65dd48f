"""What the launcher started, one process or many: checked before anything is built on it, and named when it breaks.

    processes = join_processes(config.timeout_seconds)     # ConfigError for what would go wrong
    check_alike({"dataset": checksum})                     # ConfigError, on all, where one of them has another
    answer = on_main_process(look_it_up)                   # on all of them

Accelerate takes the environment at its word. Where that is incomplete it trains alone, or waits for ever, and says
nothing: so what is refused here is what Accelerate 1.15 was seen to accept and then not do.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil  # of Accelerate's own requirements
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

RANK_OF = {  # the variable in which each kind of launcher gives the number of processes, and where it numbers them
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
    """Join the processes that the launcher has started, on the devices that torch sees or on the CPU.

    Raises ConfigError where Accelerate would quietly do something else than the environment says.
    """
    check_values(os.environ)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = device is None or parse_flag_from_env("ACCELERATE_USE_CPU")
    device_type = "cpu" if on_cpu or device is None else device.type
    check_environment(os.environ, device_type, 0 if on_cpu else torch.accelerator.device_count())
    if os.environ.get("WORLD_SIZE") == "1":
        # one that is alone is told so: Accelerate would wrap its model, which takes a third of the speed
        os.environ.pop("LOCAL_RANK", None)
    if device_type == "cuda" and torch.version.cuda:  # not ROCm, which has other names for all of it
        number = _whole_number("LOCAL_RANK", os.environ) if "LOCAL_RANK" in os.environ else 0
        capability = torch.cuda.get_device_capability(number)
        check_kernels(torch.cuda.get_device_name(number), capability, torch.cuda.get_arch_list())
    if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        # gloo is told by which interface to go, unless the user did
        if interface := interface_towards(os.environ.get("MASTER_ADDR", "")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_seconds), **_meeting_place(timeout_seconds))
    started = os.environ.get("WORLD_SIZE", "1")
    if state.num_processes == 1 and started != "1":
        raise ConfigError(
            f"WORLD_SIZE={started}, but Accelerate joins no processes on the device {state.device}: each would train"
            f" alone. Train on the CPU:\n  ACCELERATE_USE_CPU=true {launch_command(int(started), 'cpu')}"
        )
    return state


def _meeting_place(timeout_seconds: int) -> dict[str, Any]:
    """Where processes that torchrun has restarted on one machine meet, as arguments of init_process_group.

    It gives them the store of those before, with the addresses in it of processes that are gone; they waited for them
    in one of three restarts (torch 2.14). Launchers of several machines need not have the same count of restarts.
    """
    restarts, world_size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    if restarts == "0" or world_size == "1" or world_size != os.environ.get("LOCAL_WORLD_SIZE"):
        return {}
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(f"restart-{restarts}", TCPStore(*address, timeout=timedelta(seconds=timeout_seconds)))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(world_size)}


def on_main_process(function: Callable[[], T]) -> T:
    """What `function` returns, or the error that it raises, on all processes; only the main one calls it."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer = [function(), None]
        except (UserError, OSError) as error:
            answer = [None, error]
    result, failure = broadcast_object_list(answer)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def check_alike(values: Mapping[str, Any], perhaps_unknown: Collection[str] = ()) -> None:
    """Raise ConfigError, on all processes, where one has another value than the first; all of them must call it.

    Data parallelism takes for granted that the processes differ in nothing but their share of each batch. Where they
    do, training goes on and comes to a wrong result. What is `perhaps_unknown` is compared where it is not None.
    """
    everyone = gather_object([(socket.gethostname(), dict(values))])
    host, expected = everyone[0]
    for rank, (other_host, found) in enumerate(everyone):
        for name, value in found.items():
            unknown = name in perhaps_unknown and None in (value, expected[name])
            if value != expected[name] and not unknown:
                raise ConfigError(
                    f"The processes of this job differ in {name}: {value} in process {rank} on {other_host},"
                    f" {expected[name]} in process 0 on {host}. All machines need the same data, code and settings."
                )


def check_values(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for a value that Accelerate reads without a look, and would end in a traceback about."""
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
            raise ConfigError(f"ACCELERATE_TORCH_DEVICE={device} in the environment: no device. Unset it.") from error
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.upper() not in DynamoBackend.__members__:
        raise ConfigError(f"ACCELERATE_DYNAMO_BACKEND={backend} in the environment: unknown. Unset it.")


def check_environment(environment: Mapping[str, str], device_type: str, device_count: int) -> None:
    """Raise ConfigError for an environment that does not fit together on a machine with so many such devices."""
    for name in SHARDING:
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"The launcher asks for {name} (its --config_file, or your default one): here each process holds the"
                " whole model. Launch with one of accelerate_configs/."
            )
    variable = next((name for name in RANK_OF if name in environment), None)
    if "LOCAL_WORLD_SIZE" in environment and _whole_number("LOCAL_WORLD_SIZE", environment) < 1:
        raise ConfigError("LOCAL_WORLD_SIZE=0: at least this process is on this machine. Unset it.")
    if variable is None:
        return
    size = _whole_number(variable, environment)
    on_cpu = device_type == "cpu"
    mpi = [name for name in RANK_OF if on_cpu and name in environment and name.startswith(("PMI", "OMPI", "MV2"))]
    for name in mpi:  # on a CPU Accelerate takes these first
        if _whole_number(name, environment) != size:
            raise ConfigError(
                f"{variable}={size}, but {name}={environment[name]}: two launchers, and Accelerate would take the"
                f" second's number. Start train.py by one of them, or unset {name} and {RANK_OF[name]}."
            )
    if size == 1:
        return
    by_mpi = variable in mpi
    rank_variable = RANK_OF[variable] if by_mpi else "RANK"
    needed = [*(() if by_mpi else ("WORLD_SIZE",)), rank_variable, *(() if on_cpu else ("LOCAL_RANK",)), "MASTER_ADDR"]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"{variable}={size} says that this is one of {size} processes, but without {', '.join(missing)} they would"
            f" not train together. Let a launcher start them,\n  {launch_command(size, device_type)}\nor"
            f" {f'unset {variable}' if by_mpi else 'set WORLD_SIZE=1'} to train in this one alone."
        )
    rank = _whole_number(rank_variable, environment)
    if rank >= size:
        raise ConfigError(f"{rank_variable}={rank}: there are only {variable}={size} processes, numbered from 0.")
    if device_type == "mps":
        raise ConfigError(
            f"{variable}={size}: several processes cannot share the GPU of a Mac. Train in one, or on the CPU:\n"
            f"  ACCELERATE_USE_CPU=true {launch_command(size, 'cpu')}"
        )
    if on_cpu:
        return
    for name, most in (("LOCAL_WORLD_SIZE", device_count), ("LOCAL_RANK", device_count - 1)):
        if name in environment and _whole_number(name, environment) > most:
            raise ConfigError(
                f"{name}={environment[name]}: more processes on this machine than its {device_count} {device_type}"
                f" device(s). Launch at most {device_count}, or on the CPU:\n"
                f"  ACCELERATE_USE_CPU=true {launch_command(size, 'cpu')}"
            )


def resolve_precision(mixed_precision: str | None, device_type: str) -> str:
    """The precision of the flag, or else of the launcher; ConfigError for one that would have no effect."""
    asked = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    origin = "--mixed-precision" if mixed_precision else "The launcher's mixed precision"
    if asked not in ("no", "fp16", "bf16"):
        raise ConfigError(f"{origin} {asked}: not supported. Known: no, fp16, bf16.")
    if asked == "fp16" and device_type == "cpu":
        raise ConfigError(
            f"{origin} fp16: has no effect on a CPU, which would go on in float32. Add --mixed-precision bf16, or no."
        )
    return asked


def _whole_number(variable: str, environment: Mapping[str, str]) -> int:
    value = environment[variable]
    if not (value.isdecimal() and len(value) < 10):
        raise ConfigError(f"{variable}={value} in the environment: must be a whole number; launchers set it.")
    return int(value)


def launch_command(num_processes: int, device_type: str) -> str:
    """The command that starts so many processes on one machine."""
    name = "multi_cpu" if device_type == "cpu" else "multi_gpu"
    return f"accelerate launch --config_file accelerate_configs/{name}.yaml --num_processes {num_processes} train.py"


def accelerate_settings(gradient_accumulation_steps: int) -> list[KwargsHandler]:
    """Accelerate's settings of DistributedDataParallel, tuned for a small model.

    Gradients are views into the buckets that are averaged over the processes, which saves a copy of each. A static
    graph saves a search for unused parameters, but torch forbids it where a backward pass is not followed by an
    average.
    """
    return [DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=gradient_accumulation_steps == 1)]


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address: "eth0"; None for none but the loopback.

    gloo takes the one that the machine's own name resolves to: with Debian's and Ubuntu's /etc/hosts that is 127.0.1.1,
    and the machines do not find each other.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: only chooses the route
        except OSError:
            return None
        own = probe.getsockname()[0]
    names = [name for name, addresses in psutil.net_if_addrs().items() if own in [it.address for it in addresses]]
    return None if own.startswith("127.") or not names else names[0]


@contextmanager
def waiting_for_others(timeout_seconds: int) -> Iterator[None]:
    """Say in words that another process is gone, where torch says it with the name of a C++ file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            rank = os.environ.get("RANK", "0")
            raise UserError(
                f"Process {rank} lost the others of this job: one of them failed or was killed, its machine or the"
                " network is gone, the address or port where they were to meet is wrong or taken, or it took longer"
                f" than --timeout-seconds {timeout_seconds}. The first error on the screen, or on another machine's,"
                f" says which. (torch: {str(error).splitlines()[0]})"
            ) from error
        raise
