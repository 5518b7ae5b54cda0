"""The demo: a service, workers and an evaluator, each a process of its own, on 5,000 real digits.

`freestep demo` runs all of it; `python -m freestep.demo.worker` and `.evaluator` are the parts that containers run.
"""
