"""Training: data, degradation, losses and one script per model."""
