"""Results of a run: finished files, and a journal of an unfinished run."""
