"""Two GPUs: each computes correctly, whichever device is current."""

import numpy as np
import pytest
import torch

from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime, resolve_devices
from dinat.model.checkpoints.checkpoint import open_checkpoint
from tests.rehearsal.fake_gpu import clocks, devices

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two GPUs")


def test_auto_selects_every_gpu_and_a_name_selects_one() -> None:
    assert [str(device) for device in resolve_devices("auto")] == ["cuda:0", "cuda:1"]
    assert [str(device) for device in resolve_devices("cuda:1")] == ["cuda:1"]


def test_second_gpu_computes_while_the_first_is_current() -> None:
    cpu = TorchRuntime(open_checkpoint("digits"), torch.device("cpu"), "fp32", "tiled")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = cpu.run(pixels, [InferenceOptions(10)] * 2)
    with clocks.single_host_thread():
        for index in (0, 1):
            runtime = TorchRuntime(open_checkpoint("digits"), torch.device("cuda", index), "fp32", "auto")
            torch.cuda.set_device(0)
            assert runtime.warm(2) == 2
            assert runtime.disabled == []
            torch.cuda.set_device(0)
            results = runtime.run(pixels, [InferenceOptions(10)] * 2)
            for actual, reference in zip(results, expected, strict=True):
                np.testing.assert_array_equal(actual.class_ids, reference.class_ids)
                np.testing.assert_allclose(actual.scores, reference.scores, rtol=0, atol=1e-5)


def test_fake_gpu_rejects_triton_launches_for_a_device_that_is_not_current() -> None:
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        from dinat.model.attention.triton_kernel import launch

        torch.cuda.set_device(0)
        launch(*torch.randn(3, 1, 7, 7, 1, 16, device="cuda:1"), None, 3, 1, 0.25)
    assert devices.current() == 0
