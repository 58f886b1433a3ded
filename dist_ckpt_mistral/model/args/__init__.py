"""The configuration as Megatron says it: args of a checkpoint, run_config.yaml, flags of pretrain_gpt.py."""
