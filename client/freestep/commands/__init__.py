"""Commands of `freestep` that are longer than a call of the client, each in a module of its own."""
