"""An OpenID Connect issuer: keys, a real server of its documents in a thread, and the tokens that it signs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from meanwhile import end

AUDIENCE = "freestep"
CONFIGURATION, KEYS = "/.well-known/openid-configuration", "/keys"


@cache
def key_pair(kind: str, number: int = 0) -> Any:
    """A private key: RSA, EC or OKP; made once for each number."""
    if kind == "RSA":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1()) if kind == "EC" else ed25519.Ed25519PrivateKey.generate()


def public_jwk(private: Any, **more: Any) -> dict[str, Any]:
    """A key as the issuer publishes it."""
    kinds = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    kind: Any = next((each for key, each in kinds.items() if isinstance(private, key)), OKPAlgorithm)
    return {**kind.to_jwk(private.public_key(), as_dict=True), "use": "sig", **more}


def encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


@dataclass
class Issuer:
    """The issuer. `documents` is what its server answers with, by path: an object as JSON, or bytes; a status else."""

    tls: ssl.SSLContext | None = None
    documents: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """The paths of requests, and the credentials that they carried."""

    def __post_init__(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append((self.path, self.headers["Authorization"]))
                document = issuer.documents.get(self.path, 404)
                if isinstance(document, int):
                    self.send_response(document)
                    self.send_header("Location", "/elsewhere")
                    self.end_headers()
                    return
                content = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.server_port}"
        self.documents[CONFIGURATION] = {"issuer": self.url, "jwks_uri": self.url + KEYS}
        self.publish(one=key_pair("RSA"))

    def publish(self, **keys: Any) -> None:
        """Publishes some keys, by their IDs, and no others."""
        self.documents[KEYS] = {"keys": [public_jwk(key, kid=key_id) for key_id, key in keys.items()]}

    def readings(self) -> int:
        """How often the keys were read."""
        return sum(path == KEYS for path, _ in self.asked)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of a good token; those that are changed to None are left out."""
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "worker", "iat": now, "exp": now + 600, **changes}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, private: Any = None, algorithm: str = "RS256", kid: str | None = "one", **changes: Any) -> str:
        """A token that the issuer has signed; `changes` are claims."""
        headers = {} if kid is None else {"kid": kid}
        # Unlike jwt.encode, it signs whatever claims there are.
        return jwt.PyJWS().encode(
            json.dumps(self.claims(**changes)).encode(), private or key_pair("RSA"), algorithm, headers
        )

    def forged(self, algorithm: str) -> str:
        """A token that anybody can make: without a signature, or signed with the public key as an HMAC's secret."""
        header = {"alg": algorithm, "typ": "JWT", "kid": "one"}
        signed = ".".join(encoded(json.dumps(part).encode()) for part in (header, self.claims()))
        public = key_pair("RSA").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        signature = b"" if algorithm.lower() == "none" else hmac.digest(public, signed.encode(), hashlib.sha256)
        return f"{signed}.{encoded(signature)}"

    def settings(self, *rules: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The settings of a service that takes the issuer's tokens."""
        return {
            "oidc_issuer": self.url,
            "oidc_audience": AUDIENCE,
            "oidc_rules": json.dumps(rules or [{"claim": "sub", "matches": "*", "scope": "push"}]),
            **more,
        }

    def close(self) -> None:
        """Ends the server; nobody listens at its place any more."""
        self._server.shutdown()
        self._server.server_close()
        end(self._thread)
