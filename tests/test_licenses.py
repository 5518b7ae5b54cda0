"""What is installed with freestep may be used and passed on under its own license: the licenses are on a list."""

from __future__ import annotations

import re
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALLOWED = {
    "0BSD", "3-Clause BSD License", "Apache-2.0", "Apache Software License", "Apache 2.0 License", "BSD License",
    "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC License (ISCL)", "MIT", "MIT License",
    "MIT-0", "MIT-CMU", "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)", "PSF-2.0",
    "Python Software Foundation License", "Zlib",
}  # fmt: skip
"""SPDX identifiers, and the names that older packages have for the same. MPL-2.0 concerns changed files alone."""
CUDA = re.compile(r"(nvidia|cuda)-.*")
"""NVIDIA's libraries for GPUs, which PyPI's torch brings under a license of theirs; CPU builds have none."""
EXTRAS = ("service", "oidc", "otel", "demo", "integrations", "top", "trackers")
_CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(.+)")


def installed(name: str, extras: tuple[str, ...]) -> set[str]:
    """The packages that a package with extras needs here, itself included, by their plain names."""
    found, left = set(), [(name, extras)]
    while left:
        current = left.pop()
        if current in found:
            continue
        found.add(current)
        for text in distribution(current[0]).requires or ():
            wanted = Requirement(text)
            if any(wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in ("", *current[1])):
                left.append((canonicalize_name(wanted.name), tuple(sorted(wanted.extras))))
    return {each for each, _ in found}


def is_allowed(metadata: Any) -> bool:
    """Whether a package's metadata name licenses of the list, by an SPDX expression, classifiers or free text."""
    named = [match[1] for each in metadata.get_all("Classifier") or () if (match := _CLASSIFIER.fullmatch(each))]
    named = [name for name in named if name not in ("OSI Approved", "DFSG approved")]
    if named and "License-Expression" not in metadata:
        return ALLOWED.issuperset(named)
    expression = metadata.get("License-Expression") or metadata.get("License") or ""
    choices = re.sub(r"[()]", "", re.sub(r" WITH \S+", "", expression)).split(" OR ")
    return any(ALLOWED.issuperset(choice.strip().split(" AND ")) for choice in choices)


def test_licenses_are_on_the_list() -> None:
    names = installed("freestep", EXTRAS)
    assert {"torch", "httptools", "transformers", "certifi"} <= names
    assert not [
        name for name in sorted(names) if not CUDA.fullmatch(name) and not is_allowed(distribution(name).metadata)
    ]


def test_a_package_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PackageNotFoundError):
        installed("freestep-none", ())


@pytest.mark.parametrize(
    ("metadata", "allowed"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License-Expression": "GPL-3.0-only OR BSD-3-Clause"}, True),
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception AND MIT"}, True),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License-Expression": "AGPL-3.0-or-later", "Classifier": "License :: OSI Approved :: MIT License"}, False),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3", "License": "MIT"}, False),
        ({"License": "MIT"}, True),
        ({"License": "Proprietary"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_is_allowed(metadata: dict[str, str], allowed: bool) -> None:
    message = Message()
    for name, value in metadata.items():
        message[name] = value
    assert is_allowed(message) is allowed
