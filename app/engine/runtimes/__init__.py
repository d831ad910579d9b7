"""What executes the network: PyTorch, OpenVINO, ONNX Runtime."""
