"""The checkpoints from which a run goes on.

with Checkpoints(run, ...) as checkpoints:
    notes = checkpoints.resume()               # the newest whole one, if there is any
    checkpoints.save()                         # also when Interrupted, after a signal, passes through

A checkpoint is a folder of safetensors and JSON, so that no file of it can hold code. It is written under another name,
flushed and renamed, and only then is an older one removed; its manifest tells a whole one from one that is damaged.
"""

import hashlib
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from mnist.config.settings import TrainConfig
from mnist.errors import ConfigError, UserError
from mnist.files import new_folder, read_text, remove_folder, remove_leftovers
from mnist.launch.processes import on_main_process
from mnist.launch.signals import Interrupted
from mnist.models.saved import check_finite, save_json, save_tensors, weights_of
from mnist.runs.folder import Run
from mnist.training.progress import Progress

SAME_TO_THE_BIT = ("torch", "device", "num_processes", "threads", "precision", "compiler")
"""What of a run's environment must stay the same for a resumed run to continue to the bit."""


def has_checkpoint(config: TrainConfig) -> bool:
    """Whether the run that goes on has a checkpoint, from which its weights come; all processes must call it.

    One that was ended before its first checkpoint starts as it did before.
    """
    folder = Path(config.resume or "") / "checkpoints"
    return config.resume is not None and on_main_process(lambda: any(folder.glob("step-*")))


class Stateful(Protocol):
    """What says in a dict of plain values where it is, and goes on from there."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class RandomState:
    """All random generators of a process that training may draw from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Plain values; torch's states, bytes, in hexadecimal."""
        kind, keys, *rest = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "torch": bytes(torch.get_rng_state().tolist()).hex(),
        }
        if self.device.type != "cpu":
            device_state = torch.get_device_module(self.device).get_rng_state()
            state[self.device.type] = bytes(device_state.tolist()).hex()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all of them; that of a device only where the state is from such a device."""
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(_bytes_tensor(state["torch"]))
        if self.device.type in state:
            torch.get_device_module(self.device).set_rng_state(_bytes_tensor(state[self.device.type]))


def _bytes_tensor(hexadecimal: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)


class DamagedError(Exception):
    """A checkpoint that is not what was written; says in which way."""


class Checkpoints:
    """The last three states of a run; resumed from any of them, it continues as if nothing had happened."""

    KEPT = 3
    SHARE_OF_TIME = 0.05  # that they may cost, where the user has not said how often

    def __init__(
        self,
        run: Run,
        made_with: Mapping[str, Mapping[str, Any]],
        progress: Progress,
        net: nn.Module,
        optimizer: Stateful,
        others: Mapping[str, Stateful],
    ) -> None:
        """`net` is the model as it was built; `others` have a state that is the same on all processes.

        `made_with` has the settings of the run under "essence" and what it runs on under "launch", with the keys of
        state.json. A checkpoint of other settings is refused; on other hardware the last digits of results differ.
        """
        self.run = run
        self.folder = run.folder / "checkpoints"
        self.made_with = made_with
        self.progress = progress
        self.net = net
        self.optimizer = optimizer
        self.parts: dict[str, Stateful] = {"progress": progress, **others}
        # what each process has for itself
        self.own: dict[str, Stateful] = {"loss": progress.loss, "random": RandomState(progress.accelerator.device)}
        self.cost = 0.0  # seconds that the last one took
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):  # on all processes at the same step
            self.save()

    def is_due(self) -> bool:
        """Whether one more costs so little that it can be saved now; all processes must call it."""
        waited = time.monotonic() - self.saved_at
        return on_main_process(lambda: self.cost <= self.SHARE_OF_TIME * (waited + self.cost))

    # --- writing

    def save(self) -> None:
        """Write a checkpoint of this moment; all processes must call it, between two optimizer steps."""
        started = time.monotonic()
        ranks = gather_object([{name: part.state_dict() for name, part in self.own.items()}])
        if self.run.writes:
            folder = self.folder / f"step-{self.progress.step:010}{'-evaluated' if self.progress.evaluated else ''}"
            if not folder.exists():
                self._write(folder, ranks)
                for old in self._folders()[self.KEPT :]:
                    remove_folder(old)
            self.run.note(**self.progress.position, checkpoint=self.progress.step)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - started

    def _write(self, folder: Path, ranks: list[dict[str, Any]]) -> None:
        self.run.check_place()
        check_finite(self.net)
        tensors, optimizer = flatten(self.optimizer.state_dict())
        state = {
            **self.made_with,
            "optimizer": optimizer,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "ranks": ranks,
        }
        with new_folder(folder) as temporary:
            save_tensors(weights_of(self.net), temporary / "model.safetensors")
            save_tensors(tensors, temporary / "optimizer.safetensors")
            save_json(state, temporary / "state.json")
            files = {path.name: path.read_bytes() for path in temporary.iterdir()}
            save_json({name: checksum(content) for name, content in files.items()}, temporary / "manifest.json")

    def _folders(self) -> list[Path]:
        """Those that are there, the newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    # --- reading

    def resume(self) -> list[str]:
        """Load the newest whole checkpoint, if there is one; all processes must call it. Returns what to tell.

        Raises UserError where there are checkpoints, but none is whole; ConfigError for one of another run's.
        """
        found = on_main_process(self._newest_whole)
        if found is None:
            return []
        name, files, notes = found
        return [*notes, *self._load(name, files)]

    def _newest_whole(self) -> tuple[str, dict[str, bytes], list[str]] | None:
        remove_leftovers(self.folder)
        notes: list[str] = []
        for folder in self._folders():
            try:
                return folder.name, read_whole(folder), notes
            except DamagedError as error:
                aside = folder.with_name(f"damaged-{folder.name}")
                notes.append(f"{folder} is damaged ({error}): set aside as {aside.name}")
                remove_folder(aside)
                folder.rename(aside)
        last = self.run.state.get("checkpoint")
        if last is not None or any(self.folder.glob("damaged-*")):
            written = "" if last is None else f" One of step {last} was written."
            raise UserError(
                "\n".join(
                    [*notes, f"{self.folder}: none of the checkpoints is whole, so this run cannot go on.{written}"]
                )
                + " Restore it from a backup, or start again under another --run-name."
            )
        return None

    def _load(self, name: str, files: Mapping[str, bytes]) -> list[str]:
        from safetensors.torch import load

        state = json.loads(files["state.json"])
        for setting, there in state["essence"].items():
            here = self.made_with["essence"].get(setting)
            if here != there:
                raise ConfigError(
                    f"{self.folder / name}: was saved with {setting} {there}, but this run has {here}."
                    " It can only go on with what it began with."
                )
        weights, moments = load(files["model.safetensors"]), load(files["optimizer.safetensors"])
        try:
            check_plausible(files["state.json"], weights | moments)
            self.net.load_state_dict(weights)
            self.optimizer.load_state_dict(unflatten(moments, state["optimizer"]))
            for key, part in self.parts.items():
                if key in state:
                    part.load_state_dict(state[key])
            ranks, rank = state["ranks"], self.progress.accelerator.process_index
            for key, own in self.own.items():
                own.load_state_dict(ranks[rank % len(ranks)][key])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"{self.folder / name}: is whole, but cannot be a state of this run: {error}. Remove it to resume from"
                " the one before it."
            ) from error
        here = self.made_with["launch"]
        changed = [
            f"{key} was {there}, is {here.get(key)}" for key, there in state["launch"].items() if there != here.get(key)
        ]
        notes = [f"goes on from {name}, epoch {self.progress.epoch}, batch {self.progress.batch:,}"]
        if changed:
            notes.append(f"no longer the same to the bit: {'; '.join(changed)}")
        return notes


def read_whole(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, if each has the length and the checksum of the manifest; otherwise DamagedError."""
    from safetensors.torch import load

    try:
        manifest = json.loads(read_text(_file_of(folder, "manifest.json")))
        files = {}
        for name in manifest:
            path = _file_of(folder, name)
            if path.stat().st_size != manifest[name]["bytes"]:  # before it is read, however large it is
                raise DamagedError(f"{name} is not what was written")
            files[name] = path.read_bytes()
        for name, content in files.items():
            if checksum(content) != manifest[name]:
                raise DamagedError(f"{name} is not what was written")
        json.loads(files["state.json"])
        for name in ("model.safetensors", "optimizer.safetensors"):
            load(files[name])
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    except (DamagedError, OSError, MemoryError):  # the latter two say nothing of the file
        raise
    except Exception as error:  # whatever a parser says of what is not its format
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return files


def _file_of(folder: Path, name: str) -> Path:
    """A file of a checkpoint; DamagedError for what is none, as a pipe, which would never end."""
    path = folder / name
    if Path(name).name != name or (path.exists() and not path.is_file()):
        raise DamagedError(f"{name} is no file of it")
    return path


def check_plausible(state: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for numbers that no training comes to: NaN, infinity, steps below zero."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in state.json")

    json.loads(state, parse_constant=refuse)
    for name, values in tensors.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity")
        if name.endswith(".step") and (values < 0).any():
            raise ValueError(f"{name} is {float(values.min()):g}")


def checksum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as tensors by name ("3.exp_avg" of the parameter 3) and the rest as plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def unflatten(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` was given."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["state"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
