"""Run Prefect, a worker, MLflow and the exporter on this machine: `dpnet up`."""
