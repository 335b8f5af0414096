"""Stage 3: train the generator. Only its folder `ray` knows Ray."""
