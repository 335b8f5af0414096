"""Run the training loop under Ray, on this machine or on a cluster."""
