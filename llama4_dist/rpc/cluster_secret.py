"""Finds the secret that the processes of a cluster share; hands it to nobody."""

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from llama4_dist.errors import ConfigError

SECRET_FILE_VARIABLE = "LLAMA4_DIST_CLUSTER_SECRET_FILE"  # noqa: S105 - a name, not a secret
SECRET_BYTES = 32
MAX_SECRET_FILE_BYTES = 4096


def cluster_secret(environ: Mapping[str, str] = os.environ, *, shared: bool = False) -> bytes:
    """Return the secret of the file that LLAMA4_DIST_CLUSTER_SECRET_FILE names, or fresh random bytes.

    `shared` demands the file: somebody in another process has to know the same.
    """
    name = environ.get(SECRET_FILE_VARIABLE)
    if name is None and shared:
        raise ConfigError(
            f"gateways and cluster share a secret: let {SECRET_FILE_VARIABLE} name a file with it in both"
        )
    if name is None:
        return secrets.token_bytes(SECRET_BYTES)
    path = Path(name)
    try:
        status = path.stat()
        secret = path.read_bytes()[: MAX_SECRET_FILE_BYTES + 1].strip() if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(f"{SECRET_FILE_VARIABLE}={name} cannot be read: {error.strerror}") from None
    if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"{SECRET_FILE_VARIABLE}={name} is open to everyone: chmod 600 it")
    if not 16 <= len(secret) <= MAX_SECRET_FILE_BYTES:
        raise ConfigError(
            f"{SECRET_FILE_VARIABLE}={name} holds {len(secret)} bytes: write 16 to {MAX_SECRET_FILE_BYTES}"
        )
    return secret
