"""Build the image and check what docs/docker.md promises; every check prints what it saw.

    make image-test                            # with the installed Docker engine, or a private one (as root)
    python tests/container/try_image.py health stop    # only checks with these words in their names

Ends with 1 if a check fails. Needs Linux, room for 25 GB, and some minutes.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
IMAGE = "mnist-trainer:test"
USER = 1234  # not in the image's /etc/passwd
RESTRICTED = (
    *("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    f"--user={USER}",
)
ENDLESS = ("--trackers=none", "--epochs=100000", "--limit-train-images=2000", "--log-every=10", "--run-name=x")
GRACE = 30  # seconds between `docker stop`'s SIGTERM and its SIGKILL
MAX_OWN_MEGABYTES = 150  # over the base and the installed packages
ACCURACY = 0.95  # of the default recipe: 0.956 to 0.965 was seen
ASK = """
import json, sys, urllib.request
page = urllib.request.urlopen("http://127.0.0.1:7860/").read().decode()
request = urllib.request.Request("http://127.0.0.1:7860/answer", open(sys.argv[1], "rb").read())
answer = json.loads(urllib.request.urlopen(request).read())
print(json.dumps({"canvas": "<canvas" in page, "label": answer["label"]}))
"""
DIGIT = """
import sys
from PIL import Image
from mnist.data.datasets import load_dataset
data = load_dataset("mnist", "/app/data").test
Image.fromarray(data.images[0].squeeze().numpy()).resize((280, 280)).save(sys.argv[1])
print(int(data.labels[0]))
"""


def docker(*arguments: str, check: bool = True) -> str:
    """The client's output, including standard error."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and done.returncode:
        raise AssertionError(f"docker {shlex.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def shell(script: str) -> str:
    """Standard output of a shell in the image, without the entrypoint."""
    command = ["docker", "run", "--rm", "--network=none", "--entrypoint=sh", IMAGE, "-c", script]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout


def expect(seen: object, wanted: object, of: str) -> None:
    if seen != wanted:
        raise AssertionError(f"{of}: {seen!r} instead of {wanted!r}")


def require(holds: object, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)


class Container:
    """A running container with a folder mounted at /runs, removed when the block ends."""

    def __init__(self, runs: Path, *command: str, options: tuple[str, ...] = RESTRICTED) -> None:
        self.runs = runs
        self.id = docker("run", "--detach", f"--volume={runs}:/runs", *options, IMAGE, *command).strip()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "--force", "--volumes", self.id)

    def wait(self) -> int:
        return int(docker("wait", self.id))

    def logs(self) -> str:
        return docker("logs", self.id)

    def run(self, *command: str) -> str:
        return docker("exec", self.id, *command)

    def inspect(self, template: str) -> str:
        return docker("inspect", f"--format={template}", self.id).strip()

    def health(self) -> str:
        return self.inspect("{{.State.Health.Status}}")

    def wait_until(self, what: Callable[[], object], seconds: float = 120) -> float:
        """Wait until `what` returns true; returns the seconds."""
        started = time.monotonic()
        while not what():
            require(time.monotonic() - started < seconds, f"not within {seconds} s:\n{self.logs()}")
            require(self.inspect("{{.State.Running}}") == "true" or what(), f"it has ended:\n{self.logs()}")
            time.sleep(0.2)
        return time.monotonic() - started

    def wait_until_it_trains(self, name: str = "x") -> None:
        metrics = self.runs / name / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and metrics.stat().st_size)


@contextlib.contextmanager
def runs_folder() -> Iterator[Path]:
    """A world-writable folder: the containers run as another user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        folder.mkdir()
        folder.chmod(0o777)
        Path(name).chmod(0o755)
        try:
            yield folder
        finally:  # their files belong to another user
            clean = "--rm", "--user=0", "--network=none", "--entrypoint=find", f"--volume={folder}:/runs"
            docker("run", *clean, IMAGE, "/runs", "-mindepth", "1", "-delete")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def build() -> None:
    """Build the image from the project's folder."""
    started = time.monotonic()
    arguments = shlex.split(os.environ.get("BUILD_ARGS", ""))
    command = ["docker", "build", *arguments, "-f", "docker/Dockerfile", "-t", IMAGE, "."]
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=PROJECT_FOLDER, env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=True)
    print(f"built in {time.monotonic() - started:.0f} s\n", flush=True)


# --- the checks: each returns what it saw


def check_image_is_described_and_runs_as_nobody_in_particular() -> str:
    config = json.loads(docker("inspect", IMAGE))[0]["Config"]
    labels = {name: value for name, value in config["Labels"].items() if name.startswith("org.opencontainers.image.")}
    require(re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"]), f"user {config['User']}")
    require(len(labels) >= 6, f"labels {labels}")
    return f"user {config['User']}, {len(labels)} OCI labels, volumes {', '.join(config['Volumes'])}"


def check_size() -> str:
    layers = docker("history", "--no-trunc", "--human=false", "--format={{.Size}} {{.CreatedBy}}", IMAGE).splitlines()
    sizes = [(int(size), made_by) for size, _, made_by in (line.partition(" ") for line in layers)]
    total = sum(size for size, _ in sizes)
    place = next(place for place, (_, made_by) in enumerate(sizes) if made_by.startswith("COPY /opt/venv"))
    packages, base = sizes[place][0], sum(size for size, _ in sizes[place + 1 :])  # the newest layer comes first
    code = sum(size for size, made_by in sizes if made_by.startswith("COPY /app"))
    own = total - base - packages
    require(own <= MAX_OWN_MEGABYTES * 1e6, f"{megabytes(own)} over base and packages")
    parts = f"base {megabytes(base)}, packages {megabytes(packages)}, code and MNIST {megabytes(code)}"
    return f"{megabytes(total)}: {parts}; {megabytes(own)} over base and packages"


def check_packages_carry_no_times_of_their_own() -> str:
    names = "find . -mindepth 1 -printf '%p %m %T@ %l\\n' | sort | sha256sum"
    contents = "find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
    seen = shell(f"cd /opt/venv && {names} && {contents}").split()
    times = shell("find /opt/venv -mindepth 1 -newermt 2023-11-15 | head -3")
    expect(times, "", "files with a time of their own")
    return f"to be compared with another build's by hand: names and times {seen[0][:16]}, contents {seen[2][:16]}"


def check_nobody_writes_the_code() -> str:
    script = "id -u; find / -xdev -writable -not -type l -not -path '/proc/*' -not -path '/dev/*' 2>/dev/null; true"
    seen = {}
    for user in (1000, USER):
        # without --read-only: it is the permissions that are tried
        uid, *places = docker("run", "--rm", "--network=none", f"--user={user}", IMAGE, "sh", "-c", script).split()
        expect(int(uid), user, "user")
        seen[user] = sorted(place for place in places if not place.startswith(("/runs", "/data", "/tmp")))
        require(set(seen[user]) <= {"/var/tmp", "/run/lock", "/var/lock"}, f"user {user} may write {seen[user]}")
    return f"writable besides /runs, /data and /tmp: {' '.join(seen[USER]) or 'nothing'}"


def check_no_secret_is_in_the_image() -> str:
    config = json.loads(docker("inspect", IMAGE))[0]["Config"]
    named = [it for it in config["Env"] if re.search(r"KEY|TOKEN|SECRET|PASSWORD", it.partition("=")[0])]
    expect(named, [], "variables")
    history = docker("history", "--no-trunc", IMAGE)
    require("BEGIN CERTIFICATE" not in history, "a certificate in the history")
    left = shell("ls -d /etc/pip.conf /wheels /run/secrets 2>/dev/null")
    expect(left, "", "what the build was lent")
    return "no variable, no line of the history, nothing of what the build was lent"


def check_default_recipe_runs_restricted_to_its_accuracy() -> str:
    key = secrets.token_hex(20)
    with (
        runs_folder() as runs,
        Container(runs, "--run-name=x", options=(*RESTRICTED, f"--env=WANDB_API_KEY={key}")) as it,
    ):
        started = time.monotonic()
        code, seconds = it.wait(), time.monotonic() - started
        logs = it.logs()
        expect(code, 0, f"exit code, with\n{logs}\n")
        expect(read(runs / "x" / "state.json")["status"], "finished", "state")
        accuracy = [json.loads(line) for line in (runs / "x" / "metrics.jsonl").read_text().splitlines()][-1][
            "test/accuracy"
        ]
        require(accuracy >= ACCURACY, f"accuracy {accuracy}")
        files = [path for path in runs.rglob("*") if not path.is_symlink()]
        owners = {path.lstat().st_uid for path in runs.rglob("*")}
        expect(owners, {USER}, "owners of the files in /runs")
        written = [path for path in files if path.is_file() and key.encode() in path.read_bytes()]
        require(not written and key not in logs, f"the key is in {written or 'the logs'}")
        changed = docker("diff", it.id).strip()
        expect(changed, "", "changes of the container's own layer")
        return (
            f"accuracy {accuracy:.4f} in {seconds:.0f} s; {len(files)} files, all of user {USER}; the key of W&B"
            " in none of them, not in the logs, and nothing in the container's layer"
        )


def check_two_processes_train_as_one() -> str:
    flags = "--trackers=none", "--limit-train-images=2000", "--epochs=1", "--run-name=x"
    with runs_folder() as runs, Container(runs, *flags, options=(*RESTRICTED, "--env=NUM_PROCESSES=2")) as it:
        expect(it.wait(), 0, f"exit code, with\n{it.logs()}\n")
        environment = read(runs / "x" / "environment.json")
        expect((environment["num_processes"], environment["steps_per_epoch"]), (2, 100), "processes and steps")
        return next(line for line in it.logs().splitlines() if "launched" in line).strip()


def check_stop_in_mid_training_saves_and_the_next_container_resumes() -> str:
    seen = []
    for processes in (1, 2):
        options = (*RESTRICTED, f"--env=NUM_PROCESSES={processes}")
        with runs_folder() as runs:
            with Container(runs, *ENDLESS, "--resume=auto", options=options) as it:
                it.wait_until_it_trains()
                first = it.run("cat", "/proc/1/cmdline").split("\0")
                started = time.monotonic()
                docker("stop", "-t", str(GRACE), it.id)
                seconds = time.monotonic() - started
                expect(it.wait(), 143, f"exit code, with\n{it.logs()}\n")
            state = read(runs / "x" / "state.json")
            expect((state["status"], state["error"]), ("interrupted", "SIGTERM"), "state")
            require(seconds < GRACE and state["checkpoint"] == state["step"] > 0, f"{seconds} s, {state}")
            more = f"--max-steps={state['step'] + 5}", "--resume=auto"
            with Container(runs, *ENDLESS, *more, options=options) as it:
                expect(it.wait(), 0, f"exit code, with\n{it.logs()}\n")
                require(f"resumed     from step-{state['step']:010}" in it.logs(), it.logs())
            expect(read(runs / "x" / "state.json")["step"], state["step"] + 5, "last step")
        seen.append(
            f"{processes} process(es): {first[0]} is the first, 143 after {seconds:.1f} s, went on from {state['step']}"
        )
    return "; ".join(seen)


def check_one_process_has_no_launcher_above_it() -> str:
    with runs_folder() as runs, Container(runs, *ENDLESS) as it:
        it.wait_until_it_trains()
        pid = read(runs / "x" / "state.json")["process"].split()[0]
        parent = it.run("sh", "-c", f"cut -d' ' -f4 /proc/{pid}/stat").strip()
        expect(parent, "1", "parent of the process that trains")
        words = it.run("cat", f"/proc/{pid}/cmdline").split("\0")
        return f"process {pid}, {shlex.join(words[:2])}, a child of process 1"


def check_a_killed_worker_brings_the_container_down() -> str:
    with runs_folder() as runs, Container(runs, *ENDLESS, options=(*RESTRICTED, "--env=NUM_PROCESSES=2")) as it:
        it.wait_until_it_trains()
        started = time.monotonic()
        it.run("sh", "-c", "kill -9 $(grep -lz '^RANK=1$' /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | head -1)")
        code, seconds = it.wait(), time.monotonic() - started
        require(code != 0, f"exit code {code} with\n{it.logs()}")
        return f"exit code {code} after {seconds:.1f} s, state {read(runs / 'x' / 'state.json')['status']}"


def check_health_shows_a_hung_job() -> str:
    often = "--health-interval=2s", "--health-retries=2", "--health-start-period=0s"
    shortened = "--health-cmd=python docker/healthcheck.py 15"
    with runs_folder() as runs, Container(runs, *ENDLESS, options=(*RESTRICTED, *often, shortened)) as it:
        it.wait_until_it_trains()
        pid = read(runs / "x" / "state.json")["process"].split()[0]
        time.sleep(25)  # longer than the limit: it is the heartbeat that keeps it healthy
        expect(it.health(), "healthy", "health of a run that advances")
        it.run("sh", "-c", f"kill -STOP {pid}")
        seconds = it.wait_until(lambda: it.health() == "unhealthy", 60)
        it.run("sh", "-c", f"kill -CONT {pid}")
        again = it.wait_until(lambda: it.health() == "healthy", 60)
    own = json.loads(docker("inspect", IMAGE))[0]["Config"]["Healthcheck"]["Test"]
    return (
        f"healthy for 25 s, unhealthy {seconds:.0f} s after SIGSTOP, healthy {again:.0f} s after SIGCONT; image: {own}"
    )


def check_predict_and_draw_answer() -> str:
    flags = "--trackers=none", "--epochs=1", "--run-name=x"
    with runs_folder() as runs:
        with Container(runs, *flags) as it:
            expect(it.wait(), 0, f"exit code, with\n{it.logs()}\n")
        with Container(runs, "mnist", "draw", "--host", "0.0.0.0", "--model", "runs/x") as it:
            truth = it.run("python", "-c", DIGIT, "/runs/digit.png").strip()
            predicted = json.loads(it.run("mnist", "predict", "/runs/digit.png", "--model", "runs/x", "--json"))
            it.wait_until(lambda: "http://" in it.logs())
            answer = json.loads(it.run("python", "-c", ASK, "/runs/digit.png"))
            label = predicted[0]["label"]
            expect((label, answer["label"], answer["canvas"]), (truth, truth, True), "answers")
            docker("stop", "-t", str(GRACE), it.id)
            return f"predict: {label}, draw: {answer['label']}, the test image is a {truth}; draw ends with {it.wait()}"


def check_verify_passes_in_the_container() -> str:
    with runs_folder() as runs, Container(runs, "mnist", "verify") as it:
        expect(it.wait(), 0, f"exit code, with\n{it.logs()}\n")
        expect(list(runs.iterdir()), [], "left in /runs")
        return it.logs().splitlines()[-1]


def check_wrong_usage_and_commands() -> str:
    once = "--rm", "--network=none"
    wrong = subprocess.run(["docker", "run", *once, "--env=NUM_PROCESSES=many", IMAGE], capture_output=True, text=True)
    expect(wrong.returncode, 2, "exit code of NUM_PROCESSES=many")
    unknown = subprocess.run(["docker", "run", *once, IMAGE, "--no-such-flag"], capture_output=True)
    expect(unknown.returncode, 2, "exit code of an unknown flag")
    require("--recipe" in docker("run", *once, IMAGE, "--help"), "help")
    compiler = shell("command -v cc gcc g++ clang")
    expect(compiler, "", "compilers")
    return f"2 for wrong variables and flags ({wrong.stderr.splitlines()[0]}); no compiler"


def check_compose_rehearsal_trains_as_one() -> str:
    plugin = subprocess.run(["docker", "compose", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    compose = ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]
    has_bridge = bool(docker("network", "ls", "--quiet", "--filter=driver=bridge").strip())
    files = ["-f", "docker/compose.yaml", *([] if has_bridge else ["-f", "docker/compose.host.yaml"])]
    with runs_folder() as runs:
        variables = os.environ | {
            "IMAGE": IMAGE,
            "UID": str(USER),
            "GID": "0",
            "RUNS": str(runs),
            "COMPOSE_PROJECT_NAME": "mnist-test",
        }
        command = [*compose, *files, "--profile", "rehearsal"]
        run = {
            "cwd": PROJECT_FOLDER,
            "env": variables,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        try:
            subprocess.run([*command, "config", "--quiet"], check=True, **run)  # type: ignore[call-overload]
            up = subprocess.run([*command, "up", "--no-build", "node-0", "node-1"], timeout=300, **run)  # type: ignore[call-overload]
            nodes = docker("ps", "--all", "--quiet", "--filter=label=com.docker.compose.project=mnist-test").split()
            codes = [docker("inspect", "--format={{.State.ExitCode}}", node).strip() for node in nodes]
            expect(codes, ["0", "0"], f"exit codes, with\n{up.stdout}\n")
            environment, state = read(runs / "rehearsal" / "environment.json"), read(runs / "rehearsal" / "state.json")
            expect((environment["num_processes"], state["status"]), (2, "finished"), "processes and state")
            network = "over a bridge" if has_bridge else "over the host's network"
            return (
                f"{environment['processes']} {network}, {state['step']} steps, both ended with 0 ({' '.join(compose)})"
            )
        finally:
            subprocess.run([*command, "down", "--volumes"], **run)  # type: ignore[call-overload]


def main() -> int:
    if subprocess.run(["docker", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        require("DOCKER_HOST" not in os.environ, f"DOCKER_HOST={os.environ.get('DOCKER_HOST')}: no engine answers")
        engine = str(Path(__file__).with_name("engine"))
        os.execv(engine, [engine, sys.executable, *sys.argv])
    build()
    wanted = sys.argv[1:]
    checks = [it for name, it in globals().items() if name.startswith("check_")]
    chosen = [it for it in checks if not wanted or any(word in it.__name__ for word in wanted)]
    require(chosen, f"no check has {' or '.join(wanted)} in its name")
    failed = 0
    for check in chosen:
        name, started = check.__name__.removeprefix("check_").replace("_", " "), time.monotonic()
        try:
            seen = check()
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok      {name} ({time.monotonic() - started:.0f} s)\n        {seen}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
