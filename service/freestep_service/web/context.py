"""The parts of the service that handlers use, in one place of the application's state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from starlette.requests import Request

from freestep_service.access.audit import AuditLog
from freestep_service.access.sign_in_links import SignInLinks
from freestep_service.access.tokens import Tokens
from freestep_service.coordination.store import Store
from freestep_service.runs.registry import Registry
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import Settings
from freestep_service.web.json_bodies import JsonBodies
from freestep_service.web.memories import Memories
from freestep_service.web.relay import Relay

__all__ = ["ServiceContext"]


@dataclass(frozen=True)
class ServiceContext:
    """What a service that has started consists of; it stands in `app.state.context`."""

    settings: Settings
    store: Store
    claims: StorageClaims
    relay: Relay
    registry: Registry
    tokens: Tokens
    links: SignInLinks
    audit: AuditLog
    metrics: Metrics
    json_bodies: JsonBodies
    device: torch.device
    memories: Memories

    @staticmethod
    def of(request: Request) -> ServiceContext:
        context: ServiceContext = request.app.state.context
        return context
