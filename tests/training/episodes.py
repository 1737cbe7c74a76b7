"""What tests of the launcher start: processes that say that they live, and end as they are told.

    episodes.py FOLDER END ...     one end for each start: a signal's number, or "exit N"; without one, wait

All write a file into the folder first; then the last process comes to its end.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    folder, ends = Path(sys.argv[1]), sys.argv[2:]
    rank, size, start = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    signal.signal(signal.SIGTERM, lambda number, frame: leave(f"rank {rank}: {signal.Signals(number).name}\n", ends))
    (folder / f"{start}.{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob(f"{start}.*"))) < size:
        time.sleep(0.01)
    if rank == size - 1 and start < len(ends):
        if ends[start].startswith("exit"):
            sys.exit(int(ends[start].split()[1]))
        os.kill(os.getpid(), int(ends[start]))
    time.sleep(100)


def leave(message: str, ends: list[str]) -> None:
    if not ends:
        os.write(1, message.encode())
    os._exit(3)


if __name__ == "__main__":
    main()
