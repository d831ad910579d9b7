"""The Open Inference Protocol, version 2, over REST, with the binary tensor and classification extensions.

The protocol of Triton, KServe, MLServer and Seldon: https://github.com/kserve/open-inference-protocol.
"""
