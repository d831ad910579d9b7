"""`python -m pytest -p tests.rehearsal.plugin tests/gpu`: as if this machine had a card."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from tests.rehearsal import card

card.install(cards=int(os.environ.get("REHEARSAL_CARDS", "1")))

from dinat.model.attention import choice  # noqa: E402

choice.ROUNDS, choice.REPEATS = 1, 1  # what takes no time is timed in no time
