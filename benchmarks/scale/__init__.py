"""How far a service goes: measured on this machine, and simulated beyond it."""
