"""How it is computed: loops for CPUs, kernels for GPUs, decoding and points."""
