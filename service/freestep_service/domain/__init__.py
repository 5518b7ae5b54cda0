"""What processes agree on: pure data and rules, without IO."""
