"""What Keye is: configuration, positions, the parts, and the whole model. Needs torch and transformers only."""
