"""Everything that imports Megatron, and nothing else does."""
