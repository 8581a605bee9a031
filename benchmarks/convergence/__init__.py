"""Does a learned learning rate do as well as a tuned one?

    python -m benchmarks.convergence          # the whole protocol; killed and started again, it
                                              # goes on
    python -m benchmarks.convergence --quick  # the same path in five minutes; its figures mean
                                              # little

A grid of learning rates in factors of 2 for each task, horizon and base optimizer, on two seeds;
its best, chosen on the validation split, again on five fresh seeds; Mechanic as it comes, once on
each of these seeds; and the other optimizers that need no learning rate, as their authors say to
use them.
"""
