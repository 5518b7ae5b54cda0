"""One run: where state, coordination and storage meet."""
