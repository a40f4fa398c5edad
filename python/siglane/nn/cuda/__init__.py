"""What is only there for GPUs: kernels in Triton, and torch's packed attention."""
