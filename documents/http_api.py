"""The pages of the HTTP API, of the OpenAPI document: calls, JSON, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from typing import Any

from documents.markdown import anchor, code, docstring, made_by, table
from documents.schemas import default_of, fields, kind
from freestep.errors import PROBLEMS, URN, ProblemError
from freestep_service.app import create_app
from freestep_service.settings import Settings
from freestep_service.web.problems import RETRY_AFTER_S, STATUSES

__all__ = ["pages"]

_MADE = made_by("make reference", "Of the OpenAPI document")
_MODELS = "json.md"
_METHODS = ("put", "post", "patch", "get", "delete")


def pages() -> Iterator[tuple[str, str]]:
    """The pages by their names."""
    document = create_app(Settings()).openapi()
    yield "http.md", _calls(document)
    yield _MODELS, _schemas(document)
    yield "problems/README.md", _index()
    callers = _refused_by(document)
    for slug, problem in PROBLEMS.items():
        yield f"problems/{slug}.md", _problem(problem, callers.get(slug, []), document)


def _operations(document: Mapping[str, Any], tag: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The calls of a tag: method, path, operation."""
    for path, methods in sorted(document["paths"].items()):
        for method in _METHODS:
            if method in methods and tag in methods[method]["tags"]:
                yield method.upper(), path, methods[method]


def _calls(document: Mapping[str, Any]) -> str:
    parts = [
        f"{_MADE}\n# The HTTP API\n\n{cleandoc(document['info']['description'])}\n",
        "A running service has this document at `/openapi.json`, and a page to try calls on at `/docs`. What the calls"
        "\nhave in common, with examples for curl, is in [the protocol](../protocol.md); objects are in [JSON]"
        f"({_MODELS}), refusals in [problems](problems/README.md).\n",
    ]
    overview = []
    for tag in document["tags"]:
        parts.append(f"## {tag['name'].capitalize()}\n\n{tag['description']}\n")
        for method, path, operation in _operations(document, tag["name"]):
            heading = f"{method} {path}"
            overview.append((f"[{code(heading)}](#{anchor(heading)})", _first_sentence(operation)))
            parts.append(_call(heading, operation))
    parts.insert(2, table(("call", "what"), overview))
    return "\n".join(parts)


def _first_sentence(operation: Mapping[str, Any]) -> str:
    text = " ".join(operation.get("description", operation["summary"]).split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", text)[0].rstrip(".")


def _call(heading: str, operation: Mapping[str, Any]) -> str:
    parts = [f"### `{heading}`\n\n{docstring(operation.get('description', operation['summary']))}"]
    rows = [
        (code(each["name"]), each["in"], kind(each["schema"], _MODELS),
         "required" if each["required"] else default_of(each["schema"]), each.get("description", ""))
        for each in operation.get("parameters", ())
    ]  # fmt: skip
    parts.append(table(("parameter", "in", "is", "default", ""), rows))
    body = operation.get("requestBody")
    if body is not None:
        optional = "" if body.get("required") else " It may be left out."
        parts.append(f"**Body**: {_content(body)}.{optional} {body.get('description', '')}".rstrip() + "\n")
    refusals = {}
    for status, response in sorted(operation["responses"].items()):
        if int(status) < 400:
            parts.append(_answer(status, response))
        else:
            refusals[status] = [f"[{slug}](problems/{slug}.md)" for slug in _slugs(response)]
    named = [f"{status}: {', '.join(slugs)}" for status, slugs in refusals.items() if slugs]
    parts.append("**Refusals**: " + "; ".join(named) + ".\n")
    return "\n".join(part for part in parts if part)


def _answer(status: str, response: Mapping[str, Any]) -> str:
    content = f"{_content(response)}. " if response.get("content") else ""
    text = f"**{status}**: {content}{response['description']}\n"
    rows = [
        (code(name), kind(header["schema"], _MODELS), header.get("description", ""))
        for name, header in response.get("headers", {}).items()
    ]
    return text + ("\n" + table(("header", "is", ""), rows) if rows else "")


def _content(holder: Mapping[str, Any]) -> str:
    found = []
    for media_type, content in holder["content"].items():
        what = kind(content["schema"], _MODELS) if "schema" in content else "text"
        found.append(f"{what} as {code(media_type)}")
    return ", or ".join(found)


def _slugs(response: Mapping[str, Any]) -> list[str]:
    """The slugs of the refusals of a status."""
    schema = response.get("content", {}).get("application/problem+json", {}).get("schema", {})
    return sorted(urn.removeprefix(URN) for urn in schema.get("discriminator", {}).get("mapping", {}))


def _schemas(document: Mapping[str, Any]) -> str:
    problems = {problem.__name__ for problem in PROBLEMS.values()}
    parts = [
        f"{_MADE}\n# JSON\n\nThe objects that calls take and answer with, of [the HTTP API](http.md). Members that are"
        "\nnot named here are refused in requests; answers may get more of them in later versions.\n"
    ]
    for name, schema in sorted(document["components"]["schemas"].items()):
        if name not in problems:
            parts.append(f"## {name}\n\n{docstring(schema.get('description', ''))}")
            parts.append(table(("member", "is", "default", ""), fields(schema, "")))
    return "\n".join(part for part in parts if part)


def _refused_by(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The calls that may be refused with each slug."""
    found: dict[str, list[str]] = {}
    for tag in document["tags"]:
        for method, path, operation in _operations(document, tag["name"]):
            for response in operation["responses"].values():
                for slug in _slugs(response):
                    found.setdefault(slug, []).append(f"{method} {path}")
    return found


def _index() -> str:
    rows = [
        (f"[{slug}]({slug}.md)", str(STATUSES[problem]), problem.title, code(problem.__name__))
        for slug, problem in sorted(PROBLEMS.items(), key=lambda each: (STATUSES[each[1]], each[0]))
    ]
    return (
        f"{_MADE}\n# Problems\n\nA refusal is an `application/problem+json` document (RFC 9457), and has changed"
        f"\nnothing. Its `type` is `{URN}SLUG`, and SLUG is the name of a page here. The client raises the class of"
        "\nthe same line, from `freestep`; all of them are a `ProblemError` and a `FreestepError`.\n\n"
        + table(("problem", "status", "what", "class"), rows)
        + "\nA 500, 501 or 505 says all there is to say by its status, and has the type `about:blank`.\n"
    )


def _problem(problem: type[ProblemError], calls: list[str], document: Mapping[str, Any]) -> str:
    schema = document["components"]["schemas"][problem.__name__]
    fixed = ("type", "title", "status", "detail")
    members = [row for row in fields(schema, "../" + _MODELS) if row[0].strip("`") not in fixed]
    parts = [
        f"{_MADE}\n# {problem.slug}\n\n**{problem.title}.**\n\n{docstring(cleandoc(problem.__doc__ or ''))}",
        table(
            ("", ""),
            [
                ("`type`", code(URN + problem.slug)),
                ("status", str(STATUSES[problem])),
                ("in Python", code(f"freestep.{problem.__name__}")),
                *([("`Retry-After`", f"{RETRY_AFTER_S[problem]} s or more: repeat the request as it is")]
                  if problem in RETRY_AFTER_S else []),
            ],
        ),
    ]  # fmt: skip
    if members:
        parts.append("Beside `type`, `title`, `status` and `detail` the document may have:\n")
        parts.append(table(("member", "is", "", ""), members))
    if len(calls) == sum(len(methods) for methods in document["paths"].values()):
        parts.append("Any call may be refused with it.\n")
    elif calls:
        links = [f"- [{code(call)}](../http.md#{anchor(call)})" for call in calls]
        parts.append("Calls that may be refused with it:\n\n" + "\n".join(links) + "\n")
    return "\n".join(part for part in parts if part)
