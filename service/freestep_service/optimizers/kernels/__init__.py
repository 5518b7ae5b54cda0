"""How it is computed: loops for CPUs, kernels for GPUs, decoding of gradients, copies of points."""
