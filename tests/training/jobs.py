"""Real training jobs for the tests: started as a user starts them, small enough to take seconds."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TRAIN_SH = REPOSITORY / "launch" / "train.sh"
# 5 validation scenes on 2 processes: the sampler has to repeat one.
TINY = ["data.train_size=16", "data.val_size=5", "model.widths=[4,8]", "trainer.max_epochs=2", "trainer=cpu"]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, the tests' own Python first on PATH and no trace of another launcher."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCBN_", "TORCHELASTIC_", "PL_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        keep.pop(name, None)
    return keep | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables


class Job:
    """A command in a process group of its own, its output read as it comes."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=list_into.extend, args=(stream,), daemon=True)
            for stream, list_into in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Returns once a line of stdout contains `text`."""
        deadline = time.monotonic() + timeout
        while not any(text in line for line in list(self.lines)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no line with {text!r}:\n{''.join(self.lines + self.errors)}")
            time.sleep(0.05)

    def interrupt(self) -> None:
        """What Ctrl-C on a terminal does: SIGINT to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, timeout: float = 240) -> int:
        """Waits for the end; returns the exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running:\n{''.join(self.lines + self.errors)}") from None
        for reader in self._readers:
            reader.join(10)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def error_output(self) -> str:
        return "".join(self.errors)

    def listening_addresses(self) -> set[str]:
        """IP addresses that the processes of the group accept TCP connections on (Linux)."""
        inodes = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(process.name)) == self.process.pid:
                    inodes |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
            except OSError:  # it has ended meanwhile
                continue
        addresses = set()
        for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
            for row in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # 0A: listening
                    words = [fields[1].split(":")[0][i : i + 8] for i in range(0, len(fields[1]) - 5, 8)]
                    packed = b"".join(struct.pack("<I", int(word, 16)) for word in words)
                    addresses.add(socket.inet_ntop(family, packed))
        return addresses


def run_job(command: list[str], cwd: Path) -> Job:
    """Runs a command to its end, whatever its status."""
    job = Job(command, cwd)
    job.finish()
    return job
