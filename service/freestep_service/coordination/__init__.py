"""What processes share through Redis. Only this package imports redis. Every change of a run is one script of lua/."""
