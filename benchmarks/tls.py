"""What TLS costs: push + pull of one worker over it, beside the same without it, in turn."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import trustme

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS, QUICK_PARAMETERS = 25_000_000, 5_000_000
ROUNDS, QUICK_ROUNDS, WARMUP = 15, 5, 2


def report(options: Options) -> Report:
    parameters = QUICK_PARAMETERS if options.quick else PARAMETERS
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="freestep-bench-")))
        authority, certificate, trusted = trustme.CA(), folder / "certificate.pem", folder / "ca.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
        authority.cert_pem.write_to_path(trusted)

        def worker(**settings: str) -> Worker:
            service = stack.enter_context(running_service(ca_certs=str(trusted), **settings))
            client = stack.enter_context(Client(service.url, verify=trusted))
            return stack.enter_context(Worker(new_run(client, "tls", parameters)))

        plain, secure = worker(), worker(ssl_certfile=str(certificate))
        taken = [(plain.push(), secure.push()) for _ in range(WARMUP + rounds)][WARMUP:]
    name = f"{parameters / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, plain HTTP", [1e3 * without for without, _ in taken], "ms"),
            Figure.of(f"{name}, over TLS", [1e3 * with_ for _, with_ in taken], "ms"),
            Figure.of("push + pull over TLS, of plain HTTP", [with_ / without for without, with_ in taken], "×"),
        ]
    )
