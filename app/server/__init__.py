"""The HTTP server: uvicorn, its connections, and the processes of one service."""
