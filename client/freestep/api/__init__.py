"""What client and service agree on as JSON."""
