"""Several cards: each computes on its own, whatever card is current."""

import numpy as np
import pytest
import torch

from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime, resolve_devices
from dinat.model.checkpoints.checkpoint import open_checkpoint
from tests.rehearsal import card, clocks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card")


def test_every_card_is_taken_or_the_one_that_is_named() -> None:
    assert [str(device) for device in resolve_devices("auto")] == ["cuda:0", "cuda:1"]
    assert [str(device) for device in resolve_devices("cuda:1")] == ["cuda:1"]


def test_a_second_card_computes_though_the_first_is_current() -> None:
    cpu = TorchRuntime(open_checkpoint("digits"), torch.device("cpu"), "fp32", "tiled")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = cpu.run(pixels, [InferenceOptions(10)] * 2)
    with clocks.one_host():
        for index in (0, 1):
            runtime = TorchRuntime(open_checkpoint("digits"), torch.device("cuda", index), "fp32", "auto")
            torch.cuda.set_device(0)
            assert runtime.warm(2) == 2
            assert runtime.disabled == []
            torch.cuda.set_device(0)
            for got, want in zip(runtime.run(pixels, [InferenceOptions(10)] * 2), expected, strict=True):
                np.testing.assert_array_equal(got.class_ids, want.class_ids)
                np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=1e-5)


def test_the_stand_in_knows_which_card_is_current() -> None:
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        from dinat.model.attention.triton_kernel import launch

        torch.cuda.set_device(0)
        launch(*torch.randn(3, 1, 7, 7, 1, 16, device="cuda:1"), None, 3, 1, 0.25)
    assert card.current() == 0
