"""Memory and time of a training layout before the launch, and a search for the best layout. No torch."""
