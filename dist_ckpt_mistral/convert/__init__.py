"""The four conversions (to_hf, from_hf, reshard, migrate), and how an output becomes whole or nothing.

May enter: what a new checkpoint or Hugging Face directory consists of, resuming, manifests, sharing work among ranks.
May not: knowledge of how bytes of one format are laid out, or questions that write nothing.
"""
