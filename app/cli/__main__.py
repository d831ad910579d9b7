"""`python -m app.cli`."""

from app.cli import run

if __name__ == "__main__":  # a process that is spawned to make a graph imports this too
    run()
