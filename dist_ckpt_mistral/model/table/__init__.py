"""The table of tensors: for each its Megatron key, its names in files, its shape, and how parallelism cuts it."""
