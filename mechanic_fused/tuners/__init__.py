"""Other tuners of the learning rate, on the same kernels: beside any torch optimizer, or one."""
