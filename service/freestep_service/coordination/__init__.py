"""What processes share through Redis. The only package that imports redis; every change is one script of lua/."""
