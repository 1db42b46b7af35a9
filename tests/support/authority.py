"""Certificates of a test's own, as files."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """An authority, with a server on 127.0.0.1 and a client whom it knows.

    Attributes:
        ca: file of its own certificate.
        server, client: files of their certificates, and
        server_key, client_key: of their keys.
    """

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server, self.server_key = self._issue(authority, directory, "server", "127.0.0.1")
        self.client, self.client_key = self._issue(authority, directory, "client", "client@example.org")

    def _issue(self, authority: trustme.CA, directory: Path, name: str, identity: str) -> tuple[Path, Path]:
        issued = authority.issue_cert(identity)
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(str(certificate), append=number > 0)
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key
