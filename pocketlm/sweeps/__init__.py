"""Many training runs: hyper-parameter search with seeds, and the scaling of loss with compute."""
