"""The site is built without a warning, and what it would hide is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents import pictures, site
from documents.navigation import NAVIGATION, paths


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has the site built in a folder of the test's own."""
    folder = tmp_path / "build"
    for name, path in (("BUILD", folder), ("PAGES", folder / "pages"), ("SITE", folder / "site")):
        monkeypatch.setattr(site, name, path)
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_faults(elsewhere: Path) -> None:
    assert site.build() == []
    for page in paths(NAVIGATION):
        name = page.removesuffix(".md").removesuffix("README").removesuffix("index").rstrip("/")
        assert (elsewhere / "site" / name / "index.html").exists(), page
    assert (
        "urn:freestep:problem:overloaded"
        in (elsewhere / "site" / "reference" / "problems" / "overloaded" / "index.html").read_text()
    )
    assert (elsewhere / "site" / "llms.txt").exists() and (elsewhere / "site" / "guides" / "worker.md").exists()
    # A file that a page names is a page too.
    assert (elsewhere / "site" / "source" / "examples" / "train_mnist.py" / "index.html").exists()


@pytest.mark.slow
def test_faults_are_found(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Start\n\n[gone](gone.md) [no heading](#none) ![p](http://example.org/p.png)\n")
    monkeypatch.setattr(site, "DOCS", docs)
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "ELSEWHERE", {})
    monkeypatch.setattr(site, "NAVIGATION", [("Start", "index.md"), ("None", "none.md")])
    faults = "\n".join(site.build())
    assert "the navigation names none.md, which does not exist" in faults
    assert "docs/index.md: gone.md leads nowhere on the site" in faults
    assert "index.html loads http://example.org/p.png from elsewhere" in faults
    assert "#none names no heading" in faults


def test_every_page_is_in_the_navigation() -> None:
    listed = set(paths(NAVIGATION))
    below = ("decisions/", "reference/problems/", "lab/")
    found = {str(file.relative_to(site.DOCS)) for file in site.DOCS.rglob("*.md")}
    assert not {page for page in found - listed if not page.startswith(below)}


def test_the_pictures_are_there() -> None:
    assert sorted(file.name for file in pictures.FOLDER.glob("*.svg")) == sorted(pictures.NAMES)
    assert all(
        f"]({name})" in "".join(page.read_text() for page in pictures.FOLDER.glob("*.md")) for name in pictures.NAMES
    )
