"""python -m dinat.app.healthcheck: exit status 0 if the service on this host answers GET /health, else 1.

For a container's health check: without proxies, on the port that the service listens on, and without loading PyTorch.
"""

import os
import sys
from http.client import HTTPConnection, HTTPException

PORT_VARIABLES = ("DINAT_PORT", "AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT")
"""As in Settings.port."""


def main() -> int:
    """Ask the service. Returns the exit status."""
    port = next(filter(None, map(os.environ.get, PORT_VARIABLES)), "8000")
    try:
        connection = HTTPConnection("127.0.0.1", int(port), timeout=4)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
