"""What the graphs show: the residual adds, and why every other addition is none."""
