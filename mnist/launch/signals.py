"""A run ends in good order at the first SIGTERM, SIGINT (Ctrl-C), SIGHUP (its terminal is gone) or SIGUSR1, all of its
processes at the same step.

    follow_launcher()                              # who kills only the launcher ends this process too
    end_at_once()                                  # at a signal, as long as there is nothing to lose
    with Interruption(accelerator, at_once) as interruption:
        for ...:
            interruption.after_step()              # raises Interrupted once a process of the job has got a signal

A second Ctrl-C, more than a second after the first, ends the process at once at any time: the second one that launchers
and terminals send by themselves comes earlier.
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
    # 128 + the signal's number, as shells have it; SIGUSR1, a scheduler's early warning: "try again" of sysexits.h
    for name, code in {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 75}.items()
    if hasattr(signal, name)
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
LAUNCHERS = {  # as a word of their command line, and how a person calls them
    "accelerate": "accelerate",
    "accelerate-launch": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
}


class Interrupted(SystemExit):
    """The run was asked to end. Passes through everything that has to be put in order, up to the exit code."""

    def __init__(self, number: int) -> None:
        self.exit_code = EXIT_CODES[number]
        super().__init__(self.exit_code)
        self.signal = signal.Signals(number).name
        self.message = ""  # for the person at the terminal


class Interruption:
    """Takes note of signals, and lets all processes of the job act on them together."""

    SECONDS_BETWEEN_AGREEMENTS = 0.5

    def __init__(self, accelerator: "Accelerator", at_once: Callable[..., None]) -> None:
        """`at_once(status=..., error=..., exit_code=...)` is called before a second Ctrl-C ends this process."""
        self.device = accelerator.device
        self.alone = accelerator.num_processes == 1
        self.at_once = at_once
        self.number = 0  # of the first signal
        self.interval = 1  # steps between two agreements
        self.steps = 0
        self.agreed_at = time.monotonic()

    def __enter__(self) -> "Interruption":
        # The interpreter writes a signal's number into this socket even while the main thread waits inside torch for
        # other processes, where no handler written in Python would be called.
        self.wakeup, reader = socket.socketpair()
        self.wakeup.setblocking(False)
        self.previous_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.previous = {
            number: signal.signal(number, lambda *_: None)
            for number in EXIT_CODES
            if signal.getsignal(number) is not signal.SIG_IGN  # a shell's job in the background, say
        }
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            if isinstance(error, Interrupted):  # launchers send more signals while a process is on its way out
                signal.signal(number, signal.SIG_IGN)
            elif error is not None or number == signal.SIGINT:
                signal.signal(number, handler)
            # else it stays as it is, and does nothing: a run that is finished is finished
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
                        self.at_once(status="interrupted", error="a second SIGINT", exit_code=EXIT_CODES[number])
                    finally:
                        os._exit(EXIT_CODES[number])
                interrupted_at = interrupted_at or time.monotonic()
        reader.close()

    def after_step(self) -> None:
        """After each optimizer step: raise Interrupted where it is time to; processes ask each other now and then."""
        self.steps += 1
        if self.alone:
            if self.number:
                raise Interrupted(self.number)
        elif self.steps >= self.interval:
            steps, seconds = self.steps, self.check()
            wished = steps * self.SECONDS_BETWEEN_AGREEMENTS / max(seconds, 1e-6)
            self.interval = max(1, min(int(wished), 2 * self.interval))

    def check(self) -> float:
        """Raise Interrupted, on all processes, where one of them has got a signal; all of them must call it.

        Returns the seconds since it was last called, the same number on all.
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
    """Before training: let a signal end this process with its exit code, where it does not by itself."""
    is_first = os.getpid() == 1  # of a container
    for number in EXIT_CODES.keys() - ({signal.SIGINT} if is_first else {signal.SIGINT, signal.SIGTERM}):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: os._exit(EXIT_CODES[number]))


def launcher_command() -> list[str] | None:
    """The command that started this process through a launcher, up to the script; None where none did."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    script = next((place for place, word in enumerate(words) if Path(word).name == Path(sys.argv[0]).name), len(words))
    words = words[: script + 1]
    for place, word in enumerate(words):
        if Path(word).name in LAUNCHERS:
            return [*LAUNCHERS[Path(word).name].split(), *words[place + 1 :]]
    return None


def follow_launcher() -> None:
    """Ask the kernel for SIGTERM at the death of the launcher that started this process, if one did.

    `accelerate launch` with one process dies at a SIGTERM without passing it on, and any launcher at a SIGKILL; its
    workers would live on unseen. A process that a shell started must survive it (`nohup python train.py &`).
    """
    parent = os.getppid()
    if sys.platform == "linux" and launcher_command() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died meanwhile: the kernel keeps silent
            os.kill(os.getpid(), signal.SIGTERM)
