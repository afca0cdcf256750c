"""Launch scripts for torchrun, DeepSpeed host files, Slurm and Kubernetes."""
