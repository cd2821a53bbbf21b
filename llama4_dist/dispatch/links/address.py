"""Addresses of links: "unix:/path" and "tcp:host:port". Refuses to bind every interface at once."""

import ipaddress
import os
import socket
import stat
from pathlib import Path

SocketAddress = str | tuple[str, int]
_MAX_UNIX_PATH = 107  # sun_path of unix(7), less its zero


def parse_address(address: str) -> tuple[socket.AddressFamily, SocketAddress]:
    """Return the socket family and address; ValueError for anything else."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        if len(os.fsencode(rest)) > _MAX_UNIX_PATH:
            raise ValueError(f"{address!r} is too long for a Unix socket: at most {_MAX_UNIX_PATH} bytes of path")
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isascii() and port.isdigit() and int(port) <= 65535:
        host = host.removeprefix("[").removesuffix("]")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
    raise ValueError(f"address {address!r} is neither unix:/absolute/path nor tcp:host:port")


def bind(address: str, backlog: int) -> socket.socket:
    """Return a listening non-blocking socket; a Unix socket is for its owner alone (0600 in a 0700 directory)."""
    family, target = parse_address(address)
    if (
        isinstance(target, tuple)
        and ipaddress.ip_address(
            socket.gethostbyname(target[0]) if family == socket.AF_INET else target[0]
        ).is_unspecified
    ):
        raise ValueError(f"{address!r} would listen on every interface; name the address the workers use")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if isinstance(target, tuple):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            _prepare_path(Path(target))
        listener.bind(target)
        if isinstance(target, str):
            Path(target).chmod(0o600)
        listener.listen(backlog)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address to connect to, with the port the kernel chose where 0 was asked for."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"tcp:[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"tcp:{name[0]}:{name[1]}"


def _prepare_path(path: Path) -> None:
    """Make the directory, refuse one that others may enter, and remove a socket nobody listens on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.parent.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{path.parent} is open to other users (mode {stat.S_IMODE(mode):o}); make it 0700")
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ValueError(f"something already listens on {path}; choose another path")
