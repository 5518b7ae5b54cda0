"""Tokens in files: the admin token of a first start, tokens that are given as secrets, and where clients find them."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from freestep import Client
from freestep.api.token_form import make_token, scope_of
from freestep.api.token_places import token_place
from freestep_service.access.kept_tokens import LeftTokens, register_kept
from freestep_service.settings import CannotStart, Settings
from harness import ThreadService


class Registered:
    """Tokens that know which texts were registered."""

    def __init__(self, *revoked: str) -> None:
        self.texts: dict[str, str] = {}
        self._revoked = revoked

    async def register(self, text: str, name: str) -> bool:
        self.texts[name] = text
        return text not in self._revoked


def kept(settings: Settings, *revoked: str) -> dict[str, str]:
    """The tokens that a start registers, by their names."""
    tokens = Registered(*revoked)
    admin = asyncio.run(register_kept(tokens, settings))  # type: ignore[arg-type]
    assert tokens.texts["admin-token"] == admin
    return tokens.texts


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    monkeypatch.delenv("FREESTEP_ADMIN_TOKEN_FILE")
    return lambda **options: Settings(data_dir=tmp_path, **options)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_the_first_start_makes_an_admin_token(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    made = kept(settings())
    assert list(made) == ["admin-token"] and scope_of(made["admin-token"]) == "admin"
    file = tmp_path / "admin-token"
    assert file.read_text() == made["admin-token"] + "\n"
    assert mode(file) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["admin-token"]
    assert kept(settings()) == made


def test_files_may_be_named(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    (tmp_path / "given").write_text(given := make_token("admin"))
    made = kept(settings(admin_token_file=tmp_path / "given", push_token_file=tmp_path / "secrets" / "push"))
    assert made["admin-token"] == given
    assert scope_of(made["push-token"]) == "push"
    assert (tmp_path / "secrets" / "push").read_text().strip() == made["push-token"]
    assert mode(tmp_path / "secrets" / "push") == 0o600


def test_a_revoked_one_is_replaced(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    old = (kept(settings()))["admin-token"]
    new = (kept(settings(), old))["admin-token"]
    assert new != old
    assert (tmp_path / "admin-token").read_text().strip() == new
    assert mode(tmp_path / "admin-token") == 0o600


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "holds no token"), ("secret", "holds no token"), (make_token("push"), "of scope push, not admin")],
    ids=["empty", "another", "push"],
)
def test_what_is_no_admin_token_is_told(
    tmp_path: Path, settings: Callable[..., Settings], content: str, said: str
) -> None:
    (tmp_path / "admin-token").write_text(content)
    with pytest.raises(CannotStart, match=said) as caught:
        kept(settings())
    assert not content or content not in str(caught.value)
    assert (tmp_path / "admin-token").read_text() == content


def test_a_directory_is_told(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    (tmp_path / "admin-token").mkdir()
    with pytest.raises(CannotStart, match="cannot be read: Is a directory"):
        kept(settings())


def test_clients_find_it_while_the_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    text = make_token("admin")
    left = LeftTokens(text, ["http://0.0.0.0:8000", "http://127.0.0.1:8000", "https://train.example.org"])
    places = [token_place("localhost", 8000), token_place("train.example.org", 443)]
    for place in places:
        assert place.read_text().strip() == text
        assert mode(place) == 0o600 and mode(place.parent) == 0o700
    # Another service has taken the place of this one.
    places[1].write_text("other")
    left.remove()
    assert not places[0].exists()
    assert places[1].read_text() == "other"


def test_a_folder_that_takes_nothing_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "freestep").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    LeftTokens(make_token("admin"), ["http://127.0.0.1:8000"]).remove()


def test_a_service_leaves_its_token_and_takes_it_away(
    start_service: Callable[..., ThreadService], tmp_path: Path
) -> None:
    service = start_service(admin_token_file=None, push_token_file=tmp_path / "push")
    text = (service.settings.data_dir / "admin-token").read_text()
    place = token_place("127.0.0.1", service.settings.port)
    assert place.read_text() == text
    with Client(service.url, token=text.strip()) as client:
        assert [each.scope for each in client.tokens()] == ["push", "admin"]
    with Client(service.url, token=(tmp_path / "push").read_text().strip()) as client:
        assert client.runs() == []
    service.stop()
    assert not place.exists()
    assert (service.settings.data_dir / "admin-token").read_text() == text
