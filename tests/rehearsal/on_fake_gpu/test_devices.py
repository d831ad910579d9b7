"""Two GPUs: each computes correctly, whichever device is current."""

import numpy as np
import pytest
import torch

from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime, resolve_devices
from dinat.model import DinatConfig
from dinat.model.attention import neighborhood_attention, run_candidate
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.dinat import Layer
from dinat.model.gpu import pixels_kernel, steps
from dinat.model.gpu.fusing import fuse
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


def test_kernels_compute_on_the_device_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv, rpb = torch.randn(3, 1, 7, 7, 1, 16), torch.randn(1, 5, 5)
    layer = Layer(DinatConfig(kernel_size=3), 32, 1, 1, 0.0, "triton").eval().bfloat16()
    x, pixels = torch.randn(1, 7, 7, 32).bfloat16(), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    with torch.inference_mode():
        expected = run_candidate("tiled", *qkv, rpb, 3, 1, 0.25), layer(x)[0]
        monkeypatch.setattr(steps, "select", lambda step: step.names[-1])
        torch.cuda.set_device(0)
        second = torch.device("cuda", 1)
        attended = neighborhood_attention(*qkv.to(second), rpb.to(second), 3, 1, 0.25, backend="triton")
        torch.testing.assert_close(attended.cpu(), expected[0], rtol=0, atol=1e-5)
        output = fuse(layer.to(second))(x.to(second))[0]
        torch.testing.assert_close(output.cpu(), expected[1], rtol=0.02, atol=0.05)
        table = torch.zeros(3, 256, device=second)
        assert steps.normalize(pixels.to(second), table, torch.float32, lambda: pytest.fail("no kernel")).device == second
    assert devices.current() == 0


def test_fake_gpu_rejects_triton_launches_for_a_device_that_is_not_current() -> None:
    tensors = torch.zeros(3, dtype=torch.uint8), torch.zeros(3, 256), torch.zeros(3)
    torch.cuda.set_device(0)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        pixels_kernel.look_up[(1, 1, 1)](*(x.to("cuda:1") for x in tensors), 3, BLOCK=16)
