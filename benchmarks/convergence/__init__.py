"""Does a learned learning rate do as well as a tuned one?

    python -m benchmarks.convergence          # the whole protocol, hours; run again, it resumes
    python -m benchmarks.convergence --quick  # the same code in five minutes; means little

For each task, horizon and base optimizer: a grid of learning rates in factors of 2 on two seeds;
its best, chosen on the validation split, on five fresh seeds; Mechanic with its defaults, once on
each fresh seed; and other optimizers that need no learning rate, used as their authors recommend.
"""
