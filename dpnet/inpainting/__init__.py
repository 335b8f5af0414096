"""Fill the holes of photos with a trained generator."""
