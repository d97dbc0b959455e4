"""The fold: evaluation scales into the weights, by algebra over the whole model."""
