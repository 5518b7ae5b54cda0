"""The service's settings: environment variables FREESTEP_*, and the same names as flags of `freestep serve`."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["BadSetting", "CannotStart", "Settings"]


class CannotStart(Exception):
    """What keeps the service from starting: one line that says what is wrong and what to do about it."""

    exit_code = 1


class BadSetting(CannotStart):
    """A setting is wrong wherever the service is started."""

    exit_code = 2


class Settings(BaseSettings):
    """Run the freestep service. Each setting is a flag here and an environment variable FREESTEP_NAME."""

    model_config = SettingsConfigDict(
        env_prefix="FREESTEP_",
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="freestep serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    host: str = "127.0.0.1"
    """The address to listen on; without tokens it must be a loopback address, unless `insecure` is set."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port to listen on; 0 takes a free one, which the first line of output names."""
    insecure: bool = False
    """Lets anybody who can reach the address use the service."""
    ssl_certfile: Path | None = None
    """A certificate and those between it and its CA, as PEM: the service then speaks TLS, and nothing else."""
    ssl_keyfile: Path | None = None
    """The certificate's private key, as PEM, unless it is in the same file."""
    ssl_keyfile_password: SecretStr | None = None
    """What the key is encrypted with, if it is."""
    ca_certs: Path | None = None
    """CA certificates, as PEM, that those of other services have to be from; else the system's, or SSL_CERT_FILE's."""
    data_dir: Path = Path("freestep-data")
    """Where checkpoints and the embedded store live."""
    checkpoint_url: str | None = None
    """Where checkpoints go instead: a path, or an fsspec URL such as s3://bucket/folder."""
    redis_url: str | None = None
    """A Redis-protocol server; without one the service starts its own. Services that share it share its runs."""
    advertise_url: str | None = None
    """The URL at which clients and other services reach this one; else it is made of host and port."""
    owner_ttl_seconds: Annotated[float, Field(ge=1)] = 10.0
    """How long a service that is silent keeps its shards before others take them."""
    device: str = "auto"
    """Where parameters live: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads for tensor arithmetic; 0 takes half the cores, at least one."""
    inline_elements: Annotated[int, Field(ge=0)] = 128 * 1024
    """Shards of no more elements are updated on the event loop's thread, within some 0.1 ms, sooner than another thread
    would begin; 0 does that for none."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**3
    """The longest body accepted."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 10_000
    """A checkpoint is written after this many steps ..."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    """... or this many seconds after the last, if there were steps since."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 3
    """How many checkpoints of a run are kept."""
    stall_seconds: Annotated[float, Field(gt=0)] = 10.0
    """A body, either way, may stand still this long before its connection is given up."""
    slow_bytes_per_second: Annotated[float, Field(gt=0)] = 4 * 1024**2
    """A peer that sends or receives a body more slowly than this is slow: its memory is counted apart."""
    memory_bytes: Annotated[int, Field(gt=0)] | None = None
    """Host memory that runs may take, by which their creation is checked; else seven eighths of the machine's, or of
    its cgroup's."""
    slow_peer_bytes: Annotated[int, Field(ge=0)] | None = None
    """Memory for what slow peers hold, over all runs; else an eighth of the machine's. Where it is used up and others
    wait, the slowest peer's connection ends."""
    queue_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a body may wait for memory before it is refused as overloaded."""
    commit_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long a push waits for Redis before it is answered with coordinator-unavailable."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least serious log lines that are printed."""
    access_log: bool = False
    """Prints a line for every request."""

    @model_validator(mode="after")
    def _loopback_unless_insecure(self) -> Settings:
        if not self.insecure and not _is_loopback(self.host):
            raise ValueError(
                f"without tokens the service listens on loopback only, and {self.host} is not; "
                "set insecure to let anybody who can reach it use it"
            )
        return self

    @model_validator(mode="after")
    def _tls_as_a_whole(self) -> Settings:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password):
            raise ValueError("a key needs its certificate: set ssl_certfile too")
        if self.ssl_certfile and self.advertise_url and not self.advertise_url.startswith("https://"):
            raise ValueError(f"with a certificate the service speaks TLS only: {self.advertise_url} must be https")
        return self

    def own_url(self) -> str:
        """The URL at which this service is reached; one that listens everywhere goes by its host's name."""
        if self.advertise_url is not None:
            return self.advertise_url.rstrip("/")
        return self.url_of(socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host, self.port)

    def url_of(self, host: str, port: int) -> str:
        """The service's URL at an address."""
        return f"http{'s' if self.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    def thread_count(self) -> int:
        """Threads for tensor arithmetic: more than this spin against the event loop and each other."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
