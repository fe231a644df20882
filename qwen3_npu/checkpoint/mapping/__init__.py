"""Names and shards: which part of which tensor goes where. Knows no file."""
