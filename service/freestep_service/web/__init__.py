"""HTTP: the only package that knows status codes, headers and sockets."""
