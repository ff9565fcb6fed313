"""Distributed training: the loop, the DeepSpeed engine, the sharded reference bank, collectives, checkpoints.

The only place that knows ranks.
"""
