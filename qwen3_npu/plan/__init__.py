"""Know before you launch: memory and time of a training layout, and a search for the best one. No torch."""
