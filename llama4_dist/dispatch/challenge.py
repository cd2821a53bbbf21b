"""A mutual HMAC-SHA256 challenge with the cluster secret. Does no input or output, and reads neither side's Hello.

    dialler to acceptor   magic 4 | version u16 | zero u16 | nonce 32
    acceptor to dialler   the same, with the acceptor's nonce
    dialler to acceptor   proof 32 | length u32 | Hello
    acceptor to dialler   proof 32 | length u32 | Hello, or the reason of a refusal

A proof is an HMAC over side, both nonces and every later byte, so it holds for one connection and one Hello, and no
byte of a Hello is parsed before it is checked. The dialler proves itself first: a stranger learns nothing. The magic
says what is spoken afterwards; a proof for one protocol is of no use in another.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from typing import Generic, TypeVar

from llama4_dist.errors import HandshakeError

VERSION = 4
MAX_HELLO_BYTES = 2048
Agreed = TypeVar("Agreed")
_GREETING = struct.Struct("<4sHH32s")
_PROVEN = struct.Struct("<32sI")
_MIN_SECRET_BYTES = 16


class Acceptor:
    """The accepting side of one connection: `feed` it what arrives, send what it returns, until it `is_answered`.

    `answer` is given the dialler's Hello once it is proved, and returns the body to answer with.
    """

    def __init__(self, secret: bytes, answer: Callable[[bytes], bytes], *, magic: bytes) -> None:
        self.is_answered = False
        self._secret = secret
        self._answer = answer
        self._magic = magic
        self._nonce = secrets.token_bytes(32)
        self._peer_nonce = b""
        self._buffer = b""

    def feed(self, received: bytes) -> bytes:
        """Take bytes and return the bytes to answer with; HandshakeError means close without an answer."""
        self._buffer += received
        if not self._peer_nonce:
            if len(self._buffer) < _GREETING.size:
                return b""
            self._peer_nonce = _nonce_of(self._take(_GREETING.size), self._magic)
            return _GREETING.pack(self._magic, VERSION, 0, self._nonce) + self.feed(b"")
        if len(self._buffer) < _PROVEN.size:
            return b""
        proof, length = _PROVEN.unpack_from(self._buffer)
        if length > MAX_HELLO_BYTES:
            raise failed("HELLO_LENGTH", f"a Hello of {length} bytes; at most {MAX_HELLO_BYTES}")
        if len(self._buffer) < _PROVEN.size + length:
            return b""
        self._take(_PROVEN.size)
        body = self._take(length)
        if self._buffer:
            raise failed("BYTES_BEFORE_ANSWER", "the peer sent more before it was accepted")
        nonces = self._magic + self._peer_nonce + self._nonce
        if not hmac.compare_digest(proof, _proof(self._secret, b"worker", nonces, body)):
            raise failed("SECRET_WRONG", "the peer does not know the cluster secret")
        answer = self._answer(body)
        self.is_answered = True
        return _PROVEN.pack(_proof(self._secret, b"host", nonces + body, answer), len(answer)) + answer

    def _take(self, length: int) -> bytes:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


class Dialler(Generic[Agreed]):
    """The dialling side: send `greeting`, then `prove` with what came back, then `finish` with the answer.

    `hello` is the body that is sent; `read` is given the acceptor's once it is proved.
    """

    ANSWER_PREFIX_BYTES = _PROVEN.size
    GREETING_BYTES = _GREETING.size

    def __init__(self, secret: bytes, hello: bytes, read: Callable[[bytes], Agreed], *, magic: bytes) -> None:
        self._secret = secret
        self._hello = hello
        self._read = read
        self._magic = magic
        self._nonce = secrets.token_bytes(32)

    def greeting(self) -> bytes:
        return _GREETING.pack(self._magic, VERSION, 0, self._nonce)

    def prove(self, host_greeting: bytes) -> bytes:
        nonces = self._magic + self._nonce + _nonce_of(host_greeting, self._magic)
        self._transcript = nonces + self._hello
        proof = _proof(self._secret, b"worker", nonces, self._hello)
        return _PROVEN.pack(proof, len(self._hello)) + self._hello

    def answer_len(self, prefix: bytes) -> int:
        """Return how many bytes follow the answer's prefix."""
        length: int = _PROVEN.unpack(prefix)[1]
        if length > MAX_HELLO_BYTES:
            raise failed("HELLO_LENGTH", f"an answer of {length} bytes; at most {MAX_HELLO_BYTES}")
        return length

    def finish(self, prefix: bytes, body: bytes) -> Agreed:
        """Check who answered, and read what; HandshakeError with the acceptor's reason when it refused."""
        proof = _PROVEN.unpack(prefix)[0]
        if not hmac.compare_digest(proof, _proof(self._secret, b"host", self._transcript, body)):
            raise failed("SECRET_WRONG", "the host does not know the cluster secret")
        return self._read(body)


def check_secret(secret: bytes) -> None:
    """Refuse a secret short enough to be guessed."""
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(secret)} bytes; use at least {_MIN_SECRET_BYTES} random ones")


def failed(reason: str, message: str) -> HandshakeError:
    """Return the error of a handshake."""
    return HandshakeError(message, reason=reason)


def _nonce_of(greeting: bytes, magic: bytes) -> bytes:
    theirs, version, zero, nonce = _GREETING.unpack(greeting)
    if theirs != magic or zero:
        raise failed("GREETING_WRONG", "the peer does not speak this protocol")
    if version != VERSION:
        raise failed("PROTOCOL_VERSION", f"the peer speaks protocol version {version}, this build {VERSION}")
    return bytes(nonce)


def _proof(secret: bytes, side: bytes, transcript: bytes, body: bytes) -> bytes:
    return hmac.new(secret, side + b"\0" + transcript + body, hashlib.sha256).digest()
