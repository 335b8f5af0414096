"""Prefect flows around the stages, and what a Prefect server needs to run them."""
