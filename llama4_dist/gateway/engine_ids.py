"""How the engines know a client's request: by an id that no client can guess and every gateway of a cluster computes.

HMAC-SHA256 (RFC 2104) over tenant and request id, so that any gateway finds what another one has started.
"""

import hashlib
import hmac
import secrets

KEY_LABEL = b"llama4_dist engine ids v1"


def engine_id_key(cluster_secret: bytes) -> bytes:
    """Derive the key that the gateways of a cluster share."""
    return hmac.new(cluster_secret, KEY_LABEL, hashlib.sha256).digest()


class EngineIds:
    """Ids and seeds of requests; without a key from a cluster they mean something in this process only."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key or secrets.token_bytes(32)

    def engine_id(self, tenant: str, request_id: str) -> str:
        """Return the id of a tenant's request."""
        return self._mac("id", tenant, request_id).hex()

    def seed(self, tenant: str, request_id: str) -> int:
        """Return the seed of a request that names none: another gateway must go on with the same draws."""
        return int.from_bytes(self._mac("seed", tenant, request_id)[:8], "big")

    def tenant(self, tenant: str) -> str:
        """Return what engines know a tenant by: it says who is the same, and not by which credential."""
        return self._mac("tenant", tenant, "").hex()

    def _mac(self, purpose: str, tenant: str, request_id: str) -> bytes:
        # Neither part can contain the separator: a tenant is hexadecimal, a request id is checked.
        message = "\n".join((purpose, tenant, request_id)).encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()
