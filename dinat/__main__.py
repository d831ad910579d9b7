"""`python -m dinat`: the `dinat` command as a module, also for `accelerate launch -m dinat train ...`."""

from dinat.app.cli import run

if __name__ == "__main__":  # a spawned process imports this module too
    run()
