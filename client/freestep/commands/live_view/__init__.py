"""`freestep top` on the terminal. It needs textual, so nothing but that command imports it."""
