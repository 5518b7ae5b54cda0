"""The HTTP API, a file for each kind of resource. A handler parses the request, calls the run, and answers."""
