"""`inference.py --serve`: requests of OpenAI's API over HTTP, answered by the engine as they come."""
