"""pytest plugin that installs the fake GPU: `python -m pytest -p tests.rehearsal.plugin tests/gpu`.

REHEARSAL_GPUS is the number of GPUs, 1 by default.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from tests.rehearsal.fake_gpu.install import install

install(gpus=int(os.environ.get("REHEARSAL_GPUS", "1")))

from dinat.model.attention import timing  # noqa: E402

timing.ROUNDS, timing.REPEATS = 1, 1  # timings on the fake GPU mean nothing
