"""Join the stages: config, chain, retraining, summary, cost, verification."""
