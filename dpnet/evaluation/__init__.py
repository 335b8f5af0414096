"""Stage 4: measure a trained generator on frozen pairs and write the report."""
