"""Everything that imports Megatron: sharded state dicts, live models, their initialization, generation.

May enter: what needs ``megatron.core``, torch's process groups, or transformers beside them.
May not: anything that a conversion needs. Converting works where neither torch nor Megatron is installed.
"""
