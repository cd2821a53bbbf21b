"""Bearer tokens: who may call what, decided before any message is parsed and before a method is looked up.

Token file: one token a line, `admin TOKEN` for the admin scope; blank lines and lines starting with # are skipped.
Health checks are exempt, so that a probe needs no secret.
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import grpc

from llama4_dist.errors import ConfigError, Llama4Error, PermissionDeniedError, UnauthenticatedError
from llama4_dist.gateway.handlers import Context, Handler
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.rpc import status

MIN_TOKEN_CHARS = 16
MAX_TOKENS = 1024
MAX_FILE_BYTES = 256 * 1024
OPEN_PREFIX = "/grpc.health.v1.Health/"


class Scope(IntEnum):
    """What a credential covers; a higher scope includes the lower."""

    NORMAL = 1
    ADMIN = 2


class Tokens:
    """The accepted tokens, kept as digests: comparing digests of equal length leaks nothing of a token."""

    def __init__(self, scopes: Sequence[tuple[str, Scope]]) -> None:
        self._digests = [(hashlib.sha256(token.encode()).digest(), scope) for token, scope in scopes]

    def scope_of(self, token: str) -> Scope | None:
        """Return the token's scope or None; compares with every token, whichever matches."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, scope in self._digests:
            if hmac.compare_digest(known, digest):
                found = scope
        return found

    def cover(self, scope: Scope) -> bool:
        """Tell whether any token has this scope."""
        return any(granted >= scope for _, granted in self._digests)


def read_tokens(file: Path) -> Tokens:
    """Read the token file; raise ConfigError if others can read it, it is empty, or a token is weak."""
    try:
        info = file.stat()
        text = file.read_text(encoding="ascii") if info.st_size <= MAX_FILE_BYTES else ""
    except OSError as error:
        raise ConfigError(f"token_file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"token_file {file}: tokens are printable ASCII") from None
    if is_open_to_others(info, user=os.geteuid(), groups={os.getegid(), *os.getgroups()}):
        raise ConfigError(f"token_file {file} is open to other users: chmod 600 it")
    scopes = [parse_line(line, file) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not 1 <= len(scopes) <= MAX_TOKENS:
        raise ConfigError(
            f"token_file {file} holds {len(scopes)} tokens in {info.st_size} bytes: give 1 to {MAX_TOKENS}"
        )
    return Tokens(scopes)


def is_open_to_others(info: os.stat_result, *, user: int, groups: Collection[int]) -> bool:
    """Tell whether anybody but this user may read or write the file.

    Root may hand a file to a service by the service's own group, and Kubernetes and systemd do: a Secret's volume is
    root's, mode 0440, of the pod's fsGroup.
    """
    handed_over = info.st_uid == 0 and user != 0 and info.st_gid in groups
    forbidden = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP | (0 if handed_over else stat.S_IRGRP)
    return bool(info.st_mode & forbidden)


def parse_line(line: str, file: Path) -> tuple[str, Scope]:
    """Read one line; its content never appears in the error."""
    match line.split():
        case [token]:
            scope = Scope.NORMAL
        case ["admin", token]:
            scope = Scope.ADMIN
        case _:
            token = ""
    if len(token) < MIN_TOKEN_CHARS or not token.isprintable():
        raise ConfigError(f"token_file {file}: a line is TOKEN or admin TOKEN, at least {MIN_TOKEN_CHARS} characters")
    return token, scope


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token of enough scope; unknown methods are UNIMPLEMENTED only to those who may ask.

    `tokens` None means the transport itself is the credential (loopback, mutual TLS) and grants `default_scope`.
    """

    def __init__(
        self, tokens: Tokens | None, admin_prefixes: Sequence[str], default_scope: Scope, metrics: Metrics
    ) -> None:
        self._tokens = tokens
        self._admin_prefixes = tuple(admin_prefixes)  # of method paths
        self._default_scope = default_scope
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Let the call pass, or answer it here."""
        error = self._problem(handler_call_details)
        return await continuation(handler_call_details) if error is None else self._refusal(error)

    def _problem(self, details: grpc.HandlerCallDetails) -> Llama4Error | None:
        if details.method.startswith(OPEN_PREFIX):
            return None
        scope: Scope | None = self._default_scope
        if self._tokens is not None:
            scope = self._tokens.scope_of(bearer_token(details.invocation_metadata))
        if scope is None:
            return UnauthenticatedError("give a valid token: metadata authorization = Bearer TOKEN")
        if details.method.startswith(self._admin_prefixes) and scope < Scope.ADMIN:
            return PermissionDeniedError("this method needs a token of the admin scope")
        return None

    def _refusal(self, error: Llama4Error) -> Handler:
        answer = status.to_status(error)

        async def refuse(request: bytes, context: Context) -> bytes:
            self._metrics.observe_refusal("any", status.code_of(error).name, error.reason)
            await context.abort(status.code_of(error), answer.message, status.trailing_metadata(error, answer))

        return grpc.unary_unary_rpc_method_handler(refuse)


def bearer_token(metadata: Any) -> str:
    """Return the token of the one authorization entry; "" if there is none, or several."""
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
