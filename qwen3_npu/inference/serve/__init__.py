"""`inference.py --serve`: answers requests of OpenAI's API over HTTP with the engine."""
