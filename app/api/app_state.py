"""What endpoints read from the application's state."""

from fastapi import Request

from dinat.app.engine.engine import Engine


def engine_of(request: Request) -> Engine:
    """Return the engine of the application that handles a request."""
    engine: Engine = request.app.state.engine
    return engine
