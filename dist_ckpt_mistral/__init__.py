"""Mistral checkpoints between Megatron's distributed format and Hugging Face."""
