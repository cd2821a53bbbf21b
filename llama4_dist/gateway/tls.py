"""TLS and mutual TLS from files, read again when they change, so certificates rotate without a restart."""

import logging
import ssl
from pathlib import Path

import grpc

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

Files = tuple[Path, Path, Path | None]  # certificate chain, key, client CA


def server_credentials(settings: GatewaySettings) -> grpc.ServerCredentials | None:
    """Build the port's credentials; None for plaintext. Raise ConfigError for files that cannot work."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    files: Files = (settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    check_pair(files)
    return grpc.dynamic_ssl_server_credentials(
        certificate_configuration(files),
        Reloader(files),  # type: ignore[arg-type]  # None means unchanged; the stubs miss it
        require_client_authentication=settings.tls_client_ca is not None,
    )


def certificate_configuration(files: Files) -> grpc.ServerCertificateConfiguration:
    """Read the files."""
    certificate, key, client_ca = files
    root = client_ca.read_bytes() if client_ca is not None else None
    return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], root)


def check_pair(files: Files) -> None:
    """Raise ConfigError unless the key fits the certificate, the certificate is in date and the CA file is one."""
    certificate, key, client_ca = files
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key, password="")
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Trusting the leaf itself makes the handshake check its dates and nothing else.
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client.check_hostname = False
        client.load_verify_locations(certificate)
        handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"tls_certificate {certificate}: {error.verify_message}: renew it") from None
    except ssl.SSLError as error:
        raise ConfigError(f"tls_certificate {certificate} and tls_key {key}: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"tls_certificate {certificate} or tls_key {key}: {error.strerror}") from None
    if client_ca is not None:
        check_authority(client_ca)


def check_authority(client_ca: Path) -> None:
    """Raise ConfigError unless the file holds a CA certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise ConfigError(f"tls_client_ca {client_ca}: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"tls_client_ca {client_ca}: {error.strerror}") from None


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Shake hands in memory; raise what the client finds wrong."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


class Reloader:
    """Called by gRPC for every handshake: a new configuration when the files changed, None when not."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._seen = self._stamps()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration; keep serving the old one while the files do not fit together."""
        try:
            stamps = self._stamps()
            if stamps == self._seen:
                return None
            check_pair(self._files)
            configuration = certificate_configuration(self._files)
        except (ConfigError, OSError) as error:
            log.warning("tls_reload_failed cause=%s", error)
            return None
        self._seen = stamps
        log.info("tls_reloaded")
        return configuration

    def _stamps(self) -> list[tuple[int, int]]:
        infos = [file.stat() for file in self._files if file is not None]
        return [(info.st_mtime_ns, info.st_ino) for info in infos]
