"""Questions that write no model: inspect, plan, verify, megatron-args.

May enter: what reads a checkpoint or a model and answers with data, a table, a page or a picture.
May not: anything that changes or makes a checkpoint, prints, or imports Megatron.
"""
