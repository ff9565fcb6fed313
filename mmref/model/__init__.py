"""The model: backbones, reconstruction head, the MMRef module, the rows of the reference bank.

Knows nothing of Ray, DeepSpeed or ranks.
"""
