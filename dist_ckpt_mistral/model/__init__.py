"""The model: its configuration, its Megatron args, its tensor table, and how parallel layouts cut the tensors.

May enter: facts about models and layouts, from numbers and names; config.json and params.json are read here.
May not: stored tensors, chunks, or bytes of weights.
"""
