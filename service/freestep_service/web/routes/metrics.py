"""Metrics that evaluators report."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from freestep.api.models import MetricReceipt, MetricReport
from freestep.errors import EpochChanged, IdempotencyConflict, RunNotInitialized, StorageUnavailable
from freestep_service.web.guard import needs
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun

router = APIRouter(tags=["metrics"], route_class=JsonRoute)


@router.post("/v1/runs/{run}/metrics", response_model=MetricReceipt)
@needs("read")
@refuses(RunNotInitialized, EpochChanged, IdempotencyConflict, StorageUnavailable)
async def report_metric(run: AnyRun, report: MetricReport, request: Request, relay: AnyRelay) -> Any:
    """Reports a metric measured at the x of a step; a report counts once, however often it is sent."""
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    return await run.reports.report(report)
