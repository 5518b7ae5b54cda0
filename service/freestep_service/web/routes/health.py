"""Liveness, readiness, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answers while the process serves requests."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, Any]:
    """Answers 200 when Redis answers and the device computes, else coordinator-unavailable."""
    await request.app.state.store.ping()
    device = request.app.state.device
    # A GPU does first what it was asked before.
    await asyncio.to_thread(lambda: torch.zeros(1, device=device).add_(1).item())
    return {"status": "ready", "device": str(device)}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(request.app.state.metrics.expose(), media_type=CONTENT_TYPE_LATEST)
