"""How a model and its data are sharded across devices."""
