"""The lab: what the methods are good for, every figure by one command, offline: `python -m examples.lab NAME`."""
