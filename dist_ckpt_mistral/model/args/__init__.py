"""The configuration in Megatron's forms: args of a checkpoint, run_config.yaml, flags of pretrain_gpt.py."""
