"""Data and rules that all processes of a service share; no IO."""
