"""What a Mistral model is: its sizes, its tensors in both worlds, and how parallelism cuts them. Pure arithmetic."""
