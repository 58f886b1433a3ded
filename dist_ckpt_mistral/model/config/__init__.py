"""The configuration of a model: from config.json, params.json, Megatron's args or run_config.yaml, and back."""
