"""What compilers made of kernels, read on a machine without the chip."""
