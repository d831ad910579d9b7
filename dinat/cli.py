"""`python -m dinat.cli`: the command `dinat`."""

from dinat.app.cli import main as main
from dinat.app.cli import run as run

if __name__ == "__main__":  # a spawned process imports this module too
    run()
