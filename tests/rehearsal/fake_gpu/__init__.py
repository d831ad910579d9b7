"""A fake CUDA GPU: CUDA code runs on a CPU-only machine, computes real values and fails where a GPU would fail.

install.install() patches PyTorch's CPU build so that it reports CUDA devices. Tensors on them are FakeGpuTensors: they report
device cuda:0 and wrap a CPU tensor (a meta tensor within tensors.shapes_only()), on which every operator runs. What would fail
on a GPU raises here:

- operands on different devices, and NumPy arrays made from GPU tensors;
- during stream capture: copies between host and GPU, synchronization, values read on the host, pinned allocations, work on
  another stream;
- after capture: reads of memory that no replay has written yet (it holds NaN), replays that read freed memory;
- data races: two accesses of the same memory that no stream, event, lock or queue orders (clocks.py);
- Triton launches while another device than that of the tensors is current.

float32 operands of convolutions and matrix products are rounded to TF32 where PyTorch's flags allow TF32. Triton kernels run
in Triton's interpreter, except large launches and those of graphs. NATTEN's na2d is replaced by the reference implementation,
after NATTEN's own checks of compute capability, dtype and head_dim. counts.counted() counts launches and bytes. Not shown:
what kernels compile to, which implementation PyTorch, cuBLAS and cuDNN select, fragmentation of memory pools, and noise of
timings. install() cannot be undone: use a separate process.
"""
