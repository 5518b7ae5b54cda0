"""freestep: Schedule-Free optimization as a service; the server."""
