"""One file an op. The plain torch form is the reference, the CPU path, and the oracle of every faster form."""
