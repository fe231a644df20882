"""What a run leaves behind: finished files, and a journal while it is not finished."""
