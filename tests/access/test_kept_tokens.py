"""Tokens in files: the admin token of a first start, tokens that are given as secrets, and where clients find them."""

from __future__ import annotations

import asyncio
import os
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
    return lambda **options: Settings(**{"data_dir": tmp_path} | options)


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


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


def test_a_token_is_on_disk_before_its_file_has_its_name(
    tmp_path: Path, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def noted_fsync(descriptor: int) -> None:
        flushed = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("directory" if flushed == tmp_path else flushed.read_text())
        fsync(descriptor)

    def noted_link(source: Path, target: Path) -> None:
        link(source, target)
        done.append("link")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    made = kept(settings())
    assert done == [made["admin-token"] + "\n", "link", "directory"]


def test_files_may_be_named(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    write(tmp_path / "given", given := make_token("admin"))
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
    write(tmp_path / "admin-token", content)
    with pytest.raises(CannotStart, match=said) as caught:
        kept(settings())
    assert not content or content not in str(caught.value)
    assert (tmp_path / "admin-token").read_text() == content


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("scope", ["admin", "push"])
def test_what_others_can_write_is_told(
    tmp_path: Path, settings: Callable[..., Settings], scope: str, mode: int
) -> None:
    file = write(tmp_path / "planted", text := make_token("admin"), mode)
    with pytest.raises(CannotStart, match="planted can be written by other users") as caught:
        kept(settings(**{f"{scope}_token_file": file}))
    assert text not in str(caught.value) and file.read_text() == text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_told(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = write(folder / "admin-token", text := make_token("admin"), 0o666)
    for each in (folder, file):
        os.chown(each, 12345, 12345)
    with pytest.raises(
        CannotStart, match=r"belongs to the user with ID 12345, .*: remove it to have one made"
    ) as caught:
        kept(settings(data_dir=folder))
    assert text not in str(caught.value)
    # A link to it is as good.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "admin-token").symlink_to(file)
    with pytest.raises(CannotStart, match="belongs to the user with ID 12345"):
        kept(settings(data_dir=tmp_path / "other"))
    # Who names a file has chosen it: Compose mounts secrets with the owners that they have on the host.
    file.chmod(0o644)
    assert kept(settings(admin_token_file=file))["admin-token"] == text
    # What was there is as it was; without it, the service makes its own.
    file.unlink()
    assert kept(settings(data_dir=folder))["admin-token"] != text


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o644])
def test_mounted_secrets_are_read(tmp_path: Path, settings: Callable[..., Settings], mode: int) -> None:
    """Kubernetes mounts a secret as links, the last of which it replaces, to files of root."""
    (tmp_path / "..2026").mkdir()
    write(tmp_path / "..2026" / "token", text := make_token("admin"), mode)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "token").symlink_to("..data/token")
    assert kept(settings(admin_token_file=tmp_path / "token")) == {"admin-token": text}


def test_a_directory_is_told(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    (tmp_path / "admin-token").mkdir()
    with pytest.raises(CannotStart, match="cannot be read: Is a directory"):
        kept(settings())


def test_clients_find_it_while_the_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    text = make_token("admin")
    places = [token_place("localhost", 8000), token_place("train.example.org", 443)]
    places[0].parent.mkdir(parents=True, mode=0o700)
    write(places[0], "of a service that was killed", 0o644)
    left = LeftTokens(text, ["http://0.0.0.0:8000", "http://127.0.0.1:8000", "https://train.example.org"])
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
