"""Show what a dataset holds, as text and as contact sheets."""
