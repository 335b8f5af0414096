"""Write a trained generator for use without this package."""
