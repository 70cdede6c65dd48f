"""Read a W&B run's log file, `run-<id>.wandb`: LevelDB's framing around the records of wandb.proto."""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record  # type: ignore[attr-defined]

HEADER = b":W&B\xe1\xbe\x00"  # ident, magic 0xBEE1 (little endian), version 0
BLOCK = 32 * 1024
PREFIX = struct.Struct("<IHB")  # CRC, length, chunk type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield every complete record; an incomplete one (the run is active or was killed) ends the file."""
    data = Path(path).read_bytes()
    if not data.startswith(HEADER):
        raise ValueError(f"{path}: not a W&B log")
    offset, record = len(HEADER), b""
    while offset + PREFIX.size <= len(data):
        left = BLOCK - offset % BLOCK
        if left < PREFIX.size:  # padding
            offset += left
            continue
        checksum, length, kind = PREFIX.unpack_from(data, offset)
        chunk = data[offset + PREFIX.size : offset + PREFIX.size + length]
        if len(chunk) < length:
            return
        # W&B: plain CRC-32 (IEEE) of type and data, not LevelDB's masked CRC-32C
        if zlib.crc32(bytes([kind]) + chunk) != checksum:
            raise ValueError(f"{path}: bad checksum at byte {offset}")
        offset += PREFIX.size + length
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            yield Record.FromString(record)


def _merge(items: Iterable[Any]) -> dict[str, Any]:
    """Fold history, config or summary items; `nested_key`, if set, is the path to the value."""
    merged: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        target = merged
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = json.loads(item.value_json)  # NaN and Infinity included
    return merged


def history(path: str | Path) -> list[dict[str, Any]]:
    """The logged rows, in order."""
    return [_merge(r.history.item) for r in read_records(path) if r.HasField("history")]


def config(path: str | Path) -> dict[str, Any]:
    """The settings of the run: those of wandb.init and later updates."""
    records = (r.run.config if r.HasField("run") else r.config for r in read_records(path))
    return _merge(item for record in records for item in record.update)


def summary(path: str | Path) -> dict[str, Any]:
    """The summary metrics of the run."""
    return _merge(item for r in read_records(path) for item in r.summary.update)


def metrics(path: str | Path) -> dict[str, MetricRecord]:
    """The metric definitions, by name or pattern."""
    defined = (r.metric for r in read_records(path) if r.HasField("metric"))
    return {m.name or m.glob_name: m for m in defined}


def exit_code(path: str | Path) -> int | None:
    """The exit code of the run; None if it did not finish."""
    codes = [r.exit.exit_code for r in read_records(path) if r.HasField("exit")]
    return codes[-1] if codes else None
