"""What lies in a folder, and how each format is read and written."""
