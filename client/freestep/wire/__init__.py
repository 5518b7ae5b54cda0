"""Tensors as bytes, shared by client and service: safetensors headers, encodings, and the receiver; no IO."""
