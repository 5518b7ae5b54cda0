"""The service's settings: environment variables FREESTEP_*, and the same names as flags of `freestep serve`."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, Json, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from freestep.api.token_form import Scope
from freestep.api.token_places import is_loopback
from freestep.api.tokens import RunPattern, WorkerPattern

__all__ = ["BadSetting", "CannotStart", "ClaimRule", "Settings", "is_safe", "misspelt", "shown"]

_ASYMMETRIC = (*(f"{family}{bits}" for family in ("RS", "PS", "ES") for bits in (256, 384, 512)), "EdDSA")
"""The algorithms of RFC 7518 and RFC 8037 whose keys an issuer publishes. Under the others (HMAC, none) whoever can
verify a token, or anybody, can make one."""


_PREFIX = "FREESTEP_"
_ALIKE = 0.85
"""How alike two names are (difflib's ratio) of which one is taken for the other, misspelt. No variable of clients, such
as FREESTEP_TOKEN_FILE, is so like a setting's."""


def shown(place: object) -> str:
    """A path, a URL or a chain of URLs as it may stand in errors and logs: without user, password, query, fragment."""
    links = [re.sub(r"://.*@", "://", link, flags=re.DOTALL) for link in str(place).split("::")]
    return "::".join(re.split(r"[?#]", link)[0] if "://" in link else link for link in links)


def is_safe(url: str) -> bool:
    """Whether nobody on the way can change what is read at a URL: it is https, or on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))


class CannotStart(Exception):
    """The service cannot start; the message is one line with the cause and the remedy."""

    exit_code = 1


class BadSetting(CannotStart):
    """The cause is a setting, which is wrong wherever the service is started."""

    exit_code = 2


class ClaimRule(BaseModel):
    """What a token of an OpenID Connect issuer allows whose claim fits a pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    """The claim, or the names that lead to one within objects: ["kubernetes.io", "namespace"]. Of a list, any member
    has to fit."""
    matches: Annotated[str, Field(min_length=1)]
    """A pattern, as in shells."""
    scope: Scope
    runs: RunPattern = "*"
    workers: WorkerPattern | None = None


class Settings(BaseSettings):
    """Run the freestep service. Each setting is a flag here and an environment variable FREESTEP_NAME."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="freestep serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one. The first line of output is the URL, once requests are answered."""
    insecure: bool = False
    """Turns tokens off: everybody who can reach the service may do everything."""
    ssl_certfile: Path | None = None
    """Certificate, followed by those between it and its CA, as PEM. The service then speaks TLS only."""
    ssl_keyfile: Path | None = None
    """Private key of the certificate, as PEM, if it is in another file."""
    ssl_keyfile_password: SecretStr | None = None
    """Password of the private key, if that is encrypted."""
    ssl_client_ca: Path | None = None
    """CA certificates, as PEM, of clients: a connection with a certificate that one of them signed needs no token."""
    ssl_client_scope: Scope = "push"
    """What such a certificate allows, as the scope of a token: read, push or admin ..."""
    ssl_client_runs: RunPattern = "*"
    """... for the runs whose names fit this pattern ..."""
    ssl_client_workers: WorkerPattern | None = None
    """... under worker names that fit this one, in which {name} is the certificate's common name: {name}-*."""
    ca_certs: Path | None = None
    """CA certificates, as PEM, to trust when other services are called; by default SSL_CERT_FILE's or the system's."""
    data_dir: Path = Path("freestep-data")
    """Directory of the embedded store, and of checkpoints unless `checkpoint_url` is set."""
    admin_token_file: Path | None = None
    """File with a token that allows everything, made if there is none; by default `admin-token` in `data_dir`."""
    push_token_file: Path | None = None
    """File with a token for the workers of all runs, made if there is none; by default there is no such token."""
    oidc_issuer: str | None = None
    """OpenID Connect issuer whose tokens (JWT) count too, as their `iss` has it. Needs oidc_audience and oidc_rules."""
    oidc_audience: str | None = None
    """The audience, `aud`, that such tokens have to be for."""
    oidc_rules: Json[tuple[ClaimRule, ...]] | None = None
    """What such tokens allow, a JSON list of {"claim": "sub", "matches": PATTERN, "scope": "push", "runs": PATTERN,
    "workers": PATTERN}: the first rule that fits counts; runs and workers are any if they are left out."""
    oidc_jwks_url: str | None = None
    """URL of the issuer's keys; by default what its /.well-known/openid-configuration names."""
    oidc_algorithms: str = ",".join(_ASYMMETRIC)
    """Algorithms of signatures that are accepted, separated by commas."""
    oidc_ca_certs: Path | None = None
    """CA certificates, as PEM, to trust when keys are read; by default SSL_CERT_FILE's or the system's."""
    oidc_token_file: Path | None = None
    """File with a token to read the keys with, which Kubernetes asks for."""
    push_max_runs: Annotated[int, Field(ge=0)] | None = 1000
    """Runs that a push token may have created at once, unless it was made with another quota; of those below, too."""
    push_max_parameters: Annotated[int, Field(ge=0)] | None = None
    """Elements of the parameters of all runs that a push token has created; by default without bound."""
    push_max_leases: Annotated[int, Field(ge=0)] | None = 10_000
    """Leases that a push token may have at once."""
    push_max_bytes_per_minute: Annotated[int, Field(gt=0)] | None = None
    """Bytes of tensors that a push token may send and receive in a minute at this service; by default without bound."""
    journal_dir: Path | None = None
    """Directory of the journals of runs with durability `journal`, on a disk of this host's; by default `journal` in
    `data_dir`."""
    journal_max_bytes: Annotated[int, Field(ge=1024**2)] = 4 * 1024**3
    """A journal of a shard that is as long brings the run's next checkpoint forward, behind which it is cut."""
    journal_wait_seconds: Annotated[float, Field(ge=0)] = 600.0
    """Seconds for which a shard without an owner waits for the host that has its journal; then it goes back to the
    newest checkpoint, in a new epoch, and what was acknowledged since is lost. `inf`: it waits as long as it takes."""
    checkpoint_url: str | None = None
    """Place of checkpoints: a path, or an fsspec URL such as s3://bucket/folder."""
    redis_url: str | None = None
    """Redis-protocol server; by default the service starts its own. Services with the same Redis share their runs."""
    redis_password_file: Path | None = None
    """File with the password of that server, which `redis_url` then has not. It is read for each connection, so another
    password may take its place while the service runs."""
    redis_wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds for which a start waits for a Redis that does not answer; then the service ends."""
    advertise_url: str | None = None
    """URL at which clients and other services reach this service; by default made of host and port."""
    allowed_hosts: str = ""
    """Names by which clients may also reach this service, separated by commas: train.example.org,*.example.net. Its
    advertised host, the machine's name, loopback and plain addresses need not be named."""
    trusted_proxies: str = ""
    """Addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, separated by
    commas."""
    owner_ttl_seconds: Annotated[float, Field(ge=1)] = 10.0
    """Seconds without a heartbeat after which other services take over this service's shards."""
    device: str = "auto"
    """Device of parameters and optimizer state: cpu, cuda, cuda:N, or auto (cuda if there is a GPU)."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads for tensor arithmetic; 0 is half the cores, at least one."""
    inline_elements: Annotated[int, Field(ge=0)] = 1024 * 1024
    """Shards of at most this many elements are updated, and bodies for them decoded, on the event loop's thread: that
    takes about 1 ms, and to have another thread do it takes longer. Most pushes to a run of one such shard are then one
    call of Redis instead of two. What takes more than one pass over the elements (Muon, robust means of several pushes,
    bodies encoded as topk) is done there up to an eighth of this. 0: none of it is."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**3
    """Longest request body that is accepted, in bytes."""
    head_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    """Longest head of a request that is accepted, in bytes ..."""
    head_fields: Annotated[int, Field(ge=16)] = 100
    """... and the most header fields in it."""
    head_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds within which the head of a request has to come, and a TLS handshake to be made."""
    json_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds within which a JSON body has to come."""
    idle_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a connection without a request is closed. Clients keep theirs for 50."""
    max_connections: Annotated[int, Field(ge=1)] | None = None
    """Connections at once; by default half of the descriptors that the process may have, less 256 for the store, for
    checkpoints and for other services. If all are taken, the one that has been idle for the longest is closed ..."""
    max_connections_per_address: Annotated[int, Field(ge=1)] | None = None
    """... and connections at once from one address (of IPv6, one /64); by default half of those. Behind a proxy, all
    come from one."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 10_000
    """Steps after which a checkpoint is written ..."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    """... or seconds after the last one, if there were steps since."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    """Number of checkpoints of a run that are kept."""
    stall_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds without progress after which a request's body is refused, and a response's connection aborted."""
    slow_bytes_per_second: Annotated[float, Field(gt=0)] = 4 * 1024**2
    """Bytes a second below which a peer is slow: the memory that its body takes is counted apart."""
    memory_bytes: Annotated[int, Field(gt=0)] | None = None
    """Host memory in bytes for all runs, by which their creation and changes of them are checked; by default seven
    eighths of the machine's or of its cgroup's."""
    slow_peer_bytes: Annotated[int, Field(ge=0)] | None = None
    """Host memory in bytes for bodies of slow peers, over all runs; by default an eighth of the machine's. If it is
    used up and other peers wait, the slowest peer's connection ends."""
    queue_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a body may wait for memory before it is refused as overloaded."""
    commit_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that a push waits for Redis before it is refused with coordinator-unavailable."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the log lines that are printed."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people, or JSON objects with run, worker, step and push key as fields."""
    traces: bool = False
    """Sends OpenTelemetry traces of pushes, to where OTEL_EXPORTER_OTLP_ENDPOINT says. Needs freestep[otel]."""
    shared_memory: bool = True
    """Shares memory for large bodies with clients of the same user on this machine; Linux only."""
    access_log: bool = False
    """Logs a line for every request."""

    @field_validator("advertise_url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{shown(url)} is no http or https URL of a service")
        return url

    @field_validator("oidc_issuer", "oidc_jwks_url")
    @classmethod
    def _is_safe(cls, url: str | None) -> str | None:
        if url is not None and not is_safe(url):
            raise ValueError(f"{shown(url)} must be an https URL: who can change the keys on their way can make tokens")
        return url

    @field_validator("oidc_algorithms")
    @classmethod
    def _are_asymmetric(cls, algorithms: str) -> str:
        chosen = _listed(algorithms)
        if not chosen or not set(chosen) <= set(_ASYMMETRIC):
            raise ValueError(f"{algorithms} cannot be used: choose of {', '.join(_ASYMMETRIC)}")
        return algorithms

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, proxies: str) -> str:
        for each in _listed(proxies):
            ipaddress.ip_network(each, strict=False)
        return proxies

    @model_validator(mode="after")
    def _tls_as_a_whole(self) -> Settings:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password):
            raise ValueError("a key needs its certificate: set ssl_certfile too")
        if self.ssl_certfile and self.advertise_url and not self.advertise_url.startswith("https://"):
            raise ValueError(
                f"with a certificate the service speaks TLS only: {shown(self.advertise_url)} must be https"
            )
        if self.ssl_client_ca and self.ssl_certfile is None:
            raise ValueError("certificates of clients come over TLS: set ssl_certfile too")
        return self

    @model_validator(mode="after")
    def _one_password_of_redis(self) -> Settings:
        if self.redis_password_file is None:
            return self
        if self.redis_url is None:
            raise ValueError("redis_password_file is for a Redis: set redis_url too")
        parts = urlsplit(self.redis_url)
        if parts.password is not None or "password" in parse_qs(parts.query, keep_blank_values=True):
            raise ValueError("redis_password_file and redis_url both have a password: leave it out of redis_url")
        return self

    @model_validator(mode="after")
    def _issuer_as_a_whole(self) -> Settings:
        if self.oidc_issuer is None:
            given = ("oidc_audience", "oidc_rules", "oidc_jwks_url", "oidc_ca_certs", "oidc_token_file")
            if any(getattr(self, name) for name in given):
                raise ValueError("tokens of an OpenID Connect issuer need its name: set oidc_issuer too")
        elif not self.oidc_audience or not self.oidc_rules:
            raise ValueError(
                "oidc_issuer needs oidc_audience and oidc_rules: who its tokens are for, and what they allow"
            )
        return self

    def own_url(self) -> str:
        """The URL at which this service is reached; by its host's name if it listens on all addresses."""
        if self.advertise_url is not None:
            return self.advertise_url.rstrip("/")
        return self.url_of(socket.gethostname() if self.takes_all_addresses else self.host, self.port)

    @property
    def takes_all_addresses(self) -> bool:
        """Whether it listens on all addresses of its machine."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            # A name.
            return False

    def url_of(self, host: str, port: int) -> str:
        """The service's URL for an address."""
        return f"http{'s' if self.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    def host_patterns(self) -> list[str]:
        """The patterns of `allowed_hosts`."""
        return [each.lower() for each in _listed(self.allowed_hosts)]

    def issuer_algorithms(self) -> list[str]:
        """The algorithms of `oidc_algorithms`."""
        return _listed(self.oidc_algorithms)

    def proxy_addresses(self) -> list[str]:
        """The networks of `trusted_proxies`, each by its first address: uvicorn believes no other."""
        return [str(ipaddress.ip_network(each, strict=False)) for each in _listed(self.trusted_proxies)]

    def journals(self) -> Path:
        """Where journals are kept."""
        return self.journal_dir or self.data_dir / "journal"

    def thread_count(self) -> int:
        """Threads for tensor arithmetic. More of them would spin against the event loop and each other."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)


def _listed(text: str) -> list[str]:
    return [part for each in text.split(",") if (part := each.strip())]


def misspelt(variables: Iterable[str]) -> dict[str, str]:
    """Environment variables that are no setting's but nearly: each with that which is probably meant."""
    known = [name.upper() for name in Settings.model_fields]
    found: dict[str, str] = {}
    for variable in variables:
        name = variable.upper().removeprefix(_PREFIX)
        if variable.upper().startswith(_PREFIX) and name not in known:
            for near in get_close_matches(name, known, 1, _ALIKE):
                found[variable] = _PREFIX + near
    return found
