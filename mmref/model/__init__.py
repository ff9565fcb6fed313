"""The model: towers, heads, the MMRef module that joins them, and the arithmetic of reference rows.

Knows nothing of Ray, DeepSpeed or ranks.
"""
