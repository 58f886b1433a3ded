"""What a Mistral model is: its configuration, its Megatron args, its tensors, and how layouts cut them.

May enter: facts about models and layouts, from numbers and names; config.json and params.json are read here.
May not: stored tensors, chunks, or bytes of weights.
"""
