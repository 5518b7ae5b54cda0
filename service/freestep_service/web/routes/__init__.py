"""The HTTP API, a file for each kind of resource. A handler parses the claim, asks, and answers."""
