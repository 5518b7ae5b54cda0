"""The OpenAPI document says all that the service does, and the service does what it says.

That answers are as documented is checked in every test (documented.py); here requests are made of the document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis

from documented import Document, openapi
from freestep.errors import PROBLEMS, URN, RunNotFound, ShardUnavailable
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.problems import RETRY_AFTER_S, STATUSES, problem_response
from harness import AUTHORIZED, ThreadService
from meanwhile import DEADLINE_S
from plain_calls import BODY, Api

TESTS = Path(__file__).parent.parent
DOCUMENT = openapi()
OPERATIONS = {
    operation["operationId"]: operation for methods in DOCUMENT["paths"].values() for operation in methods.values()
}
TAGS = {tag for operation in OPERATIONS.values() for tag in operation["tags"]}
LONGER = os.environ.get("FREESTEP_OPENAPI_EXAMPLES")
"""How many requests are made of an operation, and how many walks along links, in a longer search."""


def parts(value: Any, name: str) -> Iterator[Any]:
    """The values of a name, wherever it stands in a document."""
    if isinstance(value, dict):
        yield from ([value[name]] if name in value else [])
        for each in value.values():
            yield from parts(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from parts(each, name)


def test_operations_are_named_by_their_handlers() -> None:
    assert set(OPERATIONS) == {
        *("create_run", "list_runs", "get_run", "delete_run", "get_topology", "reshard_run"),
        *("change_run", "end_worker"),
        *("initialize_run", "pull", "push", "export_state", "import_state", "report_metric"),
        *("grant_lease", "renew_lease", "release_lease", "list_leases", "share_memory"),
        *("read_events", "read_history"),
        *("create_data", "list_data", "show_data", "claim_units", "return_units"),
        *("write_checkpoint", "list_checkpoints", "restore_checkpoint"),
        *("create_token", "list_tokens", "revoke_token"),
        *("healthz", "readyz", "metrics"),
    }


def test_every_reference_leads_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    references = {each for each in parts(DOCUMENT, "$ref") if isinstance(each, str)}
    assert {each.rpartition("/")[2] for each in references} <= schemas.keys()
    assert not {name for name in schemas if "ValidationError" in name}
    for operation in OPERATIONS.values():
        for links in parts(operation["responses"], "links"):
            for link in links.values():
                target = OPERATIONS[link["operationId"]]
                assert link["parameters"].keys() <= {each["name"] for each in target.get("parameters", ())}


def test_every_operation_and_field_is_described() -> None:
    for name, operation in OPERATIONS.items():
        assert operation["description"], name
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], (name, parameter["name"])
        for response in operation["responses"].values():
            assert response["description"]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_is_described(problem: type) -> None:
    schema = DOCUMENT["components"]["schemas"][problem.__name__]
    fixed = {name: each["const"] for name, each in schema["properties"].items() if "const" in each}
    assert fixed == {"type": URN + problem.slug, "title": problem.title, "status": STATUSES[problem]}
    assert schema["description"]


def test_statuses_are_those_of_what_is_declared() -> None:
    renewal = OPERATIONS["renew_lease"]["responses"]
    assert set(renewal) == {"200", "400", "401", "403", "404", "408", "409", "410", "431", "500", "501", "503", "505"}
    assert "413" in OPERATIONS["grant_lease"]["responses"]
    # Orchestrators ask by any name and without a token.
    assert not {"401", "403", "404"} & OPERATIONS["healthz"]["responses"].keys()


def test_headers_of_refusals_are_those_that_they_have() -> None:
    for problem in RETRY_AFTER_S:
        assert "Retry-After" in problem_response(problem()).headers
        status = STATUSES[problem]
        is_always = all(each in RETRY_AFTER_S for each in PROBLEMS.values() if STATUSES[each] == status)
        responses = [each["responses"].get(str(status), {}) for each in OPERATIONS.values()]
        found = [each["headers"]["Retry-After"] for each in responses if problem.__name__ in json.dumps(each)]
        assert found and all(each["required"] is is_always for each in found)


def test_what_a_function_refuses_with_is_what_it_and_its_callees_declare() -> None:
    @refuses(RunNotFound)
    def callee() -> None: ...

    @refuses(callee)
    @refuses(ShardUnavailable)
    async def endpoint() -> None: ...

    setattr(endpoint, "_freestep_needed", (None, ""))  # noqa: B010
    assert JsonRoute("/x", endpoint).refusals() >= {RunNotFound, ShardUnavailable}


@pytest.mark.parametrize(
    ("status", "headers", "body", "fault"),
    [
        (HTTPStatus.IM_A_TEAPOT, {}, b"", "418 is not documented"),
        (200, {"content-type": "application/json", "x-more": "1"}, b"", "the header x-more"),
        (200, {"content-type": "text/html"}, b"", "the media type 'text/html'"),
        (404, {"content-type": "application/problem+json"}, b'{"type": "about:blank"}', "about:blank"),
        (
            404,
            {"content-type": "application/problem+json"},
            b'{"type": "urn:freestep:problem:run-not-found", "more": 1}',
            "more is not documented",
        ),
        (503, {"content-type": "application/problem+json"}, b"", "retry-after is missing"),
    ],
)
def test_an_answer_that_is_not_documented_is_noticed(
    status: int, headers: dict[str, str], body: bytes, fault: str
) -> None:
    (found,) = Document(DOCUMENT).faults(OPERATIONS["get_run"], status, headers, body)
    assert fault in found


def asked(service: ThreadService, phases: str, *options: str) -> None:
    """Has schemathesis make requests of the service's document, with all its checks."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(TESTS / "openapi.toml")),
        *("run", f"{service.url}/openapi.json", "--phases", phases, "--max-examples", LONGER or "10", *options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def document_service(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> ThreadService:
    """A service with a run that has weights and a checkpoint, and one that has none."""
    service = start_service()
    one, two = connect(service.url, "one"), connect(service.url, "two")
    one.create()
    assert one.http.post(one.path("/checkpoints")).status_code == 201
    assert two.http.put(two.path(), json=two.spec()).status_code == 201
    return service


SEARCH = pytest.mark.timeout(None if LONGER else 5 * DEADLINE_S)


@pytest.mark.slow
@SEARCH
@pytest.mark.parametrize("phases", ["examples,fuzzing", "coverage"])
def test_every_operation_does_what_the_document_says(document_service: ThreadService, phases: str) -> None:
    # The boundaries of all fields of a spec are 4,000 requests.
    options = () if LONGER or phases != "coverage" else ("--exclude-operation-id", "create_run")
    asked(document_service, phases, *options)
    assert {name for name, _ in document_service.documented.answered} == OPERATIONS.keys()


class Walker:
    """Makes the requests that links of the document lead to, with what the links say and no more of the answers."""

    def __init__(self, service: ThreadService) -> None:
        self.http = httpx.Client(base_url=service.url, headers=AUTHORIZED)
        self.places = {
            operation["operationId"]: (method.upper(), path)
            for path, methods in DOCUMENT["paths"].items()
            for method, operation in methods.items()
        }

    def ask(self, name: str, values: Mapping[str, str], body: Any = None) -> httpx.Response:
        """Makes a request of an operation with values of its parameters, each where the document has it."""
        method, path = self.places[name]
        places = {each["name"]: each["in"] for each in OPERATIONS[name].get("parameters", ())}
        sent: dict[str, dict[str, str]] = {"path": {}, "query": {}, "header": {}}
        for parameter, text in values.items():
            sent[places[parameter]][parameter] = text
        content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        media = {"Content-Type": MEDIA_TYPE} if isinstance(body, bytes) else {}
        answer = self.http.request(
            method,
            path.format(**sent["path"]),
            params=sent["query"],
            headers={**sent["header"], **media},
            **content,
        )
        assert answer.is_success, answer.text
        answer.extensions["asked"] = name, sent
        return answer

    def follow(self, answer: httpx.Response, link: str, body: Any = None, **more: str) -> httpx.Response:
        """Follows a link of an answer. `more`: what the link does not say, with underscores in the names."""
        name, asked = answer.extensions["asked"]
        found = OPERATIONS[name]["responses"][str(answer.status_code)]["links"][link]

        def value(expression: str) -> str:
            source, _, rest = expression.removeprefix("$").partition(".")
            part, _, key = rest.partition(".")
            if source == "request":
                return str(asked[part][key])
            if part == "header":
                return answer.headers[key]
            member: Any = answer.json()
            for step in rest.removeprefix("body#/").split("/"):
                member = member[int(step) if isinstance(member, list) else step]
            return str(member)

        values = {parameter: value(expression) for parameter, expression in found["parameters"].items()}
        values |= {parameter.replace("_", "-"): text for parameter, text in more.items()}
        return self.ask(found["operationId"], values, body)


def test_links_lead_from_a_run_to_a_receipt_and_on(start_service: Callable[..., ThreadService]) -> None:
    walker = Walker(start_service())
    with walker.http:
        created = walker.ask("create_run", {"run": "walk"}, Api("", "walk").spec())
        initialized = walker.follow(created, "initialize", BODY)
        lease = walker.follow(initialized, "lease", {"worker": "one"})
        pushed = walker.follow(lease, "push", BODY, Idempotency_Key="first")
        assert (pushed.json()["step"], pushed.json()["replayed"]) == (1, False)
        assert walker.follow(pushed, "again", BODY).json()["replayed"] is True
        pulled = walker.follow(pushed, "pull")
        assert pulled.headers["Freestep-Step"] == "1"
        assert walker.follow(pushed, "renew").json()["lease"] == lease.json()["lease"]
        checkpoint = walker.follow(pushed, "checkpoint")
        for link in ("pull", "export"):
            assert walker.follow(checkpoint, link).headers["Freestep-Step"] == "1"
        restored = walker.follow(checkpoint, "restore")
        assert (restored.json()["step"], restored.json()["epoch"]) == (1, 2)
        data = walker.follow(created, "data", {"length": 10, "unit": 4}, name="train")
        assert walker.follow(data, "list").json()["data"] == [walker.follow(data, "show").json()]
        # The run has gone back to a checkpoint, and leases with it.
        fresh = walker.ask("grant_lease", {"run": "walk"}, {"worker": "one"}).json()
        holder = {"Freestep_Lease": fresh["lease"], "Freestep_Token": str(fresh["token"])}
        claimed = walker.follow(data, "claim", {"count": 2}, **holder)
        assert [each["unit"] for each in claimed.json()["units"]] == [0, 1]
        returned = walker.follow(claimed, "return")
        assert returned.json() == {"units": [0, 1]}
        assert walker.follow(returned, "show").json()["out"] == 0
        walker.ask("release_lease", {"run": "walk", "lease": fresh["lease"]})
        token = walker.ask("create_token", {}, {"name": "walk", "scope": "read"})
        walker.follow(token, "revoke")
        walker.follow(created, "delete")


@pytest.mark.slow
@SEARCH
@pytest.mark.parametrize(("of_tokens", "walks"), [(True, 15), (False, 30)], ids=["tokens", "runs"])
def test_what_links_lead_to_does_what_the_document_says(
    document_service: ThreadService, of_tokens: bool, walks: int
) -> None:
    service, options = document_service, tomllib.loads((TESTS / "openapi.toml").read_text())
    options["generation"]["mode"] = "positive"
    # Schemathesis takes what a hook has put into a request for wrong data.
    options["checks"]["negative_data_rejection"] = {"enabled": False}
    config = schemathesis.Config.from_dict(options)
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=config)
    schema.config.update(base_url=service.url)
    # What a claim needs comes of several answers, and no link has all of it: the walk above takes them in their order.
    # `include` would add to what openapi.toml has operations for, which is all.
    others = sorted(TAGS - {"tokens"}) if of_tokens else ["tokens", "data"]
    schema = schema.exclude(tag=others)

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            # A walk that is repeated has to find what it found before.
            if of_tokens:
                service.revoke_tokens()
                return
            service.delete_runs()
            api = Api(service.url, "one")
            api.create()
            api.http.close()

        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            # Links give headers the numbers of JSON bodies.
            return {"headers": {name: str(value) for name, value in case.headers.items()}}

    Walk.run(
        settings=hypothesis.settings(
            max_examples=int(LONGER or walks),
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
    )
    # Which links a walk takes is chance; those that matter are taken above.
    assert {"create_token" if of_tokens else "create_run"} <= {name for name, _ in service.documented.answered}
