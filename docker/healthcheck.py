"""Exits 0 if the service in this container is ready. The image has no curl, and urllib would heed a proxy."""

import os
import sys
from http.client import HTTPConnection, HTTPException

connection = HTTPConnection("127.0.0.1", int(os.environ.get("FREESTEP_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    sys.stdout.write(answer.read(2000).decode(errors="replace"))
    sys.exit(answer.status != 200)
except (OSError, HTTPException) as error:
    sys.exit(f"the service does not answer: {error}")
