"""Stage 5: register an evaluated model as champion or challenger."""
