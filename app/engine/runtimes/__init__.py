"""Runtimes that execute the network: PyTorch, OpenVINO, ONNX Runtime."""
