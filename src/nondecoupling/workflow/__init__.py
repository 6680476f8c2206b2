"""What make calls: the graph of runs, notebooks and their kernels, clusters, the committed reference."""
