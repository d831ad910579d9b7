"""`python -m dinat`: the command `dinat`."""

from dinat.app.cli import run

if __name__ == "__main__":  # a spawned process imports this module too
    run()
