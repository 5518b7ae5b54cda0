"""`freestep tokens`, `Client.create_token` and its kin; a service and its clients without a word about tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import forked
from freestep import Client, Forbidden, TokenNotFound, Unauthenticated
from freestep.api.token_form import scope_of
from freestep.api.token_places import token_place
from harness import ThreadService


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def test_tokens_from_python(service: ThreadService, name: str) -> None:
    with Client(service.url) as client:
        made = client.create_token(name, "push", runs="mine-*", workers="w-*", expires_in=60)
        assert scope_of(made.token) == "push"
        (listed,) = [each for each in client.tokens() if each.id == made.id]
        assert listed.model_dump() == made.model_dump(exclude={"token"})
        with Client(service.url, token=made.token) as bearer:
            assert bearer.runs() == []
            with pytest.raises(Forbidden) as caught:
                bearer.run("yours").status()
            assert caught.value.extensions == {"scope": "read", "run": "yours"}
            with pytest.raises(Forbidden, match="scope admin for all runs"):
                bearer.tokens()
            client.revoke_token(made.id)
            with pytest.raises(Unauthenticated, match="unknown, or was revoked"):
                bearer.runs()
        for token_id in (made.id, "none"):
            with pytest.raises(TokenNotFound):
                client.revoke_token(token_id)


@pytest.mark.slow
def test_tokens_from_a_shell(service: ThreadService, name: str) -> None:
    def tokens(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.freestep("tokens", *arguments, FREESTEP_URL=service.url, COLUMNS="200")

    options = ("--scope", "push", "--runs", "mnist-*", "--worker", "site-a-*", "--expires", "7d", "--name", name)
    made = tokens("create", *options)
    assert made.returncode == 0
    # Alone on stdout.
    token = made.stdout.strip()
    assert scope_of(token) == "push"
    (row,) = [line.split() for line in tokens("list").stdout.splitlines() if name in line]
    assert row[1:5] == [name, "push", "mnist-*", "site-a-*"]
    assert f"freestep tokens revoke {row[0]}" in made.stderr
    assert token not in tokens("list", "--json").stdout
    assert tokens("revoke", row[0]).returncode == 0
    assert name not in tokens("list").stdout
    again = tokens("revoke", row[0])
    assert (again.returncode, again.stderr) == (1, f"freestep: there is no token '{row[0]}'\n")
    whole = json.loads(tokens("create", "--scope", "read", "--name", name, "--json").stdout)
    assert scope_of(whole["token"]) == "read" and whole["expires_at"] is None
    assert tokens("revoke", whole["id"]).returncode == 0
    for wrong, said in (
        (("--expires", "soon"), "--expires: 'soon' is no duration"),
        (("--runs", "a b"), "runs: "),
        (("--scope", "root"), "--scope"),
    ):
        refused = tokens("create", "--scope", "push", "--name", name, *wrong)
        assert refused.returncode == 2 and said in refused.stderr
    assert name not in tokens("list").stdout


@pytest.mark.slow
def test_nobody_on_the_same_machine_has_to_speak_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FREESTEP_TOKEN", "FREESTEP_ADMIN_TOKEN_FILE"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    command = [sys.executable, "-m", "freestep.cli", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with Client(url, retry_for=0) as client:
            assert [each.name for each in client.tokens()] == ["admin-token"]
        assert forked.freestep("runs", "list", "--url", url.replace("127.0.0.1", "localhost")).returncode == 0
        # Another user finds nothing.
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
        with Client(url, retry_for=0) as client, pytest.raises(Unauthenticated, match="carries no token"):
            client.runs()
        refused = forked.freestep("runs", "list", "--url", url)
        assert (refused.returncode, "a token of scope read" in refused.stderr) == (1, True)
        assert "see --token, FREESTEP_TOKEN or FREESTEP_TOKEN_FILE" in refused.stderr
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    text = (tmp_path / "data" / "admin-token").read_text().strip()
    assert scope_of(text) == "admin" and text not in stderr
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert not token_place("127.0.0.1", int(url.rpartition(":")[2])).exists()
