"""Megatron's ``torch_dist`` format: .metadata, the torch.save archives in .distcp files, common.pt."""
