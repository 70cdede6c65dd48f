"""Checkpoints, from which a run resumes.

with Checkpoints(run, ...) as checkpoints:
    notes = checkpoints.resume()               # from the newest intact one, if any
    checkpoints.save()                         # also if the block ends with Interrupted, after a signal

A checkpoint is a folder of safetensors and JSON, so it cannot contain code. It is written under a temporary name,
flushed and renamed, and only then is an older one removed. A manifest of checksums detects damage.
"""

import hashlib
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from mnist.config.settings import without_booleans
from mnist.errors import ConfigError, UserError
from mnist.files import new_folder, read_text, remove_folder, remove_leftovers
from mnist.launch.processes import on_main_process
from mnist.launch.signals import Interrupted
from mnist.models.saved import check_finite, save_json, save_tensors, weights_of
from mnist.runs.folder import Run
from mnist.training.progress import Progress


def bit_identity(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the environment that must stay the same for a resumed run to be bit-identical."""
    of_device = ["threads"] if environment["device"].startswith("cpu") else ["cuda", "cudnn"]
    names = ["torch", "device", "num_processes", "precision", "compiler", *of_device]
    return {name: environment[name] for name in names}


class Stateful(Protocol):
    """An object whose state is a dict of plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class RandomState:
    """The random number generators of a process: Python's, NumPy's, torch's and the device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Plain values; torch's states are bytes in hexadecimal."""
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
        """Set all of them; the device's only if the state is from the same type of device."""
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(_bytes_tensor(state["torch"]))
        if self.device.type in state:
            torch.get_device_module(self.device).set_rng_state(_bytes_tensor(state[self.device.type]))


def _bytes_tensor(hexadecimal: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)


class DamagedError(Exception):
    """A checkpoint differs from what was written."""


class Checkpoints:
    """The last three checkpoints of a run; resumed from any of them, training continues bit-identically."""

    KEPT = 3
    SHARE_OF_TIME = 0.05  # of the run, without --checkpoint-every

    def __init__(
        self,
        run: Run,
        made_with: Mapping[str, Mapping[str, Any]],
        progress: Progress,
        net: nn.Module,
        optimizer: Stateful,
        others: Mapping[str, Stateful],
    ) -> None:
        """`net` is the unwrapped model; the state of `others` is the same on all processes.

        `made_with` becomes part of state.json: the settings under "essence", which must match to resume, and hardware
        and versions under "launch", which may differ at the cost of the last digits.
        """
        self.run = run
        self.folder = run.folder / "checkpoints"
        self.made_with = made_with
        self.progress = progress
        self.net = net
        self.optimizer = optimizer
        self.parts: dict[str, Stateful] = {"progress": progress, **others}
        # different on each process
        self.own: dict[str, Stateful] = {"loss": progress.loss, "random": RandomState(progress.accelerator.device)}
        self.cost = 0.0  # seconds, of the last one
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Interrupted):  # on all processes at the same step
            self.save()

    def is_due(self) -> bool:
        """Whether saving now stays within SHARE_OF_TIME; all processes must call it."""
        waited = time.monotonic() - self.saved_at
        return on_main_process(lambda: self.cost <= self.SHARE_OF_TIME * (waited + self.cost))

    # --- writing

    def save(self) -> None:
        """Write a checkpoint; all processes must call it, between two optimizer steps."""
        started = time.monotonic()
        ranks = gather_object([{name: part.state_dict() for name, part in self.own.items()}])
        if self.run.writes:
            folder = self.folder / f"step-{self.progress.step:010}{'-evaluated' if self.progress.evaluated else ''}"
            if not folder.exists():
                self._write(folder, ranks)
                for old in self._folders()[self.KEPT :]:
                    remove_folder(old)
            self.run.update_state(**self.progress.position, checkpoint=self.progress.step)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - started

    def _write(self, folder: Path, ranks: list[dict[str, Any]]) -> None:
        self.run.check_folder()
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
        """All checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    # --- reading

    def resume(self) -> list[str]:
        """Load the newest intact checkpoint, if any; all processes must call it. Returns notes for the user.

        Raises UserError if there are checkpoints but none is intact, ConfigError if it is of another run.
        """
        newest = on_main_process(self._newest_intact)
        if newest is None:
            return []
        name, files, notes = newest
        return [*notes, *self._load(name, files)]

    def _newest_intact(self) -> tuple[str, dict[str, bytes], list[str]] | None:
        remove_leftovers(self.folder)
        notes: list[str] = []
        for folder in self._folders():
            try:
                return folder.name, read_whole(folder), notes
            except DamagedError as error:
                damaged = folder.with_name(f"damaged-{folder.name}")
                notes.append(f"{folder} is damaged ({error}); renamed to {damaged.name}")
                remove_folder(damaged)
                folder.rename(damaged)
        last = self.run.state.get("checkpoint")
        if last is not None or any(self.folder.glob("damaged-*")):
            saved = "" if last is None else f" (the last one was saved at step {last})"
            missing = f"{self.folder}: no intact checkpoint{saved}."
            todo = "Restore one from a backup, or start over under another --run-name."
            raise UserError("\n".join([*notes, f"{missing} {todo}"]))
        return None

    def _load(self, name: str, files: Mapping[str, bytes]) -> list[str]:
        from safetensors.torch import load

        state = json.loads(files["state.json"])
        for setting, saved in state["essence"].items():
            current = self.made_with["essence"].get(setting)
            if current != without_booleans(setting, saved):
                raise ConfigError(
                    f"{self.folder / name}: saved with {setting} {saved}, but this run has {current}. A run resumes"
                    " only with the settings it started with."
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
                f"{self.folder / name}: intact, but not a possible state of this run: {error}. Remove it to resume from"
                " the previous checkpoint."
            ) from error
        current = self.made_with["launch"]
        changed = [
            f"{key} was {saved}, is {current[key]}"
            for key, saved in state["launch"].items()
            if key in current and saved != current[key]  # the keys depend on the device, which is one of them
        ]
        notes = [f"from {name}, epoch {self.progress.epoch}, batch {self.progress.batch:,}"]
        if changed:
            notes.append(f"no longer bit-identical: {'; '.join(changed)}")
        return notes


def read_whole(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint. Raises DamagedError if one differs from the manifest's length or checksum."""
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
                raise DamagedError(f"{name} does not match its checksum")
        json.loads(files["state.json"])
        for name in ("model.safetensors", "optimizer.safetensors"):
            load(files[name])
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    except (DamagedError, OSError, MemoryError):  # the latter two do not mean damage
        raise
    except Exception as error:  # whatever a parser raises
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return files


def _file_of(folder: Path, name: str) -> Path:
    """A file of a checkpoint; DamagedError if it is not a regular file, because reading a pipe would never end."""
    path = folder / name
    if Path(name).name != name or (path.exists() and not path.is_file()):
        raise DamagedError(f"{name} is not a regular file in the checkpoint")
    return path


def check_plausible(state: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for NaN, infinity and negative step counts."""

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
    """The state of an optimizer as named tensors ("3.exp_avg" belongs to parameter 3) and plain values."""
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
    """The inverse of `flatten`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["state"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
