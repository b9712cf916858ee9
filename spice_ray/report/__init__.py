"""Reports of runs and of sweeps: pages of HTML with their plots, made without labels."""
