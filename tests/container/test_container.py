"""The container's entrypoint and health check, the manifests, and every command line in the docs.

`make image-test` builds and runs the image itself.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import entrypoint
import healthcheck
import jsonschema
import kubernetes_validate
import lock
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from entrypoint import UsageError, exit_code, flag_value, plan, state_files, trained_state
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import PROJECT_FOLDER
from mnist.launch.signals import EXIT_CODES
from mnist.runs.folder import Run
from tests.conftest import RunHere, state_of, user_environment, wait_for

DOCKER, DEPLOY = PROJECT_FOLDER / "docker", PROJECT_FOLDER / "deploy"
TRAIN = (sys.executable, "train.py")
KUBERNETES = "1.34"
LONG = ("--trackers=none", "--epochs=100000", "--limit-train-images=2000", "--limit-test-images=100", "--log-every=10")
TWO_MACHINES = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "node-0"}


def launched(processes: int, config: str, *flags: str) -> tuple[str, ...]:
    return (
        *("accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml", "--num_processes"),
        *(str(processes), *flags, "train.py"),
    )


# --- the entrypoint


@pytest.mark.parametrize(
    ("visible", "variables", "command"),
    [
        (0, {}, TRAIN),
        (1, {}, TRAIN),
        (4, {}, launched(4, "multi_gpu")),
        (8, {}, launched(8, "multi_gpu")),
        (0, {"NUM_PROCESSES": "2"}, launched(2, "multi_cpu")),
        (8, {"NUM_PROCESSES": "2"}, launched(2, "multi_gpu")),
        (8, {"NUM_PROCESSES": "1"}, TRAIN),
        (4, {"NUM_PROCESSES": ""}, launched(4, "multi_gpu")),  # as Compose passes unset variables
        (4, {"MIXED_PRECISION": "bf16"}, launched(4, "multi_gpu", "--mixed_precision", "bf16")),
        (4, {"MIXED_PRECISION": ""}, launched(4, "multi_gpu")),
        (4, {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, launched(4, "multi_gpu")),  # a TrainJob of one machine
        (4, {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, launched(2, "multi_gpu")),
        (4, {"PET_NPROC_PER_NODE": "2", "NUM_PROCESSES": "3"}, launched(3, "multi_gpu")),
    ],
)
def test_the_launcher_depends_on_visible_gpus_and_variables(
    visible: int, variables: dict[str, str], command: tuple[str, ...]
) -> None:
    chosen = plan(["--recipe", "cnn"], variables, visible)
    assert chosen.command == (*command, "--recipe", "cnn")
    assert chosen.launched == (command != TRAIN)
    assert plan([], variables, visible).command == command


@pytest.mark.parametrize(("visible", "processes"), [(0, "1"), (1, "1"), (8, "8")])
def test_torchrun_joins_several_machines_with_a_process_per_gpu(visible: int, processes: str) -> None:
    chosen = plan(["--epochs=1"], TWO_MACHINES | {"MIXED_PRECISION": "bf16"}, visible)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes)
    assert chosen.command == (*launcher, "train.py", "--epochs=1")
    assert chosen.launched
    assert chosen.variables == {"ACCELERATE_MIXED_PRECISION": "bf16"}


def test_a_single_process_gets_the_precision_in_a_variable() -> None:
    assert plan([], {"MIXED_PRECISION": "bf16"}, 1).variables == {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert plan([], {}, 1).variables == {}


def test_help_is_shown_once_and_other_commands_run_unchanged() -> None:
    assert plan(["--help"], {}, 8).command == (*TRAIN, "--help")
    assert plan(["mnist", "predict", "--top", "1", "seven.png"], {"NUM_PROCESSES": "x"}, 8) == entrypoint.Plan(
        ("mnist", "predict", "--top", "1", "seven.png")
    )


@pytest.mark.parametrize(
    ("visible", "variables", "words"),
    [
        (0, {"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: must be a whole number"),
        (0, {"NUM_PROCESSES": "-1"}, "NUM_PROCESSES=-1: must"),
        (4, {"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two: must"),
        (4, {"NUM_PROCESSES": "1.5"}, "NUM_PROCESSES=1.5: must"),
        (4, {"NUM_PROCESSES": "5"}, r"NUM_PROCESSES=5: only 4 GPU\(s\) are visible. Use at most 4"),
        (1, {"PET_NPROC_PER_NODE": "2"}, "PET_NPROC_PER_NODE=2: only 1 GPU"),
        (0, {"MIXED_PRECISION": "fp8"}, "MIXED_PRECISION=fp8: unknown. Known: no, fp16, bf16"),
        (0, {"PET_NNODES": "1:4"}, "PET_NNODES=1:4: must be a whole number"),
        (8, {"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES=2: requires PET_MASTER_ADDR"),
    ],
)
def test_an_invalid_variable_is_refused_with_advice(visible: int, variables: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan([], variables, visible)


@pytest.mark.parametrize("visible", [0, 1, 4, 8])
def test_accelerate_accepts_the_launch_command(visible: int) -> None:
    command = plan(["--epochs", "1"], {"NUM_PROCESSES": str(visible or 2)}, visible).command
    if visible != 1:
        arguments = launch_command_parser().parse_args(command[2:])
        assert arguments.training_script == "train.py"
        assert arguments.num_processes == (visible or 2)
        assert load_config_from_file(str(PROJECT_FOLDER / arguments.config_file)).distributed_type == "MULTI_GPU"


def test_torch_counts_gpus_only_if_there_is_a_device_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entrypoint, "DEVICE_FILES", ("null",))
    assert entrypoint.visible_devices() == 0
    assert "torch sees no GPU: CUDA_VISIBLE_DEVICES hides them" in capsys.readouterr().err
    monkeypatch.setattr(entrypoint, "DEVICE_FILES", ("no-such-device*",))
    monkeypatch.setattr(entrypoint, "COUNT_DEVICES", "raise SystemExit('asked')")
    assert entrypoint.visible_devices() == 0


def test_the_wandb_key_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert entrypoint.wandb_key({"WANDB_API_KEY_FILE": str(file)}) == {"WANDB_API_KEY": "secret"}
    assert entrypoint.wandb_key({"WANDB_API_KEY_FILE": str(file), "WANDB_API_KEY": "mine"}) == {}
    assert entrypoint.wandb_key({}) == {}
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        entrypoint.wandb_key({"WANDB_API_KEY_FILE": str(file)})
    file.write_bytes(b"a\0b")
    with pytest.raises(UsageError, match="must contain only the key"):
        entrypoint.wandb_key({"WANDB_API_KEY_FILE": str(file)})
    with pytest.raises(UsageError, match=r"WANDB_API_KEY_FILE=.*missing: cannot be read"):
        entrypoint.wandb_key({"WANDB_API_KEY_FILE": str(tmp_path / "missing")})


@pytest.mark.parametrize("words", ["--run-name x", "--run-name=x", "--run_name x", "--run-name=y --run-name=x"])
def test_flags_are_read_as_train_py_reads_them(words: str) -> None:
    assert flag_value(["--epochs", "1", *words.split(), "--resume", "auto"], "--run-name") == "x"
    assert flag_value(words.split(), "--resume") is None


def test_the_state_is_that_of_the_run_named_by_the_flags(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    folder = f"--output-dir={tmp_path}"
    assert sorted(state_files([folder])) == [tmp_path / "a" / "state.json", tmp_path / "b" / "state.json"]
    assert state_files([folder, "--run-name=b", "--resume=auto"]) == [tmp_path / "b" / "state.json"]
    assert state_files(["--resume", str(tmp_path / "a")]) == [tmp_path / "a" / "state.json"]
    assert state_files([folder, "--run-name=c"]) == []


def test_only_runs_trained_by_this_container_count(tmp_path: Path) -> None:
    def write(name: str, status: str, host: str = socket.gethostname()) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "state.json").write_text(json.dumps({"status": status, "process": f"8 on {host}"}))

    def status(*flags: str) -> object:
        return entrypoint.trained_state([f"--output-dir={tmp_path}", *flags], before).get("status")

    write("earlier", "finished")
    before = {path: path.stat().st_mtime_ns for path in state_files([f"--output-dir={tmp_path}"])}
    assert status() is None
    assert status("--run-name=earlier") is None  # unchanged
    write("theirs", "finished", host="another")
    assert status() is None
    assert status("--run-name=theirs") == "finished"  # named explicitly, e.g. on the second machine
    write("mine", "failed")
    write("theirs", "finished", host="another")
    assert status() == "failed"


ODD = '{"status": "running", "process": "8 on here", "time": "2026-01-01T00:00:00+0100", "step": 1e999}'
FOREIGN = ("", "[]", "5", "[" * 100_000, '{"status": "running"}', '{"status": "running", "process": 5}', "\xff", ODD)


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_state_json_has_no_effect_on_exit_code_and_health(content: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    flags = [f"--output-dir={tmp_path}"]
    before = dict.fromkeys(state_files(flags), 0)
    (tmp_path / "foreign" / "state.json").write_text(content, encoding="latin-1")
    (tmp_path / "endless").mkdir()
    os.mkfifo(tmp_path / "endless" / "state.json")
    state = trained_state(flags, before)
    assert exit_code(state, 0, []) == 0
    assert healthcheck.verdict(tmp_path, "here", 0, 60)[0]
    assert exit_code({"status": "finished", "exit_code": True}, 3, []) == 3


def test_the_exit_code_is_that_of_the_run_not_of_the_launcher() -> None:
    assert exit_code({"status": "finished", "exit_code": 0}, 1, []) == 0
    assert exit_code({"status": "interrupted", "exit_code": 143}, 1, [15]) == 143
    assert exit_code({"status": "interrupted", "exit_code": 75}, -10, [10]) == 75
    assert exit_code({"status": "failed", "exit_code": 1}, 1, []) == 1
    assert exit_code({"status": "running", "exit_code": None}, 1, []) == 1  # its main process was killed
    assert exit_code({}, 1, [15]) == 143  # before it had begun
    assert exit_code({}, -9, []) == 137
    assert exit_code({}, 0, []) == 0


@contextlib.contextmanager
def container(folder: Path, *flags: str, **variables: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """The entrypoint as in the image, and its output file."""
    output = folder / f"output {len(list(folder.glob('output*')))}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {name: value for name, value in user_environment(folder).items() if not name.startswith("PET_")}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, DOCKER / "entrypoint.py", f"--output-dir={folder / 'runs'}", *flags],
            cwd=PROJECT_FOLDER,
            env=clean | {"PATH": path} | variables,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process, output
    finally:
        for pid in [process.pid, *entrypoint.children_of(process.pid)]:
            for child in entrypoint.children_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_signal_is_forwarded_and_the_container_exits_with_the_runs_code(tmp_path: Path) -> None:
    with container(tmp_path, *LONG, "--run-name=x", NUM_PROCESSES="2") as (process, output):
        wait_for(tmp_path / "runs" / "x" / "metrics.jsonl", process, output)
        process.send_signal(signal.SIGUSR1)  # kills launchers
        assert process.wait(timeout=40) == 75, output.read_text()
    state = state_of(tmp_path / "runs" / "x")
    assert (state["status"], state["error"], state["checkpoint"]) == ("interrupted", "SIGUSR1", state["step"])
    assert "0 GPUs are visible: accelerate launch" in output.read_text()


def test_a_signal_before_training_sets_the_exit_code_of_the_container(tmp_path: Path) -> None:
    with container(tmp_path, *LONG, NUM_PROCESSES="2") as (process, output):
        wait_for(output, process, output)
        time.sleep(0.5)  # the launcher is loading
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == EXIT_CODES[signal.SIGTERM], output.read_text()


@pytest.mark.slow
def test_a_killed_process_makes_the_container_fail(tmp_path: Path) -> None:
    with container(tmp_path, *LONG, "--run-name=x", NUM_PROCESSES="2") as (process, output):
        wait_for(tmp_path / "runs" / "x" / "metrics.jsonl", process, output)
        (launcher,) = entrypoint.children_of(process.pid)
        os.kill(max(entrypoint.children_of(launcher)), signal.SIGKILL)
        assert process.wait(timeout=60) == 1, output.read_text()


@pytest.mark.slow
def test_two_containers_train_as_one_job(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = ("--trackers=none", "--limit-train-images=200", "--limit-test-images=100", "--epochs=1", "--run-name=x")
    variables = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(container(tmp_path, *flags, **variables, PET_NODE_RANK=rank)) for rank in "01"]
        for process, output in both:
            assert process.wait(timeout=120) == 0, output.read_text()
    environment = json.loads((tmp_path / "runs" / "x" / "environment.json").read_text())
    assert (environment["num_processes"], environment["steps_per_epoch"]) == (2, 10)


def test_wrong_usage_exits_with_2_and_an_unknown_command_with_127(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCKER / "entrypoint.py")]
    variables = os.environ | {"NUM_PROCESSES": "many"}
    wrong = subprocess.run(command, env=variables, cwd=PROJECT_FOLDER, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("entrypoint: NUM_PROCESSES=many: must be a whole number")
    for flag, message in (("--epochs=0", "entrypoint: --epochs 0: "), ("--no-such-flag", "--no-such-flag")):
        variables = os.environ | {"NUM_PROCESSES": "2"}  # by a launcher, which would end with 1
        wrong = subprocess.run([*command, flag], env=variables, cwd=PROJECT_FOLDER, capture_output=True, text=True)
        assert wrong.returncode == 2
        assert message in wrong.stderr
        assert "Traceback" not in wrong.stderr
    unknown = subprocess.run([*command, "no-such-command"], cwd=PROJECT_FOLDER, capture_output=True, text=True)
    assert (unknown.returncode, unknown.stderr) == (127, "entrypoint: no-such-command: No such file or directory\n")


# --- the heartbeat


@pytest.fixture
def written_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step in each state.json written."""
    steps: list[int] = []
    update_state = Run.update_state

    def watched(self: Run, **values: Any) -> None:
        update_state(self, **values)
        steps.append(self.state["step"])

    monkeypatch.setattr(Run, "update_state", watched)
    return steps


def test_training_and_evaluation_send_heartbeats(
    run_here: RunHere, written_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist.runs.folder.SECONDS_BETWEEN_HEARTBEATS", 0.0)
    run_here("x")  # 20 steps, 2 batches of evaluation, a checkpoint, the end
    assert written_steps == [0, *range(1, 21), 20, 20, 20, 20]


def test_heartbeats_are_at_least_ten_seconds_apart(run_here: RunHere, written_steps: list[int]) -> None:
    run_here("x")
    assert written_steps == [0, 20, 20]


def test_a_container_is_healthy_while_its_newest_run_progresses(tmp_path: Path) -> None:
    def state(name: str, seconds: float, host: str = "here", status: str = "running") -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        written = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(1_000_000 + seconds))
        values = {"status": status, "process": f"8 on {host}", "time": written, "step": 7}
        (tmp_path / name / "state.json").write_text(json.dumps(values))

    def healthy(now: float) -> bool:
        return healthcheck.verdict(tmp_path, "here", 1_000_000 + now, 60)[0]

    assert healthy(0)  # nothing has begun
    state("old", 0)
    assert healthy(60)
    assert not healthy(61)
    state("elsewhere", 100, host="there")
    assert not healthy(101)
    state("new", 100)  # the old one was killed
    assert healthy(101)
    assert healthcheck.verdict(tmp_path, "here", 1_000_161, 60) == (False, "new: step 7, 61 s ago")
    for name in ("old", "new"):
        state(name, 100, status="finished")
    assert healthy(10_000)  # not training any more
    (tmp_path / "elsewhere" / "state.json").write_text("{}")  # not a run
    assert healthy(10_000)


def test_the_health_check_reads_the_state_of_a_run(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_here("x")
    state = json.loads((folder / "state.json").read_text()) | {"status": "running"}
    (folder / "state.json").write_text(json.dumps(state))
    command = [sys.executable, str(DOCKER / "healthcheck.py"), "30", str(folder.parent)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    (folder / "state.json").write_text(json.dumps(state | {"time": "2026-01-01T00:00:00+0100"}))
    ill = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ill.returncode, ill.stderr) == (1, "")
    assert ill.stdout.startswith("x: step 20, ")


# --- the manifests


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def pods() -> dict[str, dict[str, Any]]:
    """The pod of each manifest; that of the TrainJob assembled as Kubeflow does."""
    job, train_job = manifests("job.yaml")[1], manifests("trainjob.yaml")[0]
    trainer = train_job["spec"]["trainer"]
    (patch,) = train_job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = node["template"]["spec"]["template"]["spec"]
    (container,) = patched["containers"]
    container |= {"image": trainer["image"], "args": trainer["args"], "env": trainer["env"]}
    container |= {"resources": trainer["resourcesPerNode"]}
    specs = {"job.yaml": job["spec"]["template"]["spec"], "trainjob.yaml": patched}
    return {
        name: {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        for name, spec in specs.items()
    }


def test_kubernetes_accepts_the_job_and_both_pods() -> None:
    for manifest in [*manifests("job.yaml"), *pods().values()]:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    wrong = pods()["trainjob.yaml"]
    wrong["spec"]["containers"][0]["securityContext"]["readOnlyRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_train_job_matches_the_schema_of_kubeflow() -> None:
    schema = json.loads((PROJECT_FOLDER / "tests" / "container" / "trainjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    (train_job,) = manifests("trainjob.yaml")
    jsonschema.validate(train_job, schema)
    assert train_job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    for wrong in ({"numNodes": "4"}, {"env": [{"name": "PET_NNODES", "value": "4"}]}, {"replicas": 4}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(train_job | {"spec": train_job["spec"] | {"trainer": wrong}}, schema)


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_pods_are_restricted_and_write_only_to_volumes(name: str) -> None:
    pod = pods()[name]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["terminationGracePeriodSeconds"] > 30
    mounts = {it["mountPath"]: it["name"] for it in container["volumeMounts"]}
    assert mounts.keys() == {"/runs", "/data", "/tmp", "/dev/shm"}
    volumes = {it["name"]: it for it in pod["volumes"]}
    assert volumes.keys() == set(mounts.values())
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == manifests("job.yaml")[0]["metadata"]["name"]
    (key,) = container["env"]
    assert "secretKeyRef" in key["valueFrom"]
    assert flag_value(container["args"], "--resume") == "auto"
    parse_command_line(RECIPES, container["args"])


def test_compose_services_are_restricted_and_their_commands_valid() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"train", "train-gpu", "draw", "node-0", "node-1"}
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        variables = {name: str(value) for name, value in service.get("environment", {}).items() if value is not None}
        chosen = plan(service.get("command", []), variables, 0)
        if "train.py" in chosen.command:
            parse_command_line(RECIPES, chosen.command[chosen.command.index("train.py") + 1 :])
    bridgeless = yaml.safe_load((DOCKER / "compose.host.yaml").read_text())["services"]
    assert {name for name, service in services.items() if service.get("profiles") == ["rehearsal"]} == bridgeless.keys()
    assert all(service["network_mode"] == "host" for service in bridgeless.values())
    assert services["draw"]["ports"] == ["127.0.0.1:7860:7860"]
    assert services["train-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_actions_are_pinned_to_commits() -> None:
    for path in (PROJECT_FOLDER / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        used = [step["uses"] for step in steps if "uses" in step]
        assert used
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)


# --- the lock files


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Version and rest of the line, per package of a lock file."""
    lines = (DOCKER / name).read_text().splitlines()
    words = [line.partition("==") for line in lines if not line.startswith("#")]
    return {package: (rest.split()[0], rest.partition(" ")[2]) for package, _, rest in words}


def test_the_lock_file_pins_versions_and_checksums_that_fit_the_project() -> None:
    cuda = pins("requirements-cuda.lock")
    assert "://" not in (DOCKER / "requirements-cuda.lock").read_text()
    for name, (version, rest) in cuda.items():
        assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", rest), name
        assert version
    for requirement in map(Requirement, requires("mnist-trainer") or []):
        if requirement.marker is None:  # not of an extra
            assert cuda[requirement.name][0] in requirement.specifier, requirement
    assert "dumb-init" in cuda


def test_the_cpu_lock_file_differs_in_torch_only_and_is_marked_not_built() -> None:
    cuda, cpu = pins("requirements-cuda.lock"), pins("requirements-cpu.lock")
    unchecked = {name for name, (_, rest) in cpu.items() if not rest}
    assert unchecked == {"torch", "torchvision"}
    assert all(cuda[name] == pin for name, pin in cpu.items() if name not in unchecked)
    assert all(cpu[name][0] == f"{cuda[name][0]}+cpu" for name in unchecked)
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in cuda.keys() - cpu.keys())
    assert (DOCKER / "requirements-cpu.lock").read_text().startswith("# NOT BUILT")


def test_a_lock_file_has_one_line_per_package_and_no_url() -> None:
    package = {
        "metadata": {"name": "Torch", "version": "2.14.1"},
        "download_info": {"url": "https://example.org/torch.whl", "archive_info": {"hashes": {"sha256": "ab"}}},
    }
    assert lock.lock({"install": [package]}, "me").splitlines()[1:] == ["torch==2.14.1 --hash=sha256:ab"]


# --- Slurm

SRUN = """#!/usr/bin/env bash
# as srun: the command on each machine, all of them this one; non-zero if one of them is
shift # --kill-on-bad-exit
pids=()
for rank in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$rank SLURM_PROCID=$rank "$@" & pids+=($!); done
code=0; for pid in "${pids[@]}"; do wait "$pid" || code=$?; done; exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi
"""


def start_batch(folder: Path, nodes: int, *flags: str, **more: str) -> "subprocess.Popen[bytes]":
    """deploy/train.sbatch as Slurm starts it, with stand-ins for srun and scontrol, and the real launcher."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    variables = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "OUTPUT_DIR": str(folder / "runs"),
        "RUN_NAME": "x",
        "SLURM_SUBMIT_DIR": str(PROJECT_FOLDER),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "this,this",
        "SLURM_JOB_NUM_NODES": str(nodes),
        **more,
    }
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            ["bash", DEPLOY / "train.sbatch", "--trackers=none", "--limit-train-images=2000", *flags],
            env=os.environ | variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "array", "task"),
    [(1, {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, "77_3"), (2, {}, r"\d+")],
)
def test_a_run_warned_by_slurm_saves_is_requeued_and_resumes(
    nodes: int, array: dict[str, str], task: str, tmp_path: Path
) -> None:
    run, calls, output = tmp_path / "runs" / "x", tmp_path / "calls", tmp_path / "output"
    batch = start_batch(tmp_path, nodes, "--epochs=100000", "--log-every=10", **array)
    try:
        wait_for(run / "metrics.jsonl", batch, output)
        os.kill(batch.pid, signal.SIGUSR1)  # to the script only, as with --signal=B:
        assert batch.wait(timeout=60) == 75, output.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGKILL)
    state = state_of(run)
    assert (state["status"], state["error"], state["checkpoint"]) == ("interrupted", "SIGUSR1", state["step"])
    assert re.fullmatch(rf"requeue {task}\n", calls.read_text())
    assert json.loads((run / "environment.json").read_text())["num_processes"] == nodes

    again = start_batch(tmp_path, nodes, f"--max-steps={state['step'] + 5}")
    assert again.wait(timeout=120) == 0, output.read_text()
    assert (state_of(run)["status"], state_of(run)["step"]) == ("finished", state["step"] + 5)
    assert "resumed     from step-" in output.read_text()
    assert len(calls.read_text().splitlines()) == 1  # a finished run is not requeued


def test_a_failed_job_is_not_requeued_because_of_an_earlier_attempt(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"status": "interrupted", "exit_code": 75}, indent=2))
    batch = start_batch(tmp_path, 1, "--epochs=none")
    assert batch.wait(timeout=60) == 1, (tmp_path / "output").read_text()
    assert not (tmp_path / "calls").exists()


# --- command lines in prose


def texts() -> Iterator[tuple[str, str]]:
    """Files with command lines, by name, with continued lines joined."""
    for pattern in ("*.md", "docs/*.md", "deploy/*", "docker/*", "accelerate_configs/*", "train.py", "Makefile"):
        for path in sorted(PROJECT_FOLDER.glob(pattern)):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                yield str(path.relative_to(PROJECT_FOLDER)), re.sub(r"\\\n[#> ]*", " ", text)


def command_lines(beginning: str) -> list[tuple[str, str]]:
    """(file, line) of each distinct command line with this beginning, up to a comment, backtick or pipe."""
    files = {
        re.sub(r"\$\w+", "1", match.group()).strip().removesuffix(" ..."): name
        for name, text in texts()
        if name != "deploy/train.sbatch"  # run by a test above
        for match in re.finditer(rf"\b{beginning}(?= )[^`|#&>\n]*", text)
    }
    assert files
    return [(name, line) for line, name in files.items()]


@pytest.fixture
def folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PetImages").mkdir()
    monkeypatch.chdir(tmp_path)


def test_accelerate_launch_lines_in_the_docs_are_valid(folder_of_images: None) -> None:
    checked, parser = 0, launch_command_parser()
    for name, line in command_lines("accelerate launch"):
        words = shlex.split(line)[2:]
        if (words and words[0].startswith("-")) or "train.py" in words:
            arguments = parser.parse_args(words if "train.py" in words else [*words, "train.py"])
            if arguments.config_file:
                load_config_from_file(str(PROJECT_FOLDER / arguments.config_file))
            assert arguments.training_script in ("train.py", "/app/train.py"), f"{name}: {line}"
            parse_command_line(RECIPES, arguments.training_script_args)
            checked += 1
    assert checked >= 30


def test_torchrun_lines_in_the_docs_are_valid(folder_of_images: None) -> None:
    for name, line in command_lines("torchrun"):
        words = shlex.split(line.replace("'s", ""))[1:]
        if words and words[0].startswith("-"):
            arguments = get_args_parser().parse_args(words)
            assert arguments.training_script == "train.py", f"{name}: {line}"
            parse_command_line(RECIPES, arguments.training_script_args)


def test_docker_run_lines_in_the_docs_are_valid(folder_of_images: None) -> None:
    for name, line in command_lines("docker run"):
        words = shlex.split(line)
        image = next((place for place, word in enumerate(words) if word.startswith("mnist-trainer")), None)
        if image is None:  # only options of Docker
            continue
        command = plan(words[image + 1 :], {}, 1).command
        if command[:2] == TRAIN:
            parse_command_line(RECIPES, command[2:])
        else:
            assert command[0] in ("mnist", "bash", "nvidia-smi"), f"{name}: {line}"
