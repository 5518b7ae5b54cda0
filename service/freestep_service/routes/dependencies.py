"""What handlers are given: the run that the path names, and the service's parts."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from fastapi import Depends, Path, Request

from freestep.models import Point
from freestep_service.registry import Registry
from freestep_service.run import Run
from freestep_service.settings import Settings

__all__ = ["AnyRegistry", "AnyRun", "Dtype", "LeaseId", "Point", "RunName", "ServiceSettings"]

RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
LeaseId = Annotated[str, Path(min_length=1, max_length=200)]
Dtype = Literal["F32", "BF16", "F16"]


def _registry(request: Request) -> Registry:
    return cast(Registry, request.app.state.registry)


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


AnyRegistry = Annotated[Registry, Depends(_registry)]
ServiceSettings = Annotated[Settings, Depends(_settings)]


def _run(run: RunName, registry: AnyRegistry) -> Run:
    return registry.get(run)


AnyRun = Annotated[Run, Depends(_run)]
