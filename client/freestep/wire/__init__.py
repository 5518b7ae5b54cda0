"""What client and service agree on as bytes: safetensors headers, encodings and the receiver. No IO."""
