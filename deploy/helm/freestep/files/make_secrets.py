"""Makes the Secrets that a release needs and that are not there: python make_secrets.py API NAMESPACE SECRETS.

API: URL of the cluster's API server. SECRETS: a JSON list of {"name": NAME, "labels": {...}, "keys": {KEY: KIND}}, in
which KIND is `admin` or `push`, for a token of that scope, or `password`. A Secret that exists is left as it is, and is
never read. The account's token and the CA are in the folder that FREESTEP_ACCOUNT names.
"""

import json
import os
import secrets
import ssl
import sys
from http.client import HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from freestep.api.token_form import make_token

_CREATED, _EXISTS = 201, 409


def made(kind: str) -> str:
    """A new value of a kind."""
    return secrets.token_hex(32) if kind == "password" else make_token(kind)  # type: ignore[arg-type]


def main(api: str, namespace: str, wanted: str) -> None:
    """Exits with a message at the first Secret that the API server refuses."""
    account = Path(os.environ["FREESTEP_ACCOUNT"])
    headers = {"Authorization": f"Bearer {(account / 'token').read_text()}", "Content-Type": "application/json"}
    trusting = ssl.create_default_context(cafile=account / "ca.crt")
    for each in json.loads(wanted):
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": each["name"], "labels": each["labels"]},
            "type": "Opaque",
            "stringData": {key: made(kind) for key, kind in each["keys"].items()},
        }
        connection = HTTPSConnection(urlsplit(api).netloc, context=trusting, timeout=30)
        connection.request("POST", f"/api/v1/namespaces/{namespace}/secrets", json.dumps(body), headers)
        answer = connection.getresponse()
        said = answer.read(2000).decode(errors="replace")
        connection.close()
        if answer.status not in (_CREATED, _EXISTS):
            sys.exit(f"the Secret {each['name']} cannot be made: {answer.status} {said}")
        print(f"{each['name']} {'is made' if answer.status == _CREATED else 'is there already'}")  # noqa: T201


main(*sys.argv[1:])
