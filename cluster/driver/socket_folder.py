"""Chooses the folder that Unix sockets lie below: their paths are short by the kernel's rule. Creates nothing."""

import os
import tempfile
from pathlib import Path

MAX_PATH_BYTES = 107  # sun_path of unix(7), less its zero
FALLBACK = Path("/tmp")  # noqa: S108 - names below it are random, and made for this user only


def socket_folder(longest: str) -> Path:
    """Return the temporary folder, or /tmp where `longest`, a path below it, would be too long for a socket.

    TMPDIR is deep on macOS and in the scratch folders of shared machines.
    """
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder / longest)) <= MAX_PATH_BYTES else FALLBACK
