"""What is measured once features exist: ranking metrics, bootstrap intervals, reference-based refinement, the report.

Everything takes NumPy arrays and knows nothing of Ray, training or checkpoints.
"""
