"""Record what a run reports, in its folder and in MLflow."""
