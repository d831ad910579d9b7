"""One call of each kernel on an emulated CPU; the tests of all kernels run there as well, as slow ones."""

from pathlib import Path

import pytest
import torch

from dinat.model.attention import compiled, neighborhood_attention
from tests.model.native.emulated import EMULATED, library_for

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(not EMULATED, reason="no cross compiler, no emulator, or an ARM CPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_an_emulated_arm_cpu(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_for(EMULATED[0], tmp_path)
    monkeypatch.setattr(compiled, "library", lambda: library)
    q, k, v = torch.randn(3, 1, 9, 10, 2, 32).to(dtype)
    rpb = torch.randn(2, 5, 5).to(dtype)
    with torch.no_grad():
        output = neighborhood_attention(q, k, v, rpb, 3, 2, backend="compiled")
    expected = neighborhood_attention(*(x.double() for x in (q, k, v, rpb)), 3, 2, backend="reference")
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
