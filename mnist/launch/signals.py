"""Signal handling: SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 end all processes of a run at the same step.

    follow_launcher()                              # end when the launcher is killed
    end_at_once()                                  # before training, a signal ends the process immediately
    with Interruption(accelerator, before_exit) as interruption:
        for ...:
            interruption.after_step()              # raises Interrupted once any process has received a signal

A second Ctrl-C more than a second after the first ends the process immediately. Launchers and terminals may send
duplicates of the first one, but sooner.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_CODES = {
    getattr(signal, name): code
    # 128 + the signal's number, as in shells; SIGUSR1, a scheduler's warning: EX_TEMPFAIL of sysexits.h
    for name, code in {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 75}.items()
    if hasattr(signal, name)
}
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
LAUNCHERS = {  # word of a command line -> what a user types
    "accelerate": "accelerate",
    "accelerate-launch": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
}


class Interrupted(SystemExit):
    """A signal asked the run to end. Not an Exception, so that only context managers and run_process handle it."""

    def __init__(self, number: int) -> None:
        self.exit_code = EXIT_CODES[number]
        super().__init__(self.exit_code)
        self.signal = signal.Signals(number).name
        self.message = ""  # to print at exit


class Interruption:
    """Records signals, and lets all processes of the job act on them together."""

    SECONDS_BETWEEN_AGREEMENTS = 0.5

    def __init__(self, accelerator: "Accelerator", before_exit: Callable[..., None]) -> None:
        """`before_exit(status=..., error=..., exit_code=...)` is called before a second Ctrl-C ends this process."""
        # GPUs: over gloo (processes.py), without waiting for kernels
        self.device = "cpu" if accelerator.device.type == "cuda" else accelerator.device
        self.alone = accelerator.num_processes == 1
        self.before_exit = before_exit
        self.number = 0  # of the first signal
        self.interval = 1  # steps between agreements
        self.steps = 0
        self.agreed_at = time.monotonic()

    def __enter__(self) -> "Interruption":
        # The interpreter writes signal numbers to this socket even while the main thread is blocked inside torch, where
        # no Python handler can run.
        self.wakeup, reader = socket.socketpair()
        self.wakeup.setblocking(False)
        self.previous_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.previous = {
            number: signal.signal(number, lambda *_: None)
            for number in EXIT_CODES
            if signal.getsignal(number) is not signal.SIG_IGN  # e.g. a background job of a shell
        }
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            if isinstance(error, Interrupted):  # launchers send more signals during shutdown
                signal.signal(number, signal.SIG_IGN)
            elif error is not None or number == signal.SIGINT:
                signal.signal(number, handler)
            # otherwise the run is finished, and its handlers, which do nothing, stay
        signal.set_wakeup_fd(self.previous_wakeup)
        self.wakeup.close()  # ends the thread

    def _watch(self, reader: socket.socket) -> None:
        interrupted_at = None
        while received := reader.recv(1):
            number = received[0]
            if number not in EXIT_CODES:
                continue
            self.number = self.number or number
            if number == signal.SIGINT:
                if interrupted_at is not None and time.monotonic() - interrupted_at > 1:
                    try:
                        self.before_exit(status="interrupted", error="a second SIGINT", exit_code=EXIT_CODES[number])
                    finally:
                        os._exit(EXIT_CODES[number])
                interrupted_at = interrupted_at or time.monotonic()
        reader.close()

    def after_step(self) -> None:
        """Call after each optimizer step. Raises Interrupted after a signal; processes agree about twice a second."""
        self.steps += 1
        if self.alone:
            if self.number:
                raise Interrupted(self.number)
        elif self.steps >= self.interval:
            steps, seconds = self.steps, self.check()
            target = steps * self.SECONDS_BETWEEN_AGREEMENTS / max(seconds, 1e-6)
            self.interval = max(1, min(int(target), 2 * self.interval))

    def check(self) -> float:
        """Raise Interrupted on all processes if any has received a signal. All processes must call this.

        Returns the seconds since the last call, the same number on all processes.
        """
        now = time.monotonic()
        number, seconds = float(self.number), now - self.agreed_at
        self.agreed_at, self.steps = now, 0
        if not self.alone:
            import torch

            values = torch.tensor([number, seconds], device=self.device)
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
            number, seconds = values.tolist()
        if number:
            raise Interrupted(int(number))
        return seconds


def end_at_once() -> None:
    """Let signals end this process with their exit code, until training begins."""
    default = {signal.SIGINT} if os.getpid() == 1 else {signal.SIGINT, signal.SIGTERM}  # pid 1: of a container
    for number in EXIT_CODES.keys() - default:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: os._exit(EXIT_CODES[number]))


def launcher_command() -> list[str] | None:
    """The launcher command that started this process, up to and including the script; None without a launcher."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    names = [Path(word).name for word in words]
    script = Path(sys.argv[0]).name
    end = names.index(script) + 1 if script in names else len(words)
    for index, name in enumerate(names[:end]):
        if name in LAUNCHERS:
            return [*LAUNCHERS[name].split(), *words[index + 1 : end]]
    return None


def follow_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its launcher dies.

    Otherwise it would survive SIGKILL on any launcher, and SIGTERM on `accelerate launch` with one process. A process
    started by a shell must survive the shell (`nohup python train.py &`).
    """
    parent = os.getppid()
    if sys.platform == "linux" and launcher_command() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before prctl took effect
            os.kill(os.getpid(), signal.SIGTERM)
