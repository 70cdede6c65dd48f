"""Several processes train like one, launches that would silently differ are refused, and failures are reported."""

import contextlib
import functools
import json
import math
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mnist import session
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.data.datasets import FILES
from mnist.data.splits import ImageData
from mnist.errors import ConfigError, UserError
from mnist.launch import processes
from mnist.launch.processes import (
    FLAGS,
    RANK_OF,
    check_environment,
    check_values,
    resolve_precision,
    waiting_for_others,
)
from mnist.launch.signals import Interrupted, Interruption
from mnist.runs.record import Record, pixels
from mnist.verify import largest_difference
from tests.conftest import (
    Launch,
    MainHere,
    ResumeHere,
    RunHere,
    metrics_of,
    reset_accelerate,
    state_of,
    user_environment,
)
from tests.data.test_folders import write_images
from tests.reporting.test_report import Reading, numbers_in
from tests.support import wandb_log, worker
from tests.support.namespaces import NAMESPACES
from tests.training.test_checkpoint import end_of

CONFIGS = PROJECT_FOLDER / "accelerate_configs"
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
FIXTURES = {2: "two_processes", 3: "three_processes", 4: "four_processes_with_every_case"}
TOLERANCE = {"float64": 1e-10, "float32": 2e-4}


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a user without an account, marked to find the processes."""
    return user_environment(folder, TEST_MARK=str(folder), **variables)


def marked_processes(folder: Path) -> list[int]:
    """The running processes with the mark."""
    pids = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TEST_MARK") == str(folder):
                pids.append(process.pid)
    return pids


def run(command: tuple[str, ...], folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    options: dict[str, Any] = {"cwd": PROJECT_FOLDER, "env": environment(folder, **variables), "timeout": 240}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@contextlib.contextmanager
def mirror() -> Iterator[tuple[str, list[str]]]:
    """A web server with MNIST's files; its address and the paths requested."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(PROJECT_FOLDER / "data" / "MNIST" / "raw"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", requests
        server.shutdown()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of this process alone."""
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    with worker.quick(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the same number of threads as one of two
        worker.train_most(folder)
        worker.evaluate_all(folder)
        worker.begin_run(folder)
    reset_accelerate()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two_processes(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes under `accelerate launch`, and their `output`."""
    folder = tmp_path_factory.mktemp("two")
    config = str(CONFIGS / "multi_cpu.yaml")
    shutil.copytree(one_process / "runs" / "begun-by-1", folder / "runs" / "begun-by-1")
    tasks = ("train_most", "evaluate_all", "begin_run", "resume_run", "train_seen", "train_unlike")
    done = run((*ACCELERATE, config, "--num_processes=2", "tests/support/worker.py", str(folder), *tasks), folder)
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def four_processes_with_every_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of four processes in all cases, which take half a minute on two cores."""
    folder = tmp_path_factory.mktemp("four")
    tasks = ("train_most", "train_slow", "evaluate_all")
    done = run((*TORCHRUN, "4", "tests/support/worker.py", str(folder), *tasks), folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def three_processes(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of three processes before one fails; `output`, `errors` and `seconds` show how that ends."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(one_process / "runs" / "begun-by-1", folder / "runs" / "begun-by-1")
    tasks = "download train_few evaluate_all log_to_wandb resume_run resume_identically fail_on_rank_1".split()
    with mirror() as (address, requests):
        done = run((*TORCHRUN, "3", "tests/support/worker.py", str(folder), *tasks), folder, MIRROR=address)
    (folder / "requests").write_text("\n".join(requests))
    (folder / "seconds").write_text(str(time.time() - float((folder / "reached").read_text())))
    (folder / "output").write_text(done.stdout)
    (folder / "errors").write_text(done.stderr)
    assert done.returncode != 0
    return folder


@pytest.mark.parametrize(
    ("processes", "name"),
    [
        *(("two_processes", name) for name in worker.CASES if name not in worker.SLOW),
        *(pytest.param("three_processes", name, marks=pytest.mark.slow) for name in worker.FEW),
        *(pytest.param("four_processes_with_every_case", name, marks=pytest.mark.slow) for name in worker.CASES),
    ],
)
def test_n_processes_train_to_the_weights_of_one_with_the_whole_batch(
    processes: str, name: str, one_process: Path, request: pytest.FixtureRequest, fresh_accelerate: None
) -> None:
    folder: Path = request.getfixturevalue(processes)
    if name in worker.SLOW:
        with worker.quick():
            worker.train_case(one_process, name)
    assert state_of(folder / "runs" / name)["step"] == worker.steps_of(name)
    difference = largest_difference(one_process / "runs" / name, folder / "runs" / name)
    assert difference < TOLERANCE[name.rpartition("-")[2]]
    lines = zip(metrics_of(one_process / "runs" / name), metrics_of(folder / "runs" / name), strict=True)
    for alone, together in lines:
        assert alone.keys() == together.keys()
        for key in (key for key in alone if not key.startswith("perf/")):
            # in float32 a prediction near a tie may change
            if "accuracy" not in key or name.endswith("float64"):
                assert together[key] == pytest.approx(alone[key], rel=1e-3), key


@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def test_evaluation_counts_each_image_once_whatever_the_number_of_processes(
    count: int, one_process: Path, request: pytest.FixtureRequest
) -> None:
    alone = json.loads((one_process / "evaluate-1-0.json").read_text())
    folder: Path = request.getfixturevalue(FIXTURES[count])
    for rank in range(count):
        results = json.loads((folder / f"evaluate-{count}-{rank}.json").read_text())
        for size in map(str, worker.SIZES):
            assert results[size][1:] == alone[size][1:]  # confusion matrix, most confident mistakes, temperature
            _, correct, images, confusion, _, calibration = results[size]
            assert (calibration is None) == (int(size) < 500)
            assert images == sum(map(sum, confusion)) == int(size)
            assert correct == sum(confusion[number][number] for number in range(10))
            assert results[size][0] == pytest.approx(alone[size][0], rel=1e-6)


def check_resumed(was: int, now: int, folder: Path, output: str, whole: Path) -> None:
    """A run of `was` processes that `now` processes resumed is like the run `whole` of one."""
    assert f"no longer bit-identical: num_processes was {was}, is {now}" in output
    assert f"batch       20 images ({-(-20 // now)} per process)" in output
    # a repeated or skipped image would change the weights
    run = folder / "runs" / f"begun-by-{was}"
    assert largest_difference(whole, run) < 2e-4
    newest = max((run / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["progress"]["images_seen"] == 2 * 507


def test_resuming_with_another_number_of_processes_repeats_and_skips_no_images(
    two_processes: Path, run_here: RunHere, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_here("whole", **worker.OTHER_NUMBER)
    capsys.readouterr()
    resume_here(two_processes / "runs" / "begun-by-2", max_steps=52)
    check_resumed(2, 1, two_processes, capsys.readouterr().out, whole)
    check_resumed(1, 2, two_processes, (two_processes / "output").read_text(), whole)


@pytest.mark.slow
def test_a_run_resumes_with_a_number_of_processes_that_does_not_divide_the_batch(
    three_processes: Path, run_here: RunHere
) -> None:
    whole = run_here("whole", **worker.OTHER_NUMBER)
    check_resumed(1, 3, three_processes, (three_processes / "output").read_text(), whole)


@pytest.mark.slow
def test_three_processes_resume_bit_identically(three_processes: Path) -> None:
    """Unlike that of two, their sum depends on how DistributedDataParallel arranges the gradients."""
    assert end_of(three_processes / "runs" / "cut") == end_of(three_processes / "runs" / "whole")


@pytest.mark.slow
def test_three_processes_write_one_run_one_row_per_event_and_one_wandb_run(three_processes: Path) -> None:
    folders = [path for path in (three_processes / "whole").iterdir() if not path.is_symlink()]
    assert len(folders) == 1
    assert [line["step"] for line in metrics_of(folders[0])] == [5, 9, 10, 15, 18]
    assert len(list(folders[0].glob("wandb/offline-run-*/run-*.wandb"))) == 1
    environment = json.loads((folders[0] / "environment.json").read_text())
    assert (environment["batch_size"], environment["global_batch_size"]) == (8, 24)


@pytest.mark.slow
def test_only_the_main_process_prints(three_processes: Path) -> None:
    output = (three_processes / "output").read_text()
    runs = len(worker.FEW) + 5  # a download, W&B, a whole run and two resumed ones; another one fails
    assert output.count("Test accuracy") == runs
    assert output.count("Recipe tutorial\n") == runs + 1
    assert output.count("launched    3 processes, each with 1 CPU thread\n") == runs + 1
    assert "24 images (8 per process)" in output


@pytest.mark.slow
def test_one_process_per_machine_downloads_the_data(three_processes: Path) -> None:
    assert (three_processes / "output").read_text().count("Downloading mnist into") == 1
    requests = Counter((three_processes / "requests").read_text().split())
    assert requests.keys() == {f"/{file}.gz" for file in FILES}
    assert max(requests.values()) <= 2  # torchvision checks for redirects first
    assert state_of(three_processes / "downloaded" / "latest")["status"] == "finished"


@pytest.mark.slow
def test_a_process_that_raises_ends_the_job_within_ten_seconds_with_its_error(three_processes: Path) -> None:
    assert float((three_processes / "seconds").read_text()) < 10
    errors = (three_processes / "errors").read_text()
    assert "ValueError: raised on purpose" in errors
    root_cause = errors[errors.index("Root Cause") :]  # torchrun's summary, the last on the screen
    assert "rank      : 1" in root_cause
    assert "ValueError: raised on purpose" in root_cause
    assert state_of(three_processes / "runs" / "for-ever")["status"] in ("failed", "interrupted")
    assert marked_processes(three_processes) == []


# --- metrics.jsonl, report, TensorBoard and W&B agree


@pytest.fixture
def seen(two_processes: Path) -> Path:
    """A run of two processes with W&B, TensorBoard and a report."""
    return two_processes / "runs" / "seen"


def test_metrics_are_the_same_in_metrics_jsonl_report_tensorboard_and_wandb(seen: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = metrics_of(seen)
    assert len(lines) == 5 * 2 + 2
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert len(list(seen.rglob("events.out.tfevents.*"))) == len(list(seen.rglob("report.html"))) == 1
    assert Record.read(seen).status == "finished"

    events = EventAccumulator(str(seen / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    keys = {key for line in lines for key in line} - {"step"}
    assert set(events.Tags()["scalars"]) == keys
    for key in keys:
        expected = [(line["step"], struct.unpack("f", struct.pack("f", line[key]))[0]) for line in lines if key in line]
        assert [(it.step, it.value) for it in events.Scalars(key)] == expected, key  # stored in single precision

    (log,) = seen.rglob("run-*.wandb")
    rows = [{key: row[key] for key in row if key[0] != "_"} for row in wandb_log.history(log)]
    assert rows[: len(lines)] == lines
    assert len(rows) == len(lines) + 1  # and the final tables

    page = (seen / "report.html").read_text()
    (numbers,) = numbers_in(page)
    assert numbers["evaluations"] == [line for line in lines if "test/loss" in line]
    assert numbers["losses"] == [line for line in lines if "test/loss" not in line]
    text = Reading(page).text
    assert " finished" in text
    for line in numbers["evaluations"]:
        for split in ("train", "val", "test"):
            assert f"{line[f'{split}/loss']:.4f}" in text
            assert f"{100 * line[f'{split}/accuracy']:.2f} %" in text


def test_the_confusion_matrix_is_the_same_everywhere_and_adds_up(seen: Path) -> None:
    last = metrics_of(seen)[-1]
    record = Record.read(seen)
    assert record.evaluation is not None
    counts = record.evaluation["confusion"]["counts"]
    correct = sum(counts[number][number] for number in range(10))
    assert sum(map(sum, counts)) == sum(record.evaluation["images"]) == 1003
    assert correct == sum(record.evaluation["correct"])
    assert correct / 1003 == last["test/accuracy"]
    for number, row in enumerate(counts):
        assert last[f"test/class_accuracy/{number}"] == row[number] / sum(row)

    chart, mistakes, examples = (wandb_table(seen, name) for name in ("confusion", "mistakes", "examples"))
    assert sum(row[2] for row in chart["data"]) == 1003
    assert sum(row[2] for row in chart["data"] if row[0] == row[1]) == correct
    assert len(mistakes["data"]) == min(40, 1003 - correct)
    confidences = [row[3] for row in mistakes["data"]]
    assert confidences == sorted(confidences, reverse=True)
    assert all(row[1] != row[2] != row[4] for row in mistakes["data"])
    assert [row[1] for row in examples["data"]] == [str(digit) for digit in range(10)]
    assert len(examples["columns"]) == 2 + 2  # image, true class, one prediction per epoch

    page = Reading((seen / "report.html").read_text())
    cells = [tag for tag, attributes in page.tags if tag == "td" and "predicted as" in (attributes.get("title") or "")]
    assert len(cells) == 100
    assert f"{1003 - correct} of 1,003 images misclassified" in page.text


def wandb_table(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.rglob(f"{name}*.table.json")
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def test_mistakes_and_examples_hold_the_images_at_their_index(seen: Path, digits: ImageData) -> None:
    record = Record.read(seen)
    assert record.evaluation is not None
    for shown in (*record.evaluation["mistakes"], *record.evaluation["examples"]):
        assert shown["truth"] == digits.test.labels[shown["place"]]
        image = torch.tensor(list(pixels(shown["image"]).tobytes()), dtype=torch.uint8).view(28, 28)
        assert torch.equal(image, digits.test.images[shown["place"]])


def test_the_report_loads_nothing_from_outside(seen: Path) -> None:
    page = (seen / "report.html").read_text()
    for tag, attributes in Reading(page).tags:
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), (tag, address)
    assert not re.search(r"url\((?!#)|@import", page)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("flag", "differ in --learning-rate: 0.1 in process 1 on {host}, 0.001 in process 0 on {host}."),
        ("precision", "differ in precision: bf16 in process 1 on {host}, no in process 0 on {host}."),
    ],
)
def test_processes_with_different_settings_or_precision_are_refused_by_all(
    case: str, message: str, two_processes: Path
) -> None:
    for rank in range(2):
        assert message.format(host=socket.gethostname()) in (two_processes / f"{case}-{rank}").read_text()
    assert not (two_processes / "unlike").exists()  # no run was started


@pytest.mark.skipif(not NAMESPACES, reason="needs Linux's namespaces")
@pytest.mark.slow
@pytest.mark.parametrize(("images", "message"), [(8, "dataset_md5: [0-9a-f]{32}"), (6, "train_images: 10")])
def test_a_different_copy_of_the_data_on_another_machine_is_refused(images: int, message: str, tmp_path: Path) -> None:
    for folder, first, count in (("here", 0, 8), ("there", 100, images)):
        for number, name in enumerate(("cat", "dog")):
            write_images(tmp_path / folder / name, count, first=first + 50 * number)
    here, there = tmp_path / "here", tmp_path / "there"
    flags = f"--dataset={here} --data-dir={tmp_path} --output-dir={tmp_path / 'runs'} --batch-size=4 --trackers=none"
    train = f"exec {sys.executable} train.py {flags}"
    mounted = f'exec unshare --map-root-user --mount sh -c "mount --bind {there} {here} && {train}"'
    script = f'if [ "$RANK" = 1 ]; then {mounted}; else {train}; fi'
    done = run((*TORCHRUN, "2", "--no-python", "sh", "-c", script), tmp_path)
    assert done.returncode == 1
    assert re.search(rf"ConfigError: The processes of this job differ in {message} in process 1", done.stderr)
    assert "lost its connection" not in done.stderr
    assert not (tmp_path / "runs").exists()


# --- two machines: network namespaces connected by a veth pair


class Host:
    """A network namespace with its own name, address and /etc/hosts."""

    def __init__(self, name: str, address: str, hosts: Path) -> None:
        self.name, self.address = name, address
        setup = f"hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo && exec sleep 1000"
        command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", setup]
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"\n"
        self.card = f"card-{name}"

    def shell(self, script: str) -> list[str]:
        inside = f"cd {PROJECT_FOLDER} && {script}"
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", "sh", "-c", inside]

    def launch(self, command: str, folder: Path) -> "subprocess.Popen[str]":
        folder.mkdir()
        output = (folder / "output").open("w")
        script = self.shell(f"exec {command}")
        return subprocess.Popen(script, env=environment(folder), stdout=output, stderr=output, text=True)


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Two machines, with host names as the rendezvous (the parameter) needs them."""
    allowed = subprocess.run("unshare --net --uts --mount true".split(), capture_output=True, text=True, check=False)
    if allowed.returncode != 0 or shutil.which("ip") is None:
        pytest.skip(f"network namespaces need root and iproute2 {allowed.stderr}")
    addresses = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
    for name in addresses:
        # c10d resolves the other machine's name; Debian and Ubuntu resolve their own to 127.0.1.1
        known = {"localhost": "127.0.0.1"} | (addresses if request.param == "c10d" else {name: "127.0.1.1"})
        lines = [f"{address} {known_name}" for known_name, address in known.items()]
        (tmp_path / f"hosts-{name}").write_text("\n".join(lines) + "\n")
    alpha, beta = (Host(name, address, tmp_path / f"hosts-{name}") for name, address in addresses.items())
    pair = f"ip link add card-alpha netns {alpha.holder.pid} type veth peer name card-beta netns {beta.holder.pid}"
    subprocess.run(pair.split(), check=True)
    for host in (alpha, beta):
        script = f"ip addr add {host.address}/24 dev {host.card} && ip link set {host.card} up"
        subprocess.run(host.shell(script), check=True)
    yield alpha, beta
    for host in (alpha, beta):
        host.holder.kill()
        host.holder.wait()


def documented_commands(rendezvous: str) -> list[str]:
    """The two commands of docs/distributed.md, with this test's address."""
    page = (PROJECT_FOLDER / "docs" / "distributed.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"accelerate launch --config_file accelerate_configs/multi_node_cpu.yaml .* train.py", page)
    commands = [line for line in lines if ("--rdzv_backend c10d" in line) == (rendezvous == "c10d")]
    assert len(commands) == 2
    python = f"{sys.executable} -m accelerate.commands.launch"
    return [line.replace("accelerate launch", python).replace("10.0.0.1", "10.77.0.1") for line in commands]


@pytest.mark.parametrize(
    ("hosts", "rendezvous", "killed"), [("static", "static", 0), ("c10d", "c10d", 1)], indirect=["hosts"]
)
@pytest.mark.slow
def test_two_machines_train_like_one_and_if_one_is_lost_the_other_ends(
    rendezvous: str, killed: int, hosts: tuple[Host, Host], one_process: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / host.name for host in hosts]
    launchers = []
    for host, folder, command in zip(hosts, folders, documented_commands(rendezvous), strict=True):
        script = command.replace("train.py", f"tests/support/worker.py {folder} train_few train_for_ever")
        launchers.append(host.launch(script, folder))

    def logged() -> bool:
        return any(path.stat().st_size for folder in folders for path in folder.glob("runs/for-ever/metrics.jsonl"))

    deadline = time.monotonic() + 120
    while not logged():
        alive = all(launcher.poll() is None for launcher in launchers)
        assert alive and time.monotonic() < deadline, [(folder / "output").read_text() for folder in folders]  # noqa: PT018
        time.sleep(0.2)
    main = next(folder for folder in folders if (folder / "runs").exists())
    for name in worker.FEW:
        assert largest_difference(one_process / "runs" / name, main / "runs" / name) < 1e-10
    assert re.search(r"2 processes on 2 machines \((alpha|beta) 1, (alpha|beta) 1\)", (main / "output").read_text())

    lost, left = hosts[killed], 1 - killed
    subprocess.run(lost.shell(f"ip link set {lost.card} down"), check=True)  # before it can disconnect
    for pid in marked_processes(folders[killed]):
        psutil.Process(pid).kill()
    started = time.monotonic()
    code = launchers[left].wait(timeout=60)
    assert time.monotonic() - started < 8 + 15  # --timeout-seconds and the launcher
    assert code != 0
    assert "lost its connection to the other processes" in (folders[left] / "output").read_text()
    launchers[killed].wait(timeout=10)
    assert marked_processes(folders[0]) == marked_processes(folders[1]) == []


# --- launches that would silently do something else

JOINED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        ({}, ("cpu", 0)),
        ({}, ("cuda", 1)),
        (JOINED, ("cpu", 0)),
        (JOINED, ("cuda", 2)),
        ({"WORLD_SIZE": "1"}, ("cuda", 4)),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, ("cpu", 0)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "MASTER_ADDR": "alpha"}, ("cpu", 0)),
        ({"ACCELERATE_USE_FSDP": "false"}, ("cpu", 0)),
    ],
)
def test_a_consistent_environment_is_accepted(variables: dict[str, str], device: tuple[str, int]) -> None:
    check_environment(variables, *device)


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            ("cpu", 0),
            r"WORLD_SIZE=2 .* without RANK, MASTER_ADDR .*multi_cpu.yaml --num_proc.* 2 ",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("cpu", 0), "without MASTER_ADDR they"),
        ({**JOINED, "LOCAL_RANK": ""} | {}, ("mps", 1), "WORLD_SIZE=2: several .* Mac.*ACCELERATE_USE_CPU=true"),
        ({k: v for k, v in JOINED.items() if k != "LOCAL_RANK"}, ("cuda", 2), "LOCAL_RANK .*multi_gpu.yaml"),
        (JOINED, ("cuda", 1), "LOCAL_WORLD_SIZE=2: more processes on this machine than its 1 cuda"),
        ({**JOINED, "RANK": "2"}, ("cpu", 0), "RANK=2: there are only WORLD_SIZE=2"),
        ({**JOINED, "WORLD_SIZE": "two"}, ("cpu", 0), "WORLD_SIZE=two in the environment: must be a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("cpu", 0), "SLURM_STEP_NUM_TASKS=4 .* 4 train.py"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, ("cpu", 0), "or unset OMPI_COMM_WORLD_SIZE to"),
        ({"WORLD_SIZE": "1", "PMI_SIZE": "4"}, ("cpu", 0), "WORLD_SIZE=1, but PMI_SIZE=4: .* unset PMI_SIZE and PMI_R"),
        ({**JOINED, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "1"}, ("cuda", 2), "LOCAL_RANK=2: more processes"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
            ("cuda", 4),
            "OMPI_COMM_WORLD_SIZE=4 .*WORLD_SIZE",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, ("cpu", 0), "The launcher asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ("cuda", 8), "The launcher asks for DEEPSPEED"),
    ],
)
def test_an_inconsistent_environment_is_refused_with_what_to_do(
    variables: dict[str, str], device: tuple[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        check_environment(variables, *device)


@pytest.mark.parametrize("name", [*FLAGS, "LOCAL_RANK", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_DYNAMO_BACKEND"])
def test_a_value_that_accelerate_would_end_in_a_traceback_about_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=abc in the environment"):
        check_values({name: "abc"})
    check_values({name: {"LOCAL_RANK": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}.get(name, "no")})


def test_a_precision_that_the_device_lacks_is_refused_whoever_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for device, has_bf16, precision in (("cuda", True, "bf16"), ("cuda", False, "no"), ("cpu", True, "no")):
        assert resolve_precision("auto", device, has_bf16) == precision
    with pytest.raises(ConfigError, match="--mixed-precision fp16: has no effect on a CPU"):
        resolve_precision("fp16", "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "cuda") == "fp16"  # the launcher's
    assert resolve_precision(None, "cuda") == "fp16"
    with pytest.raises(ConfigError, match="The launcher's mixed precision fp16: has no effect"):
        resolve_precision(None, "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="The launcher's mixed precision fp8: not supported"):
        resolve_precision(None, "cuda")
    with pytest.raises(ConfigError, match=r"--mixed-precision bf16: needs a GPU of compute capability 8\.0"):
        resolve_precision("bf16", "cuda", has_bf16=False)


def test_processes_on_gpus_agree_on_signals_without_the_gpus() -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        job: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
        interruption = Interruption(job, before_exit=lambda **_: None)
        assert interruption.check() < 1
        interruption.number = signal.SIGTERM
        with pytest.raises(Interrupted):
            interruption.check()
    finally:
        torch.distributed.destroy_process_group()


def test_a_world_size_without_a_launcher_is_refused_before_waiting_for_others(main_here: MainHere) -> None:
    done = main_here("--trackers=none", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: WORLD_SIZE=2")
    assert processes.launch_command(2, "cpu") in done.stderr


@pytest.mark.parametrize("size", RANK_OF)
def test_jobs_of_any_launcher_decode_before_their_processes_join(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise UserError("decoding")

    monkeypatch.setattr(session, "decode_folder", decode)
    monkeypatch.setenv(size, "2")
    with pytest.raises(UserError, match="decoding"):
        session.start(TrainConfig())


HOSTILE = {
    "precision": ({"distributed_type": "NO", "num_processes": 1, "mixed_precision": "fp16"}, "fp16: has no effect"),
    "replicas": (
        {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "mixed_precision": "bf16"},
        "launched    2 processes, each with",
    ),
    "alone": ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "launched    1 process with"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_users_default_accelerate_config_changes_nothing_silently(name: str, launch: Launch, tmp_path: Path) -> None:
    config, expected = HOSTILE[name]
    home = tmp_path / "home" / ".cache" / "huggingface" / "accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE"} | config))
    small = ("--limit-train-images=200", "--limit-test-images=50", "--epochs=1", "--trackers=none")
    done = launch(*small, f"--output-dir={tmp_path / 'runs'}", HF_HOME=str(tmp_path / "home/.cache/huggingface"))
    refused = name == "precision"
    assert (done.returncode != 0) == refused
    assert expected in (done.stderr if refused else done.stdout)
    if refused:  # before the launcher's message
        assert done.stderr.index(expected) < done.stderr.index("CalledProcessError")
    assert (tmp_path / "runs").exists() != refused
    assert ("precision   bf16" in done.stdout) == (name == "replicas")


@pytest.mark.slow
def test_torchrun_with_one_process_trains_like_plain_python(launch: Launch, tmp_path: Path) -> None:
    small = ("--limit-train-images=300", "--limit-test-images=50", "--epochs=1", "--trackers=none", "--model=cnn")
    commands = {"plain": ("train.py",), "torchrun": (*TORCHRUN[1:], "1", "train.py")}
    for name, command in commands.items():
        done = launch(*small, f"--output-dir={tmp_path / 'runs'}", f"--run-name={name}", command=command)
        assert done.returncode == 0, done.stderr
        assert "launched    1 process with" in done.stdout
    assert largest_difference(tmp_path / "runs" / "plain", tmp_path / "runs" / "torchrun") == 0


def test_wrong_usage_is_reported_by_the_first_process_before_the_others_end(tmp_path: Path) -> None:
    """Launchers end all processes when one ends, so the message appears once."""
    flags = {"--epochs=0": "--epochs 0: must be at least 1", "--epocs=3": "--epocs"}
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    processes = {
        (flag, rank): subprocess.Popen(
            (sys.executable, "train.py", flag, f"--output-dir={tmp_path}"),
            cwd=PROJECT_FOLDER,
            env=environment(tmp_path, **variables, RANK=rank, LOCAL_RANK=rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for flag in flags
        for rank in "01"
    }
    for flag, message in flags.items():
        first, second = (processes[flag, rank] for rank in "01")
        assert message in first.communicate(timeout=60)[1]
        assert second.poll() is None
    for process in processes.values():
        process.communicate(timeout=60)
        assert process.returncode == 2


def test_the_configs_hold_no_rank_no_address_and_their_own_launch_command() -> None:
    names = {path.name for path in CONFIGS.glob("*")}
    assert names == {f"{name}.yaml" for name in "cpu multi_cpu single_gpu multi_gpu multi_node multi_node_cpu".split()}
    for name in names:
        text = (CONFIGS / name).read_text(encoding="utf-8")
        head, body = text.split("\n\n", 1)
        assert f"accelerate launch --config_file accelerate_configs/{name}" in head
        assert "train.py" in head
        assert not {"machine_rank", "main_process_ip", "num_machines"} & yaml.safe_load(text).keys()
        assert all("# " in line for line in body.splitlines() if line)
        load_config_from_file(str(CONFIGS / name))  # Accelerate's own reader: unknown keys are errors


def test_a_lost_process_is_reported_and_other_errors_pass_through() -> None:
    lost = (RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1"),)
    for error in (*lost, torch.distributed.DistNetworkError("The client socket has timed out")):
        with pytest.raises(UserError, match=r"lost its connection .*--timeout-seconds 15"), waiting_for_others(15):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), waiting_for_others(15):
        raise RuntimeError("a bug")


def test_the_loopback_is_not_an_interface_toward_another_machine() -> None:
    assert processes.interface_towards("127.0.0.1") is None
    assert processes.interface_towards("no such host.") is None


def test_the_global_batch_is_split_or_refused_with_both_numbers() -> None:
    assert TrainConfig(global_batch_size=64).batch_sizes(4) == (16, 64)
    assert TrainConfig(batch_size=10).batch_sizes(3) == (10, 30)
    with pytest.raises(ConfigError, match="--global-batch-size 64: not divisible by the 3 processes"):
        TrainConfig(global_batch_size=64).batch_sizes(3)
    assert TrainConfig(global_batch_size=64, resume="x").batch_sizes(3) == (22, 64)


@pytest.mark.slow
def test_dynamo_backend_inductor_gives_the_same_names_and_nearly_the_same_weights(
    launch: Launch, tmp_path: Path
) -> None:
    small = ("--limit-train-images=1000", "--limit-test-images=100", "--epochs=2", "--trackers=none")
    trained: dict[str, Any] = {}
    for name, options in (("plain", ()), ("compiled", ("--dynamo_backend=inductor",))):
        for count in (1, 2):
            config = str(CONFIGS / ("cpu.yaml" if count == 1 else "multi_cpu.yaml"))
            command = ("-m", "accelerate.commands.launch", "--config_file", config, f"--num_processes={count}")
            flags = (f"--output-dir={tmp_path / 'runs'}", f"--run-name={name}-{count}", "--global-batch-size=20")
            done = launch(*small, *flags, command=(*command, *options, "train.py"))
            assert done.returncode == 0, done.stderr
            assert ("compiler    inductor" in done.stdout) == (name == "compiled")
            trained[f"{name}-{count}"] = tmp_path / "runs" / f"{name}-{count}"
    for name in ("compiled-1", "compiled-2", "plain-2"):
        assert largest_difference(trained["plain-1"], trained[name]) < 1e-3


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    done = run((*TORCHRUN, "2", "tests/support/worker.py", str(tmp_path), "hang_on_rank_1"), tmp_path)
    assert done.returncode != 0
    stopped, ended = float((tmp_path / "reached").read_text()), time.time()
    assert 8 <= ended - stopped < 8 + 30 + 10  # --timeout-seconds, torchrun's grace period, and its end
    assert "Process 0 lost its connection" in done.stderr
    assert marked_processes(tmp_path) == []


@pytest.mark.slow
def test_bf16_trains_the_tutorial_to_within_a_point_of_float32(launch: Launch, tmp_path: Path) -> None:
    accuracy = {}
    for precision in ("no", "bf16"):
        flags = (f"--mixed-precision={precision}", f"--output-dir={tmp_path}", f"--run-name={precision}")
        done = launch(*flags, "--trackers=none", command=("train.py",))
        assert done.returncode == 0, done.stderr
        accuracy[precision] = metrics_of(tmp_path / precision)[-1]["test/accuracy"]
    assert abs(accuracy["bf16"] - accuracy["no"]) < 0.01
