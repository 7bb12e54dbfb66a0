"""What training and serving will need, from config.json alone.

Door: `estimate.plan`, which takes a `config.PlanSettings`. Nothing here reads a weight: parameters
are counted on PEFT's own model on the meta device, and activations by running the model's own
forward and backward pass on tensors without content (`trace`).
"""
