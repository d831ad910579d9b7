"""`python -m dinat.cli`: the `dinat` command as a module."""

from dinat.app.cli import main as main
from dinat.app.cli import run as run

if __name__ == "__main__":  # a spawned process imports this module too
    run()
