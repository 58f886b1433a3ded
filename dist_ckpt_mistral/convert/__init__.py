"""The four conversions (to_hf, from_hf, reshard, migrate), and how an output is written completely or not at all.

May enter: the content of a new checkpoint or Hugging Face directory, resuming, manifests, sharing work among ranks.
May not: the layout of bytes in one format, or commands that write no output.
"""
