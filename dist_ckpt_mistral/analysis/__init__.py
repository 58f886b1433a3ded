"""The commands that write no model: inspect, plan, verify, megatron-args.

May enter: code that reads a checkpoint or a model and returns data, a table, a page or a picture.
May not: anything that writes a checkpoint, prints, or imports Megatron.
"""
