"""What the network is: spec, tensor map and reference model. Knows no files, threads or budgets."""
