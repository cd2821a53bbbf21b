"""Lets a process run for a share of every period, stops it for the rest; ends with it or with the test's process."""

import contextlib
import os
import signal
import sys
import time


def main(pid: int, share: float, period_s: float, parent: int) -> None:
    """Alternate until the process or the parent is gone."""
    try:
        while os.getppid() == parent:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(period_s * (1 - share))
            os.kill(pid, signal.SIGCONT)
            time.sleep(period_s * share)
    except ProcessLookupError:
        return  # it died, which is another fault's business
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
