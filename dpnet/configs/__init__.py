"""The configs that come with the package, each named by its file."""
