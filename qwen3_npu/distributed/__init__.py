"""How a model and its data are cut across devices."""
