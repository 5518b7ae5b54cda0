"""Exits 0 if the service in this container is ready. The image has no curl, and urllib would heed a proxy."""

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

host = os.environ.get("FREESTEP_HOST", "0.0.0.0")
# Who listens on all addresses is asked at loopback's of the same family: the other may not be there.
place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(os.environ.get("FREESTEP_PORT", "8000"))
if os.environ.get("FREESTEP_SSL_CERTFILE"):
    # Nobody is between, and the certificate is seldom one for this address.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    connection: HTTPConnection = HTTPSConnection(*place, timeout=4, context=trusting)
else:
    connection = HTTPConnection(*place, timeout=4)
try:
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    sys.stdout.write(answer.read(2000).decode(errors="replace"))
    sys.exit(answer.status != 200)
except (OSError, HTTPException) as error:
    sys.exit(f"the service does not answer: {error}")
